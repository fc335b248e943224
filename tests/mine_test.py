"""Mining against a slow reference in plain NumPy, on any number of devices; the file; and the command on a trained workdir."""

import argparse
import json

import jax
import numpy as np
import pytest
import tiny

from rec_jax import config as config_lib
from rec_jax import config_flags
from rec_jax.data import negatives
from rec_jax.data.prepare import prepare
from rec_jax.eval import encoder as encoder_lib
from rec_jax.eval import mine as mine_lib
from rec_jax.eval import model as model_lib
from rec_jax.eval.mine import __main__ as command
from rec_jax.towers.bert import init as init_text
from rec_jax.train import __main__ as train
from rec_jax.train import stages
from rec_jax.types import Ragged, RecJaxError

Q, N, D, K = 21, 403, 8, 5


def make(seed=0, *, whole=True):
    """Vectors of small whole numbers, so that ties are everywhere and every score is exact; known rows of 0 to 30 items, with repeats."""
    random = np.random.default_rng(seed)
    draw = (lambda shape: random.integers(-2, 3, shape)) if whole else (lambda shape: random.normal(size=shape))
    query, item = draw((Q, D)).astype(np.float32), draw((N, D)).astype(np.float32)
    scores = query @ item.T
    positive = np.asarray([np.argsort(-row)[random.integers(0, 40)] for row in scores], np.int32)  # high, but seldom the highest
    known = [random.choice(np.argsort(-row)[:60], random.integers(0, 30)) for row in scores]  # they matter: all score high
    known[3], known[4] = np.zeros(0, np.int32), np.asarray([positive[4]])
    return query, item, positive, Ragged.from_rows(known)


def reference(query, item, positive, known, *, k, skip=0, window=200, margin=0.0, max_share=None):
    """One query and one item at a time -> ids, scores, counts of (known, skipped, too close)."""
    ids, best, counts = np.full((len(query), k), -1), np.full((len(query), k), -np.inf, np.float32), []
    for q in range(len(query)):
        scores = [np.float32(query[q] @ row) for row in item]
        own = {int(positive[q]), *known[q].tolist()}
        ranking = sorted(range(len(item)), key=lambda i: (-scores[i], i))
        ranked = [i for i in ranking if i not in own][:window]
        mine = scores[positive[q]]
        limit = np.float32(np.inf) if margin is None else np.float32(mine - np.float32(margin))
        if max_share is not None:
            share = np.float32(max_share) if mine >= 0 else np.float32(2 - max_share)
            limit = min(limit, np.float32(mine * share))
        kept = [i for i in ranked[skip:] if scores[i] <= limit]
        ids[q, : len(kept[:k])] = kept[:k]
        best[q, : len(kept[:k])] = [scores[i] for i in kept[:k]]
        ahead = ranking.index(ranked[-1]) if len(ranked) == window else len(ranking)
        among = sum(i in own and i != positive[q] for i in ranking[:ahead])
        counts.append((among, len(ranked[:skip]), len(ranked[skip:]) - len(kept)))
    return ids, best, np.asarray(counts)


RULES = {
    "plain": {"margin": None},
    "margin": {"margin": 2.0},
    "twins of the positive may stay": {"margin": 0.0, "window": 150},
    "share": {"margin": None, "max_share": 0.75},
    "share of everything": {"margin": 1.0, "max_share": 0.5, "window": 90},
    "window": {"margin": None, "skip": 7, "window": 12},
    "all": {"margin": 1.0, "max_share": 0.9, "skip": 3, "window": 40},
    "more than there is": {"margin": None, "skip": 390, "window": 1000},
}


def check(mined, expected):
    ids, scores, counts = expected
    np.testing.assert_array_equal(mined.ids, ids)
    np.testing.assert_array_equal(mined.scores, scores)
    np.testing.assert_array_equal(np.stack([mined.known, mined.skipped, mined.too_close], 1), counts)


@pytest.mark.parametrize("name", RULES)
def test_each_rule_is_that_of_the_reference(name):
    inputs = make()
    mined = mine_lib.mine(*inputs, k=K, **RULES[name], queries_per_block=16)
    expected = reference(*inputs, k=K, **RULES[name])
    check(mined, expected)
    assert mined.ids.dtype == np.int32
    np.testing.assert_array_equal(mined.positive, (inputs[0] * inputs[1][inputs[2]]).sum(1))
    assert (expected[0] >= 0).any(), "the case has something to mine"


def test_positives_below_zero_ask_for_scores_below_theirs():
    """A share of a negative score would lie above it."""
    query, item, _, known = make(2)
    positive = np.argsort(query @ item.T, axis=1)[:, 40].astype(np.int32)
    options = {"k": K, "margin": None, "max_share": 0.8, "window": N}
    mined = mine_lib.mine(query, item, positive, known, **options)
    check(mined, reference(query, item, positive, known, **options))
    assert (mined.positive < 0).all()
    assert (mined.scores < mined.positive[:, None]).all()


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("whole", [True, False], ids=["ties", "rounding"])
def test_same_result_on_any_number_of_devices(devices, whole):
    query, item, positive, known = make(1, whole=whole)
    item[200:300] = item[:100]  # twins on other devices
    options = {"k": K, "margin": 0.0, "skip": 1, "window": 60, "seed": 4}
    plain = mine_lib.mine(query, item, positive, known, **options)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices])
    shared = mine_lib.mine(query, item, positive, known, **options, mesh=mesh, axis="data", block=128, queries_per_block=8)
    for a, b in zip(plain, shared, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_seed_draws_out_of_what_the_rules_leave():
    query, item, positive, known = make(3)
    options = {"margin": 1.0, "skip": 2, "window": 50}
    left = mine_lib.mine(query, item, positive, known, k=48, **options)
    drawn = [mine_lib.mine(query, item, positive, known, k=K, seed=seed, **options) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(drawn[0].ids, drawn[1].ids)
    assert (drawn[0].ids != drawn[2].ids).any()
    for q in range(Q):
        pool = left.ids[q][left.ids[q] >= 0].tolist()
        found = drawn[0].ids[q][drawn[0].ids[q] >= 0].tolist()
        assert len(set(found)) == len(found) == min(K, len(pool))
        places = [pool.index(i) for i in found]
        assert places == sorted(places), "highest score first"


def test_no_query_at_all():
    _, item, _, _ = make()
    none = mine_lib.mine(np.zeros((0, D), np.float32), item, np.zeros(0, np.int32), Ragged.from_rows([]), k=K)
    assert none.ids.shape == none.scores.shape == (0, K)


def test_bad_input_is_refused():
    query, item, positive, known = make()
    for options, message in [
        ({"k": 201}, "k=201 negatives out of ranks 1 to window=200"),
        ({"k": 5, "skip": 196}, "raise window to 201"),
        ({"k": 0}, "k=0"),
        ({"k": 5, "skip": -1}, "skip=-1"),
        ({"k": 5, "margin": -0.1}, "margin=-0.1"),
        ({"k": 5, "margin": float("nan")}, "margin=nan"),
        ({"k": 5, "max_share": 0.0}, "max_share=0.0"),
        ({"k": 5, "max_share": 1.5}, "max_share=1.5"),
    ]:
        with pytest.raises(RecJaxError, match=message):
            mine_lib.mine(query, item, positive, known, **options)
    with pytest.raises(RecJaxError, match="21 queries, 20 positives"):
        mine_lib.mine(query, item, positive[1:], known, k=K)
    with pytest.raises(RecJaxError, match="catalogue indices from 0 to 402"):
        mine_lib.mine(query, item, np.full(Q, N), known, k=K)
    with pytest.raises(RecJaxError, match=r"named\[1\] names item 403"):
        mine_lib.mine(query, item, positive, Ragged.from_rows([[], [N], *[[]] * (Q - 2)]), k=K)
    query[2, 0] = np.nan
    with pytest.raises(RecJaxError, match="NaN score"):
        mine_lib.mine(query, item, positive, known, k=K)


def test_the_file_is_read_back_or_refused(tmp_path):
    file, items = tmp_path / "new" / "n.npz", np.array([[3, -1], [0, 4]], np.int32)
    known = {"fingerprint": "a" * 64, "users": 2, "items": 5}
    negatives.write(file, items, np.zeros((2, 2), np.float32), {"k": 2}, fingerprint="a" * 64)
    np.testing.assert_array_equal(negatives.read(file, **known), items)
    first = file.read_bytes()
    negatives.write(file, items, np.zeros((2, 2), np.float32), {"k": 2}, fingerprint="a" * 64)
    assert file.read_bytes() == first, "the same negatives are the same bytes"
    assert [f.name for f in file.parent.iterdir()] == ["n.npz"], "nothing else is left beside it"
    for changes, message in [
        ({"fingerprint": "b" * 64}, "mined on other data"),
        ({"users": 3}, r"expected \[3, K\]"),
        ({"items": 4}, "names item 4"),
    ]:
        with pytest.raises(RecJaxError, match=message):
            negatives.read(file, **{**known, **changes})
    with pytest.raises(RecJaxError, match="no such file; make one"):
        negatives.read(tmp_path / "none.npz", **known)
    for content in (b"", b"text", first[: len(first) // 2]):
        file.write_bytes(content)
        with pytest.raises(RecJaxError, match="is no file of negatives"):
            negatives.read(file, **known)
    np.savez(file, items=items)
    with pytest.raises(RecJaxError, match="is no file of negatives"):
        negatives.read(file, **known)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The users of tests/tiny.py as files of the reader `sequences`."""
    folder = tmp_path_factory.mktemp("data")
    lines = [" ".join(map(str, [user, *record["items"].tolist()])) for user, record in enumerate(tiny.records())]
    (folder / "events.txt").write_text("\n".join(lines) + "\n")
    (folder / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{n}\tFilm {n}\n" for n in range(tiny.N_ITEMS)))
    return folder


def words(data, workdir, *more):
    steps = [f"--config.{key}=2 steps" for key in ("train.duration", "train.eval_every", "train.checkpoint_every", "train.log_every")]
    small = ["batch.history_length=16", "towers.dim=8", "towers.user.layers=1", "eval.k=(10,)", "eval.baselines=('popularity',)"]
    source = [f"data.path={data}/events.txt", f"data.items={data}/items.tsv", "data.on_bad.duplicate_event=keep"]
    return ["--config=configs/sequences.py", f"--workdir={workdir}", *steps, *(f"--config.{x}" for x in small + source), *more]


def test_command_mines_on_a_workdir_and_training_reads_the_file(data, tmp_path, root, monkeypatch, capsys):
    monkeypatch.chdir(root)
    spec = tiny.bert_spec(vocab_size=30522)  # that of the tokenizer
    encoder = jax.jit(lambda key: init_text(key, spec))(jax.random.key(1)), spec
    monkeypatch.setattr(encoder_lib, "load_encoder", lambda config, prepared: encoder)
    assert train.main(words(data, tmp_path / "first")) == 0
    capsys.readouterr()
    call = [f"--workdir={tmp_path}/first", "--k=3", "--window=20", "--margin=none"]
    assert command.main(call) == 0
    out = capsys.readouterr().out
    for line in ("negatives for 40 of 40 users", "left out: ", "mean score: positives", "empty places: 0.0%", "after    Film"):
        assert line in out
    assert out.count("  mined    Film") == 3
    with np.load(tmp_path / "first" / "negatives.npz", allow_pickle=False) as file:
        items, scores, settings = file["items"], file["scores"], json.loads(str(file["settings"]))
    assert items.shape == scores.shape == (tiny.N_USERS, 3)
    assert (settings["k"], settings["window"], settings["known"], settings["margin"]) == (3, 20, ["train", "valid"], None)
    trained = model_lib.load(tmp_path / "first", say=lambda _: None)
    prepared = trained.model.prepared
    train_items, (known, tests) = prepared.train_histories(), (mine_lib.known_items(prepared, s) for s in (("train", "valid"), ("test",)))
    valid = prepared.eval_set("valid")
    for user in range(tiny.N_USERS):
        assert sorted(known[user].tolist()) == sorted([*train_items[user].tolist(), *valid.targets[user].tolist()])
        assert not set(items[user].tolist()) & set(known[user].tolist())
        assert len(tests[user]) == 1
    histories = Ragged.from_rows([train_items[user][:-1] for user in range(tiny.N_USERS)])
    positive = np.asarray([train_items[user][-1] for user in range(tiny.N_USERS)])
    vectors = trained.model.user_vectors(trained.params, trained.items, histories)
    again = mine_lib.mine(vectors, trained.items, positive, known, k=3, window=20, margin=None)
    np.testing.assert_array_equal(items, again.ids)

    # Training reads them through its config; a file of another data set is refused.
    file, mesh = f"--config.data.negatives={tmp_path}/first/negatives.npz", tiny.one_device()
    _, overrides = config_flags.parse_args(argparse.ArgumentParser(), [w for w in words(data, "W", file) if w.startswith("--config.")])
    config = config_lib.load("configs/sequences.py", overrides)
    batches = stages.make_batches(config, stages.Inputs(prepare(config), trained.model.tokens, trained.model.spec, {}), mesh)
    np.testing.assert_array_equal(batches.negatives, items)
    assert (next(iter(batches)).negatives >= 0).any()
    (tmp_path / "other").mkdir()
    lines = (data / "events.txt").read_text().splitlines()
    (tmp_path / "other" / "events.txt").write_text("\n".join(lines[:-1]) + "\n")
    other = config_lib.load("configs/sequences.py", [*overrides, ("data.path", f"{tmp_path}/other/events.txt")])
    with pytest.raises(RecJaxError, match="was mined on other data"):
        stages.make_batches(other, stages.Inputs(prepare(other), trained.model.tokens, trained.model.spec, {}), mesh)
    with pytest.raises(RecJaxError, match="has no stage 'late'"):
        command.main([*call, "--stage=late"])
    with pytest.raises(RecJaxError, match=r"known events 'all'"):
        command.main([*call, "--known=all"])
    with pytest.raises(RecJaxError, match="window=20"):
        command.main([*call, "--k=30"])
