"""Going on from a trained workdir with new events, users and items."""

import hashlib
import json

import jax
import numpy as np
import pytest
import tiny
from etils import epath

from rec_jax import config as config_lib
from rec_jax.config_features import FEATURE_KEYS, USER_KEYS
from rec_jax.data import pipeline, prepare, start, vocabulary
from rec_jax.eval import continual, model, rankings
from rec_jax.eval import encoder as encoder_lib
from rec_jax.train import __main__ as command
from rec_jax.train import carry, chain, stages
from rec_jax.types import EvalSet, Ragged, RecJaxError

# -- what is new --

OLD = ["a 1 2 3 4 5", "b 2 3 4 5 1", "c 5 4 3 2"]  # the last two events of each are validation and test
NEW = ["z 9 1 2 9", "a 1 2 3 4 5 6 9", "c 5 4 3 2", "b 9 2 3 4 5 1"]  # item 9 comes first now; b has an event before all others


def prepared_of(folder, lines, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "events.txt").write_text("\n".join(lines) + "\n")
    c = config_lib.defaults()
    c.data.update({"reader": "sequences", "path": str(folder / "events.txt")})
    c.data.on_bad.update({"empty_text": "keep", "duplicate_event": "keep"})
    c.data.update(changes)
    return prepare.prepare(c)


def test_difference_goes_by_ids(tmp_path):
    old, new = prepared_of(tmp_path / "old", OLD), prepared_of(tmp_path / "new", NEW)
    d = start.difference(new, old)
    assert {i: old.item_ids()[n] if n >= 0 else None for i, n in zip(new.item_ids(), d.items, strict=True)} == {
        **{i: i for i in "12345"},
        **dict.fromkeys("69"),
    }
    names = new.users()["user"].to_list()
    assert {u: int(n) for u, n in zip(names, d.users, strict=True)} == {"z": -1, "a": 0, "b": 1, "c": 2}
    assert dict(zip(names, d.active.tolist(), strict=True)) == {"z": True, "a": True, "b": True, "c": False}
    flags = Ragged(d.events, new.train_histories().offsets)
    # a was trained on 1 2 3, and 4 and 5 move into its train events; b's 9 is new; 2 3 4 was trained on.
    expected = {"z": [True, True], "a": [False, False, False, True, True], "b": [True, False, False, False], "c": [False, False]}
    assert {u: flags[n].tolist() for n, u in enumerate(names)} == expected


def test_an_event_that_comes_again_is_new(tmp_path):
    old, new = prepared_of(tmp_path / "old", ["a 1 1 2 3 4"]), prepared_of(tmp_path / "new", ["a 1 1 1 2 3 4"])
    assert start.difference(new, old).events.tolist() == [False, False, True, False]


# -- rows and shapes --


def carried(items, users, **changes):
    c = tiny.config(**{"towers.item.ids": True, **changes})
    step = stages.make_step(c, spec_of(c), pipeline.BatchSpec.from_config(c))
    old = stages.fresh(c, step, None, tiny.table())
    old["ids"]["embedding"] = jax.random.normal(jax.random.key(5), (256, 8))
    old["users"] = {"embedding": jax.random.normal(jax.random.key(6), (256, 8))}
    return carry.Carried(jax.device_get(old), {"items": np.array(items), "users": np.array(users)}, "runs/old")


def spec_of(c, n_items=tiny.N_ITEMS):
    return stages.two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=n_items)


def test_rows_go_with_their_ids_and_new_ones_are_fresh():
    items = np.random.default_rng(0).permutation(np.concatenate([np.arange(60), np.full(240, -1)]))
    users = np.array([3, -1, 0])
    old = carried(items, users)
    c = tiny.config(**{"towers.item.ids": True})
    step = stages.make_step(c, spec_of(c, 300), pipeline.BatchSpec.from_config(c))
    fresh = stages.fresh(c, step, None, None)
    fresh["users"] = {"embedding": jax.random.normal(jax.random.key(7), (256, 8))}
    out = carry.laid_out(old, fresh)
    ids, users_out = np.asarray(out["ids"]["embedding"]), np.asarray(out["users"]["embedding"])
    assert ids.shape == (512, 8)
    for row, place in enumerate(items):
        np.testing.assert_array_equal(ids[row], old.params["ids"]["embedding"][place] if place >= 0 else np.zeros(8))
    assert not ids[300:].any()
    np.testing.assert_array_equal(users_out[[0, 2]], old.params["users"]["embedding"][[3, 0]])
    np.testing.assert_array_equal(users_out[1], fresh["users"]["embedding"][1])
    same = jax.tree.map(np.array_equal, out["user"], old.params["user"])
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.dim": 16}, r"ids/embedding is \(256, 8\) in runs/old .* and \(256, 16\) in this run"),
        ({"towers.user.layers": 3}, r"user/.* is absent in runs/old .* and \(.*\) in this run"),
        ({"towers.item.ids": False}, r"ids/embedding is \(256, 8\) in runs/old .* and absent in this run"),
        ({"towers.item.head": "mlp"}, r"item/.* is .* in runs/old"),
    ],
)
def test_towers_that_do_not_fit_are_named_with_both_shapes(changes, message):
    old = carried(np.arange(60), np.arange(3))
    old = carry.Carried({k: v for k, v in old.params.items() if k != "users"}, old.rows, old.place)
    c = tiny.config(**{"towers.item.ids": True, **changes})
    with pytest.raises(RecJaxError, match=message):
        stages.check(c, spec_of(c), None, tiny.one_device(), start=old)


# -- figures --


def test_figures_of_a_tiny_world_by_hand():
    random = np.random.default_rng(1)
    scores = random.normal(size=(4, 12)).astype(np.float32)
    targets = [[0, 11], [3], [10], [5]]
    eval_set = EvalSet(np.array([0, 2, 3, 5]), Ragged.from_rows([[1], [2], [], [4]]), Ragged.from_rows(targets), 12)
    ranked = rankings.evaluate_scores(lambda h: scores[: len(h)], eval_set, ks=(5,), users_per_block=4)
    # Blocks go by the length of the history: the user without one comes first.
    scores = scores[[1, 2, 0, 3]]
    difference = start.Difference(
        items=np.where(np.arange(12) < 10, np.arange(12), -1),
        users=np.zeros(6, int),
        events=np.zeros(0, bool),
        active=np.array([True, False, False, True, False, False]),
    )
    found = continual.measure(ranked, eval_set, difference)

    def rank(n, item):
        known = [[1], [2], [], [4]][n]
        return 1 + sum(scores[n, j] >= scores[n, item] for j in range(12) if j != item and j not in known)

    def ndcg(n, items):
        gains = sum(1 / np.log2(rank(n, i) + 1) for i in items if rank(n, i) <= 10)
        return gains / sum(1 / np.log2(k + 2) for k in range(len(items)))

    for group, users in {"new": {0: [0, 11], 2: [10]}, "old": {1: [3], 3: [5]}, "new items": {0: [11], 2: [10]}}.items():
        np.testing.assert_allclose(found[group]["ndcg@10"], [ndcg(n, i) for n, i in users.items()])
    assert set(continual.measure(ranked, eval_set, start.Difference(np.arange(12), np.zeros(6), np.zeros(0), np.ones(6, bool)))) == {"new"}


# -- the whole --

# tests/features_end_to_end_test.py goes on with new words.
TINY = {
    **tiny.FLAGS,
    "towers.item.words": 0,
    "train.duration": "12 steps",
    "train.eval_every": "6 steps",
    "train.checkpoint_every": "6 steps",
}


def train(folder, workdir, **changes):
    flags = TINY | {"data.path": f"{folder}/events.txt", "data.items": f"{folder}/items.tsv", **changes}
    return command.main(["--config=configs/sequences.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())])


def going_on(world):
    c = config_lib.read_config(world / "first").unlock()
    c.start.path = str(world / "first")
    return c


def write(folder, users, items):
    folder.mkdir()
    (folder / "events.txt").write_text("".join(f"{u} {' '.join(map(str, row))}\n" for u, row in users.items()))
    (folder / "items.tsv").write_text("item_id\ttitle\n" + "".join(f"{n}\tred {'thing' * (n % 3)} {n % 7} {n}\n" for n in items))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Old data, a workdir trained on it, and new data: 20 of 50 users have gone on, 10 are new; items 31 to 34 are new and come first."""
    folder = tmp_path_factory.mktemp("continual")
    random, old = np.random.default_rng(0), {}
    for user in range(50):
        old[user] = (random.integers(30) + np.cumsum(random.choice([1, 1, 5], random.integers(6, 14)))) % 30 + 1
    new = {u: np.append(row, random.integers(1, 35, 3)) if u < 20 else row for u, row in old.items()}
    new |= {100 + u: np.append(random.integers(1, 35, 5), 31 + u % 4) for u in range(10)}
    write(folder / "old", old, range(1, 31))
    write(folder / "new", new, [34, 33, 32, 31, *range(1, 31)])
    assert train(folder / "old", folder / "first") == 0
    return folder


def test_a_run_goes_on_and_tells_what_it_gained_and_lost(world, capsys):
    changes = {"start.path": world / "first", "start.replay": 0.25, "train.monitor_goal": "min"}  # so a step is kept that has moved
    assert train(world / "new", world / "second", **changes) == 0
    out = capsys.readouterr().out
    assert "going on from" in out
    assert "25% of the other windows come again" in out
    assert "new: 30 users with new events, old: 30 users without" in out
    figures = json.loads((world / "second" / "eval" / "continual.json").read_text())
    assert figures["users/new"] == figures["users/old"] == 30
    assert set(figures) >= {f"{row}/{group}/{m}@10" for row in ("before", "after") for group in continual.GROUPS for m in ("ndcg", "hr")}

    # Before: the old rows by id, zero for what is new; the old model itself ranks the old users' targets among the old items.
    first, second = model.load(world / "first"), model.load(world / "second")
    assert second.model.prepared.item_ids() != first.model.prepared.item_ids()
    difference = start.difference(second.model.prepared, first.model.prepared)
    # Other items stand beside them in the encoder's rows: the same texts up to the order of sums.
    old = difference.items >= 0
    np.testing.assert_allclose(second.model.table[old], first.model.table[difference.items[old]], rtol=1e-5, atol=1e-6)
    assert figures["change/old/ndcg@10"] != 0
    assert all(
        np.isclose(figures[f"change/{g}/hr@10"], figures[f"after/{g}/hr@10"] - figures[f"before/{g}/hr@10"]) for g in continual.GROUPS
    )
    rows = np.zeros((256, 8), np.float32)
    kept = np.flatnonzero(difference.items >= 0)
    rows[kept] = first.params["ids"]["embedding"][difference.items[kept]]
    params = {**first.params, "ids": {"embedding": rows}}
    eval_set = second.model.prepared.eval_set("test")
    before = continual.measure(second.model.rank(params, eval_set, name="test"), eval_set, difference)
    after = continual.measure(second.model.rank(second.params, eval_set, name="test"), eval_set, difference)
    for row, groups in (("before", before), ("after", after)):
        for group, values in groups.items():
            for name in ("ndcg@10", "hr@10"):
                np.testing.assert_allclose(figures[f"{row}/{group}/{name}"], values[name].mean(), rtol=1e-6)

    # Its encoder is that of the first one, which must still be what it was.
    noted = json.loads((world / "second" / "data.json").read_text())
    (world / "second" / "data.json").write_text(json.dumps(noted | {"start": "another"}))
    with pytest.raises(RecJaxError, match=r"second goes on from .*first, which has been trained again since"):
        model.load(world / "second")
    (world / "second" / "data.json").write_text(json.dumps(noted))

    # A third run would have the first one's words, and the encoder that the second one has, which is the first one's.
    c = config_lib.read_config(world / "second").unlock()
    c.start.path = str(world / "second")
    encoder, words = encoder_lib.load_encoder(c, second.model.prepared), vocabulary.tokenizer_of(c, second.model.prepared)
    of_first = encoder_lib.load_encoder(config_lib.read_config(world / "first"), first.model.prepared)
    assert encoder[1] == of_first[1]
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, encoder[0], of_first[0])))
    assert words == vocabulary.tokenizer_of(first.model.config, first.model.prepared)

    lines = [json.loads(line) for line in (world / "second" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "valid/ndcg@10" in line] == [0, 6, 12], "what it starts from is validated too"


def test_no_step_gives_the_towers_new_rows_and_leaves_them_as_they_are(world, tmp_path, capsys):
    """New items, one of which no event has, are ranked by their texts, new users by their histories."""
    write(tmp_path / "more", {}, [36, 35, 34, 33, 32, 31, *range(1, 31)])
    (tmp_path / "more" / "events.txt").write_text((world / "new" / "events.txt").read_text())
    changes = {"start.path": world / "first", "train.duration": "0 steps", "data.filter.unseen_items": True}
    assert train(tmp_path / "more", tmp_path / "w", **changes) == 0
    assert "new: 6 items, 10 users" in (out := capsys.readouterr().out)
    assert "nothing is trained" in out
    first, now = model.load(world / "first"), model.load(tmp_path / "w")
    ids = now.model.prepared.item_ids()
    assert set(ids) == {str(n) for n in range(1, 37)}
    rows = [first.model.prepared.item_ids().index(i) if i in first.model.prepared.item_ids() else -1 for i in ids]
    for row, old in enumerate(rows):
        wanted = first.params["ids"]["embedding"][old] if old >= 0 else np.zeros(8)
        np.testing.assert_array_equal(now.params["ids"]["embedding"][row], wanted)
    jax.tree.map(np.testing.assert_array_equal, now.params["user"], first.params["user"])
    figures = json.loads((tmp_path / "w" / "eval" / "test.json").read_text())
    assert figures["test/ndcg@10"] > 0
    assert train(tmp_path / "more", tmp_path / "w", **changes) == 0, "the same command finds it done"
    assert "done at step 0" in capsys.readouterr().out
    # The old data with more items: nothing is new in its events.
    (tmp_path / "more" / "events.txt").write_text((world / "old" / "events.txt").read_text())
    flags = TINY | {"data.path": f"{tmp_path}/more/events.txt", "data.items": f"{tmp_path}/more/items.tsv", **changes}
    c = config_lib.load("configs/sequences.py", [(k, str(v)) for k, v in flags.items()])
    command._Run(c, epath.Path(tmp_path / "again"), tiny.one_device(), chain.Stages(epath.Path(tmp_path / "again"), (), None))
    assert "new: 6 items, 0 users, 0 train events; nothing is trained" in capsys.readouterr().out


def test_no_step_in_no_unit_is_an_error(world, tmp_path):
    with pytest.raises(RecJaxError, match=r"train.duration='0 laps': expected a number and one of"):
        train(world / "new", tmp_path / "w", **{"start.path": world / "first", "train.duration": "0 laps"})


@pytest.mark.parametrize(
    ("duration", "none"), [("0 steps", True), ("0.0 epochs", True), ("0.5 epochs", False), ("10 steps", False), ("auto", False)]
)
def test_what_trains_nothing(duration, none):
    assert stages.untrained(tiny.config(**{"train.duration": duration})) == none


def test_no_step_without_a_start_is_an_error(world, tmp_path):
    with pytest.raises(RecJaxError, match=r"train.duration='0 steps' is no step at all: only a run that goes on from another"):
        train(world / "new", tmp_path / "w", **{"train.duration": "0 steps"})


def test_the_old_data_is_asked_for_by_name(world, tmp_path, monkeypatch):
    c = going_on(world)
    assert start.start_of(c).prepared.n_users == 50
    monkeypatch.setattr(start, "kept", lambda workdir: {"folder": f"{tmp_path}/gone", "fingerprint": "0"})
    with pytest.raises(RecJaxError, match=r"gone, the prepared data that .*first was trained on, is not there.*bring back"):
        start.start_of(c).prepared  # noqa: B018
    monkeypatch.setattr(start, "kept", lambda workdir: {})
    with pytest.raises(RecJaxError, match=r"does not say what it was trained on .*run its own training command once more"):
        start.start_of(c).prepared  # noqa: B018


def test_other_data_needs_another_workdir(world):
    with pytest.raises(RecJaxError, match=r"first is trained on .*use another --workdir, and --config.start.path="):
        start.check_kept(epath.Path(world / "first"), prepared_of(world / "other", OLD), start="")
    with pytest.raises(RecJaxError, match="went on from a workdir that has been trained again since"):
        start.check_kept(epath.Path(world / "first"), start.start_of(going_on(world)).prepared, start="another")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"start.replay": 1.5}, r"start.replay=1.5: must be between 0 .* and 1"),
        ({"start.path": "", "start.replay": 0.5}, "set config.start.path"),
        ({"start.path": "nowhere"}, "nowhere is no workdir"),
        ({"start.stage": "late"}, "config.start.stage: .* has no stage 'late'; it has none"),
        ({"towers.text.layers": 0}, "the first stage makes a student"),
        ({"towers.text.pooling": "cls"}, "towers.text.pooling is 'mean' in .*first and 'cls' here"),
        ({"towers.text.scratch.width": 32}, "towers.text.scratch is .*'width': 16.* in .*first and .*'width': 32"),
        ({"towers.dim": 16}, r"ids/embedding is \(256, 8\) in .*first"),
        ({"batch.kind": "texts", "towers.text.source": "tokens"}, "the first stage '' is of texts"),
    ],
)
def test_what_cannot_go_on_is_said_before_anything_is_written(world, tmp_path, changes, message):
    with pytest.raises(RecJaxError, match=message):
        train(world / "new", tmp_path / "w", **{"start.path": world / "first", **changes})
    assert not (tmp_path / "w").exists()


def test_nothing_new_is_said_before_anything_is_written(world, tmp_path):
    with pytest.raises(RecJaxError, match="no window predicts an event that the old workdir was not trained on"):
        train(world / "old", tmp_path / "w", **{"start.path": world / "first", "start.replay": 0.0})
    assert not (tmp_path / "w").exists()


def test_another_start_is_another_fingerprint(world, tmp_path, monkeypatch):
    marks = []
    for n, mark in enumerate(("one", "one", "two")):
        monkeypatch.setattr(command, "mark_of", lambda folder, mark=mark: mark)
        flags = TINY | {"data.path": f"{world}/new/events.txt", "data.items": f"{world}/new/items.tsv", "start.path": world / "first"}
        c = config_lib.load("configs/sequences.py", [(k, str(v)) for k, v in flags.items()])
        workdir = epath.Path(tmp_path / str(n))
        run = command._Run(c, workdir, tiny.one_device(), chain.Stages(workdir, (), None))
        marks.append(run.planned[0][2])
    assert marks[0] == marks[1] != marks[2]


def test_a_fingerprint_without_a_start_is_what_it_was():
    kept = json.loads(config_lib.to_json(tiny.config()))
    for key in ("start", "mesh", *chain.FREE_KEYS[1:]):
        *groups, name = key.split(".")
        (config_lib.get(kept, ".".join(groups)) if groups else kept).pop(name)
    for key in (*FEATURE_KEYS, *USER_KEYS, *chain.OFF_KEYS):
        *groups, name = key.split(".")
        config_lib.get(kept, ".".join(groups)).pop(name)
    expected = hashlib.sha256(json.dumps([kept, "data"], sort_keys=True).encode()).hexdigest()[:16]
    assert chain.fingerprint(tiny.config(), "data") == expected
    assert chain.fingerprint(tiny.config(**{"start.path": "runs/first"}), "data") != expected
    assert chain.fingerprint(tiny.config(**{"data.features.numeric": ("price",)}), "data") != expected
