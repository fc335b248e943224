"""Baselines against their formulas, written out in slow loops, and against known figures on real data."""

from __future__ import annotations

import numpy as np
import pytest

from rec_jax.eval import baselines, rankings
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
    monkeypatch.setattr(baselines, "CHUNK", 5)  # several chunks, the last one short
    x = binary(histories)
    expected = np.zeros((N, N))
    for j in range(N):  # column j: ridge regression of item j on all others
        others = [i for i in range(N) if i != j]
        expected[others, j] = np.linalg.solve(x[:, others].T @ x[:, others] + 2.5 * np.eye(N - 1), x[:, others].T @ x[:, j])
    scores = baselines.fit("ease", histories, N, regularisation=2.5)(QUERIES)
    np.testing.assert_allclose(scores, binary(QUERIES) @ expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_every_baseline_gives_float32_and_the_same_bits_twice(histories, name):
    first, second = (baselines.fit(name, histories, N)(QUERIES) for _ in range(2))
    assert first.dtype == np.float32
    assert first.shape == (4, N)
    assert first.tobytes() == second.tobytes()
    assert np.isfinite(first).all()


def test_bad_input_is_refused(histories):
    with pytest.raises(RecJaxError, match="takes popularity, item_knn, sequence_knn, ease"):
        baselines.fit("bpr", histories, N)
    with pytest.raises(RecJaxError, match="ease_max_items"):
        baselines.fit("ease", histories, N, max_items=5)
    for name in baselines.BASELINES:
        with pytest.raises(RecJaxError, match="the catalogue has 0 to 4"):
            baselines.fit(name, histories, 5)


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
