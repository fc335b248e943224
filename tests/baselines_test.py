"""Baselines against their formulas, written out in slow loops, and against known figures on real data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from rec_jax.eval import baselines, rankings
from rec_jax.eval.baselines import implicit_als, linear, pairwise
from rec_jax.eval.baselines.histories import matrix
from rec_jax.types import EvalSet, Ragged, RecJaxError

N = 12


@pytest.fixture
def histories():
    rng = np.random.default_rng(0)
    rows = [rng.permutation(N)[: rng.integers(1, 9)] for _ in range(30)]
    rows[4] = np.array([2, 5, 2, 7])  # an item twice
    return Ragged.from_rows(rows)


QUERIES = Ragged.from_rows([[3, 1, 2], [0], [], [7, 7, 8, 9, 10, 11, 4]])


def binary(rows):
    out = np.zeros((len(rows), N))
    for n in range(len(rows)):
        out[n, rows[n]] = 1
    return out


def test_popularity_counts_events(histories):
    scores = baselines.fit("popularity", histories, N)(QUERIES)
    np.testing.assert_array_equal(scores, np.tile(np.bincount(histories.flat, minlength=N), (4, 1)))


@pytest.mark.parametrize("neighbours", [3, 100])
def test_item_knn_sums_cosines_of_the_nearest(neighbours):
    rng = np.random.default_rng(0)
    histories = Ragged.from_rows([rng.permutation(N)[: rng.integers(1, 9)] for _ in range(3000)])
    x = binary(histories)
    cosine = np.array([[x[:, i] @ x[:, j] / np.sqrt(x[:, i].sum() * x[:, j].sum()) if i != j else 0 for i in range(N)] for j in range(N)])
    for j in range(N):
        kept = np.sort(cosine[j])[::-1][: min(neighbours, N)]
        cosine[j][cosine[j] < kept[-1]] = 0
        assert neighbours > N or (cosine[j] > 0).sum() == neighbours, "the example has a tie at the border; draw another"
    scores = baselines.fit("item_knn", histories, N, neighbours=neighbours)(QUERIES)
    np.testing.assert_allclose(scores, binary(QUERIES) @ cosine.T, rtol=1e-5, atol=1e-7)


def test_sequence_knn_is_its_formula(histories):
    options = {"window": 3, "decay": 0.7, "backward": 0.3, "recent": 4, "recency": 0.6, "source_power": 0.2, "target_power": 0.4}
    together, counts = np.zeros((N, N)), np.bincount(histories.flat, minlength=N)
    for n in range(len(histories)):
        row = histories[n]
        for a in range(len(row)):
            for b in range(a + 1, min(a + 3, len(row) - 1) + 1):
                together[row[a], row[b]] += 0.7 ** (b - a - 1)
                together[row[b], row[a]] += 0.3 * 0.7 ** (b - a - 1)
    expected = np.zeros((len(QUERIES), N))
    for n in range(len(QUERIES)):
        for age, i in enumerate(QUERIES[n][::-1][:4]):
            for j in range(N):
                if i != j:
                    expected[n, j] += 0.6**age * together[i, j] / counts[i] ** 0.2 / counts[j] ** 0.4
    scores = baselines.fit("sequence_knn", histories, N, **options)(QUERIES)
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-7)


def test_ease_is_the_constrained_least_squares_solution(histories, monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", 5)  # several chunks, the last one short
    x = binary(histories)
    expected = np.zeros((N, N))
    for j in range(N):  # column j: ridge regression of item j on all others
        others = [i for i in range(N) if i != j]
        expected[others, j] = np.linalg.solve(x[:, others].T @ x[:, others] + 2.5 * np.eye(N - 1), x[:, others].T @ x[:, j])
    scores = baselines.fit("ease", histories, N, regularisation=2.5)(QUERIES)
    np.testing.assert_allclose(scores, binary(QUERIES) @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("users", [9, 60], ids=["by users", "by items"])
@pytest.mark.parametrize("power", [0.0, 0.3])
def test_ease_by_users_or_by_items_is_the_same(monkeypatch, users, power):
    monkeypatch.setattr(linear, "CHUNK", 5)
    rng, n = np.random.default_rng(0), 17
    train = Ragged.from_rows([rng.permutation(n)[: rng.integers(1, 8)] for _ in range(users)])
    x = np.stack([np.isin(np.arange(n), train[user]) for user in range(users)]).astype(float)
    scale = np.maximum(x.sum(0), 1) ** -power
    inverse = np.linalg.inv((x * scale).T @ (x * scale) + 1.5 * np.eye(n))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)
    queries = Ragged.from_rows([[3, 1], [], [16, 2, 5]])
    h = np.stack([np.isin(np.arange(n), queries[q]) for q in range(3)]) * scale
    scores = baselines.fit("ease", train, n, regularisation=1.5, popularity_power=power)(queries)
    np.testing.assert_allclose(scores, h @ weights, rtol=1e-4, atol=1e-5)


def test_text_knn_is_its_formula():
    table = np.random.default_rng(0).normal(size=(12, 5))
    queries = Ragged.from_rows([[3, 1], [], [4, 0, 7, 2, 5, 6, 7]])
    t = table - table.mean(0)
    t = [row / np.sqrt(sum(x * x for x in row)) for row in t]
    found = baselines.text_knn(table, recent=3, recency=0.5, sharpness=2.0)(queries)
    for u in range(3):
        newest = queries[u][::-1][:3].tolist()
        for j in range(12):
            wanted = sum(0.5**age * np.exp(2 * (float(t[i] @ t[j]) - 1)) for age, i in enumerate(newest))
            assert found[u, j] == pytest.approx(wanted, rel=1e-4)
    assert found.dtype == np.float32
    with pytest.raises(RecJaxError, match="the catalogue has 0 to 11"):
        baselines.text_knn(table)(Ragged.from_rows([[12]]))


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_every_baseline_gives_float32_and_the_same_bits_twice(histories, name):
    first, second = (baselines.fit(name, histories, N)(QUERIES) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == (4, N)
    assert first.tobytes() == second.tobytes()
    assert np.isfinite(first).all()


def test_bad_input_is_refused(histories):
    with pytest.raises(RecJaxError, match="takes popularity, recent_popularity, item_knn, sequence_knn, ease, ials, bpr"):
        baselines.fit("knn", histories, N)
    with pytest.raises(RecJaxError, match="ease_max_items"):
        baselines.fit("ease", histories, N, max_items=5)
    with pytest.raises(RecJaxError, match=r"popularity_power=2; expected"):
        baselines.fit("ease", histories, N, popularity_power=2)
    for name in baselines.BASELINES:
        with pytest.raises(RecJaxError, match="the catalogue has 0 to 4"):
            baselines.fit(name, histories, 5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("recent_popularity", {"share": 0}, r"share=0, places=5"),
        ("recent_popularity", {"places": 0}, r"share=0\.1, places=0"),
        ("recent_popularity", {"times": np.arange(3)}, "3 times for"),
        ("ials", {"dim": 0}, "dim=0"),
        ("ials", {"regularisation": 0.0}, r"regularisation=0\.0"),
        ("bpr", {"epochs": 0}, "epochs=0"),
        ("bpr", {"learning_rate": 0.0}, r"learning_rate=0\.0"),
    ],
)
def test_options_out_of_range_are_refused(histories, name, options, message):
    with pytest.raises(RecJaxError, match=message):
        baselines.fit(name, histories, N, **options)


def test_bpr_refuses_what_has_no_pairs():
    with pytest.raises(RecJaxError, match="0 events of 12 items"):
        baselines.fit("bpr", Ragged.from_rows([[], []]), N)
    with pytest.raises(RecJaxError, match="for each user an item that is not the user's"):
        baselines.fit("bpr", Ragged.from_rows([list(range(N)), [1]]), N)


def test_recent_popularity_counts_the_newest_events():
    train = Ragged.from_rows([[0, 1, 2, 3], [4], [], [5, 1, 1]])
    by_place = baselines.fit("recent_popularity", train, 6, places=2)(QUERIES)
    np.testing.assert_array_equal(by_place, np.tile([0, 2, 1, 1, 1, 0], (4, 1)))
    times = np.array([1, 2, 3, 9, 8, 1, 8, 4])
    by_time = lambda share: baselines.fit("recent_popularity", train, 6, times=times, share=share)(QUERIES)[0].tolist()
    assert by_time(0.125) == [0, 0, 0, 1, 0, 0]
    assert by_time(0.25) == [0, 1, 0, 1, 1, 0], "all events of the time at which the share begins"
    assert by_time(1) == np.bincount(train.flat).tolist()


def als_loss(x, users, items, unobserved, regularisation, frequency):
    """The loss of iALS, term by term, in float64."""
    u, h = users.astype(np.float64), items.astype(np.float64)
    fit = sum((1 - u[a] @ h[b]) ** 2 for a, b in zip(*np.nonzero(x), strict=True)) + unobserved * ((u @ h.T) ** 2).sum()
    of_users = ((x.sum(1) + unobserved * len(h)) ** frequency * (u**2).sum(1)).sum()
    return fit + regularisation * (of_users + ((x.sum(0) + unobserved * len(u)) ** frequency * (h**2).sum(1)).sum())


def test_a_half_step_of_ials_solves_its_least_squares_and_the_loss_never_rises(histories, monkeypatch):
    monkeypatch.setattr(implicit_als, "PLACES", 20)  # several blocks of rows
    x, weights = binary(histories), {"unobserved": 0.3, "regularisation": 0.05, "frequency": 0.7}
    seen, items = matrix(histories, N), np.random.default_rng(1).normal(size=(N, 4)).astype(np.float32)
    users = implicit_als.solve(seen, items, **weights)
    for n in range(len(histories)):  # the row's loss as one least-squares problem: stacked rows sqrt(weight) x features
        h = items.astype(np.float64)
        penalty = np.sqrt(0.05 * (x[n].sum() + 0.3 * N) ** 0.7) * np.eye(4)
        features = np.concatenate([h[x[n] > 0], np.sqrt(0.3) * h, penalty])
        wanted = np.concatenate([np.ones(int(x[n].sum())), np.zeros(N + 4)])
        np.testing.assert_allclose(users[n], np.linalg.lstsq(features, wanted, rcond=None)[0], rtol=1e-4, atol=1e-5)
    losses = [als_loss(x, users, items, **weights)]
    for _ in range(5):
        items = implicit_als.solve(seen.T.tocsr(), users, **weights)
        losses.append(als_loss(x, users, items, **weights))
        users = implicit_als.solve(seen, items, **weights)
        losses.append(als_loss(x, users, items, **weights))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.9 * losses[0]
    assert not implicit_als.solve(matrix(Ragged.from_rows([[], [1]]), N), items, **weights)[0].any()


def blocks(n_groups=4, size=15, seed=0):
    """Users who have a third of their group's items: (train, group of each user, group of each item)."""
    random, rows = np.random.default_rng(seed), []
    for user in range(n_groups * 20):
        rows.append(user % n_groups * size + random.permutation(size)[:5])
    return Ragged.from_rows(rows), np.arange(n_groups * 20) % n_groups, np.arange(n_groups * size) // size


@pytest.mark.parametrize(("name", "options"), [("bpr", {"dim": 8}), ("ials", {"dim": 8})])
def test_factors_find_planted_groups(name, options):
    train, group_of_user, group_of_item = blocks()
    n_items = len(group_of_item)

    def auc(scores):
        """Share of (unseen item of the group, item of another group) in the right order, ties half."""
        values = []
        for u in range(len(train)):
            inside = np.setdiff1d(np.flatnonzero(group_of_item == group_of_user[u]), train[u])
            a, b = scores[u, inside][:, None], scores[u, group_of_item != group_of_user[u]][None]
            values.append(((a > b) + 0.5 * (a == b)).mean())
        return np.mean(values)

    popular = auc(baselines.fit("popularity", train, n_items)(train))
    found = {seed: baselines.fit(name, train, n_items, seed=seed, **options)(train) for seed in (0, 1)}
    assert 0.4 < popular < 0.6
    assert min(auc(scores) for scores in found.values()) > 0.95
    assert np.abs(found[0] - found[1]).max() > 1e-4, "the seed has no part"


def test_a_step_of_bpr_goes_up_the_objective_of_its_triples():
    """AdaGrad's first step goes learning_rate along the gradient's sign; the gradient is that of finite differences."""
    random = np.random.default_rng(0)
    factors = {"users": random.normal(size=(3, 2)), "items": random.normal(size=(5, 2)), "bias": random.normal(size=(5, 1))}
    users, items, others = np.array([0, 0, 2]), np.array([1, 1, 4]), np.array([2, 3, 1])

    def objective(f):
        total = 0.0
        for u, i, j in zip(users, items, others, strict=True):
            x = f["users"][u] @ (f["items"][i] - f["items"][j]) + f["bias"][i, 0] - f["bias"][j, 0]
            touched = (f["users"][u], f["items"][i], f["items"][j], f["bias"][i], f["bias"][j])
            total += -np.logaddexp(0, -x) - 0.1 / 2 * sum((v**2).sum() for v in touched)
        return total

    after = {name: x.astype(np.float32) for name, x in factors.items()}
    pairwise._step(after, {name: np.full_like(x, 1e-12) for name, x in after.items()}, users, items, others, 0.1, 1e-3)
    for name, x in factors.items():
        for place in np.ndindex(x.shape):
            up, down = ({k: v.copy() for k, v in factors.items()} for _ in range(2))
            up[name][place] += 1e-5
            down[name][place] -= 1e-5
            slope = (objective(up) - objective(down)) / 2e-5
            assert after[name][place] - x[place] == pytest.approx(1e-3 * np.sign(round(slope, 7)), abs=2e-6), (name, place, slope)


def test_a_history_of_bpr_is_held_against_all_items():
    """The vector found for a history is about as good, against every item, as the best one; one small draw's would not be."""
    random = np.random.default_rng(0)
    items, bias = random.normal(size=(200, 4)), random.normal(size=(200, 1))
    histories = Ragged.from_rows([[3, 1, 2], [50, 7], [150, 151, 8, 9]])

    def slope_and_value(w, row):
        x = items[row] @ w + bias[row, 0]
        difference = x[:, None] - (items @ w + bias[:, 0])[None]
        pull = 1 / (1 + np.exp(difference))
        up = (pull.sum(1) @ items[row] - pull.sum(0) @ items) / pull.size - 0.1 * w
        return up, -np.logaddexp(0, -difference).mean() - 0.1 / 2 * w @ w

    factors = {"items": items.astype(np.float32), "bias": bias.astype(np.float32)}
    found = pairwise._folded(matrix(histories, 200), factors, random.integers(0, 200, (150, 8)), 0.1, 0.3)
    for row, w in zip((histories[u] for u in range(3)), found, strict=True):
        best = np.zeros(4)
        for _ in range(2000):
            best += 0.3 * slope_and_value(best, row)[0]
        assert slope_and_value(best, row)[1] - slope_and_value(w, row)[1] < 0.01


def test_known_figures_on_movielens_latest_small(data_dir):
    """Leave-one-out by (user, time), history removed."""
    events = np.loadtxt(data_dir / "ml-latest-small" / "ratings.csv", delimiter=",", skiprows=1)
    events = events[np.lexsort((events[:, 3], events[:, 0]))]
    _, items = np.unique(events[:, 1], return_inverse=True)
    rows = np.split(items, np.flatnonzero(np.diff(events[:, 0])) + 1)
    train = Ragged.from_rows([r[:-2] for r in rows])
    test = EvalSet(
        np.arange(len(rows)), Ragged.from_rows([r[:-1] for r in rows]), Ragged.from_rows([r[-1:] for r in rows]), items.max() + 1
    )
    figures = {}
    for name in ("popularity", "item_knn", "sequence_knn"):
        figures[name] = rankings.evaluate_scores(baselines.fit(name, train, test.n_items), test, ks=(10,)).metrics["test/ndcg@10"]
    assert figures["popularity"] == pytest.approx(0.0178, abs=0.0005)
    assert figures["item_knn"] == pytest.approx(0.0331, abs=0.002)
    assert figures["sequence_knn"] > 0.066
