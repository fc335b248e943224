"""Times and ratings of events on their way: records -> windows -> batches -> towers, and the same in evaluation; what may be asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny
from etils import epath

from rec_jax import config as config_lib
from rec_jax import config_places
from rec_jax import mesh as mesh_lib
from rec_jax.data import places, prepare, start
from rec_jax.data.packing import texts_per_row
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.eval import model as model_lib
from rec_jax.eval import rankings
from rec_jax.towers import batches as batches_lib
from rec_jax.towers import history, two_tower
from rec_jax.train import chain, loop, stages
from rec_jax.types import EvalSet, Ragged, RecJaxError

World = tiny.TimedWorld
EDGES = (1.0, 2.0, 3.0, 4.0, 5.0)
ON = {
    "towers.user.layers": 2,  # the first half of them sees its own session
    "towers.user.layer": "hstu",
    "towers.user.positions": "relative",
    "towers.user.inputs": ("gap", "rating"),
    "towers.user.rating_edges": EDGES,
    "towers.user.time_bias": True,
    "towers.user.session_gap": 3600,
}


def towers_of(c):
    k, ratings = texts_per_row(c.batch.row_tokens), places.rating_edges(c, World())
    return two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=k, n_items=tiny.N_ITEMS, ratings=ratings)


def batches_of(c):
    world = World()
    return Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=c.seed, texts=tiny.tokens())


def task_of(c, folder, mesh=None):
    inputs = stages.Inputs(World(), tiny.tokens(), towers_of(c), None, tiny.table())
    evaluate = lambda params, *, step: {"valid/ndcg@10": 0.0}
    return stages.make_task(c, "", epath.Path(folder), inputs, batches_of(c), mesh or tiny.one_device(), evaluate)


def moved(params):
    """Tables that begin at zero count."""
    random = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(x) + 0.3 * random.normal(size=x.shape).astype(np.float32), params)


# -- in the data --


@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_times_and_ratings_of_a_batch_are_those_of_its_events(drop):
    batch = next(iter(batches_of(tiny.config(**{**ON, "batch.drop_events": drop}))))
    assert batch.history_times.dtype == np.int32
    assert batch.history_ratings.dtype == np.float32
    padding = batch.history_segments == 0
    assert (batch.history_times[padding] == -1).all()
    assert np.isnan(batch.history_ratings[padding]).all()
    records, skipped = World().source(), 0
    for g in range(8):
        number = 0
        for row in range(batch.history.shape[1]):
            for segment in range(1, int(batch.history_segments[g, row].max(initial=0)) + 1):
                here = batch.history_segments[g, row] == segment
                items = batch.item_ids[g][batch.history[g, row, here]].tolist()
                times, ratings = batch.history_times[g, row, here], batch.history_ratings[g, row, here]
                users = batch.examples[g][batch.examples[g] >= 0]
                found = [e for e in (events_of(records[u], items, times, ratings) for u in users) if e is not None]
                assert found, "items, times and ratings are of the same events of a user"
                skipped += sum(np.diff(found[0]) > 1)
                number += 1
        assert number == (batch.examples[g] >= 0).sum()
    assert (skipped > 0) == (drop > 0)


def events_of(record, items, times, ratings):
    """Places of the record's events that have these items, times since the first and ratings; None where it has no such."""
    for first in np.flatnonzero(record["items"] == items[0]):
        at = np.searchsorted(record["times"], record["times"][first] + times)
        if at.max() < len(record["items"]) and record["items"][at].tolist() == items and (record["ratings"][at] == ratings).all():
            return at
    return None


def test_off_there_are_no_columns_and_the_same_batches():
    off, on = next(iter(batches_of(tiny.config()))), next(iter(batches_of(tiny.config(**ON))))
    assert off.history_times is None
    assert off.history_ratings is None
    jax.tree.map(np.testing.assert_array_equal, off, dataclasses.replace(on, history_times=None, history_ratings=None))
    gap_alone = next(iter(batches_of(tiny.config(**{"towers.user.inputs": ("gap",)}))))
    assert gap_alone.history_ratings is None
    np.testing.assert_array_equal(gap_alone.history_times, on.history_times)


def test_times_of_places_are_seconds_since_the_first_and_never_too_long():
    found = places.of_places({"times": np.asarray([10**12, 10**12 + 7, 2 * 10**12]), "ratings": np.asarray([1, 2, 3])})
    assert found["times"].tolist() == [0, 7, 2**31 - 1]
    assert found["times"].dtype == np.int32
    assert found["ratings"].dtype == np.float32
    assert places.of_places({"times": np.zeros(0, np.int64)})["times"].shape == (0,)


def test_times_that_go_back_are_a_fault_of_the_program_and_no_zero():
    with pytest.raises(AssertionError, match="not in time order"):
        places.of_places({"times": np.asarray([5, 4, 9])})
    two = places.of_places({"times": np.asarray([5, 9, 1, 2])}, np.asarray([0, 0, 2, 2]))  # windows of two users
    assert two["times"].tolist() == [0, 4, 0, 1]


def test_rows_are_taken_with_their_columns():
    whole = Ragged.from_rows([[1, 2, 3], [], [4], [5, 6]])
    whole = dataclasses.replace(whole, columns={"times": whole.flat * 10})
    some = whole.take(np.asarray([3, 0, 1]))
    assert [row.tolist() for row in some] == [[5, 6], [1, 2, 3], []]
    assert some.columns["times"].tolist() == [50, 60, 10, 20, 30]
    shorter = whole.take(np.arange(4), without_last=1)
    assert [row.tolist() for row in shorter] == [[1, 2], [], [], [5]]
    assert shorter.columns["times"].tolist() == [10, 20, 50]


# -- prepared data --


@pytest.fixture
def stars(tmp_path):
    """A config of a small file with times and ratings of 1.5 to 4.5."""
    random = np.random.default_rng(0)
    rows = [
        (f"u{u}", f"i{i}", 100 * n + u, 0.5 + int(random.integers(1, 5))) for u in range(12) for n, i in enumerate(random.permutation(9))
    ]
    pl.DataFrame(rows, schema=["who", "what", "when", "stars"], orient="row").write_csv(tmp_path / "events.csv")
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = "table", str(tmp_path / "events.csv"), str(tmp_path / "cache")
    c.data.columns.update({"user": "who", "item": "what", "time": "when", "rating": "stars"})
    c.towers.user.inputs = ("gap", "rating")
    return c


def test_histories_of_prepared_data_come_with_their_columns(stars):
    prepared = prepare.prepare(stars)
    records, test = prepared.source(), prepared.eval_set("test")
    assert set(test.history.columns) == {"times", "ratings"}
    train = prepared.train_histories()
    for n, user in enumerate(test.users):
        record, row = records[int(user)], slice(*test.history.offsets[n : n + 2])
        for name in ("times", "ratings"):
            np.testing.assert_array_equal(test.history.columns[name][row], record[name][:-1])
            of_train = train.columns[name][train.offsets[user] : train.offsets[user + 1]]
            np.testing.assert_array_equal(of_train, record[name][record["splits"] == 0])
    assert places.rating_edges(stars, prepared) == (1.5, 2.5, 3.5, 4.5)
    stars.towers.user.rating_edges = (2.0, 3.0)
    assert places.rating_edges(stars, prepared) == (2.0, 3.0)
    stars.towers.user.inputs, stars.towers.user.rating_edges = (), ()
    assert prepare.prepare(stars).eval_set("test").history.columns == {}
    assert places.rating_edges(stars, prepared) == ()
    # A stage of its own that reads them is enough.
    stars.stages, stars.stage = ("first", "second"), {"first": {}, "second": {"towers": {"user": {"time_bias": True}}}}
    assert prepare.prepare(stars).columns == ("times",)


def test_many_ratings_are_told_apart_by_quantiles(stars):
    class Watched:
        def train_histories(self):
            seconds = np.random.default_rng(0).exponential(1000, 5000).astype(np.float32)
            return Ragged(np.zeros(5000, np.int32), np.asarray([0, 5000]), {"ratings": seconds})

    edges = places.rating_edges(stars, Watched())
    rows = np.searchsorted(edges, Watched().train_histories().columns["ratings"], side="right")
    assert np.bincount(rows)[0] == 0
    assert (np.abs(np.bincount(rows)[1:] - 5000 / 16) < 2).all()
    Watched.train_histories = lambda self: Ragged(np.zeros(3, np.int32), np.asarray([0, 3]), {"ratings": np.ones(3, np.float32)})
    with pytest.raises(RecJaxError, match=r"names 'rating', and all ratings of .* are 1: leave it out"):
        places.rating_edges(stars, Watched())


def test_times_that_the_data_does_not_have(stars, tmp_path):
    (tmp_path / "order.txt").write_text("".join(f"{u} 1 2 3 4\n" for u in range(1, 5)))
    stars.data.reader, stars.data.path = "sequences", str(tmp_path / "order.txt")
    message = r"config.towers.user.inputs=\('gap', 'rating'\).*read times of events, and config.data.path='.*order.txt'"
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(stars)
    stars.towers.user.inputs, stars.towers.user.session_gap = (), 60
    with pytest.raises(RecJaxError, match=r"session_gap=60, or those of a stage, read times of events"):
        prepare.prepare(stars)
    stars.towers.user.session_gap = 0
    assert prepare.prepare(stars).n_users == 4


def test_going_on_where_ratings_fall_into_other_ranges(stars, tmp_path):
    old = prepare.prepare(stars)
    begun = start.Start(epath.Path(tmp_path), stars, None, stars)
    begun.__dict__["prepared"] = prepare.open_prepared(old.folder)
    start.check_ratings(begun, stars, old)
    other = stars.copy_and_resolve_references()
    other.towers.user.rating_edges = (1.0, 2.0)
    with pytest.raises(RecJaxError, match=r"set config.towers.user.rating_edges=\(1.5, 2.5, 3.5, 4.5\)"):
        start.check_ratings(begun, other, old)


# -- through the towers --


def test_training_with_everything_on_learns_on_one_device_and_on_eight(tmp_path):
    c = tiny.config(**{**ON, "towers.user.dropout": 0.1})
    task = task_of(c, tmp_path)
    gradient = tiny.gradient_of_one_device_and_eight(dataclasses.replace(task, params=moved(task.params)))
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradient["user"]))
    names = {mesh_lib.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(gradient["user"])}
    assert {"gap/embedding", "rating/embedding", "layer_1/time/bias", "layer_1/distance/bias", "layer_1/uvqk/kernel"} <= names
    mesh = mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    mesh_lib.shardings(task.params, mesh_lib.rules_of("sharded", ()), mesh)
    progress = loop.train(task, tiny.one_device())
    assert progress.end(task.loop.total) == task.loop.total
    rows = [line for line in (tmp_path / "metrics.jsonl").read_text().splitlines() if "train/loss" in line]
    losses = [float(line.split('"train/loss": ')[1].split(",")[0].rstrip("}")) for line in rows]
    assert losses[-1] < losses[0]


def test_vectors_for_ranking_are_those_of_training():
    c = tiny.config(**{**ON, "batch.history_length": 32, "eval.users_per_block": 8})
    spec, batch = towers_of(c), next(iter(batches_of(c)))
    params = moved(two_tower.init(jax.random.key(0), spec))
    out = jax.jit(batches_lib.encode_batch, static_argnames=("spec", "catalogue"))(
        params, spec, batch, table=tiny.table(), catalogue=True, keys=None
    )
    users = [int(u) for u in batch.examples[0] if u >= 0]
    world = World()
    train = world.train_histories()
    histories = train.take(np.asarray(users), without_last=1)  # the last event of a window is a target alone
    model = model_lib.Model(c, world, tiny.tokens(), spec, tiny.table())
    found = model.user_vectors(params, np.asarray(out.catalogue), histories)
    at = []
    for n in range(len(users)):
        ids = histories[n].tolist()
        for row in range(batch.history.shape[1]):
            for segment in range(1, int(batch.history_segments[0, row].max()) + 1):
                here = np.flatnonzero(batch.history_segments[0, row] == segment)
                if batch.item_ids[0][batch.history[0, row, here]].tolist() == ids:
                    at.append((n, row * 32 + here[-1]))
    assert {n for n, _ in at} == set(range(len(users)))
    for n, place in at:
        np.testing.assert_allclose(found[n], out.user[0][place], atol=2e-5)
    # Without columns, as a person's titles come, they are unknown, and the vectors others.
    bare = dataclasses.replace(histories, columns={})
    assert np.abs(model.user_vectors(params, np.asarray(out.catalogue), bare) - found).max() > 1e-3
    targets = Ragged.from_rows([[0]] * len(users))
    with pytest.raises(RecJaxError, match=r"reads ratings of events .* and the histories of 'test' come without"):
        model.rank(params, EvalSet(np.arange(len(users)), bare, targets, tiny.N_ITEMS), name="test", items=np.asarray(out.catalogue))
    # The scorer that ranks beside a baseline gets blocks of histories, with their columns.
    whole = EvalSet(np.arange(len(users)), histories, targets, tiny.N_ITEMS)
    scorer = model.scorer(params, np.asarray(out.catalogue))
    by_scores = rankings.evaluate_scores(scorer, whole, ks=(5,), users_per_block=8)
    by_vectors = rankings.evaluate_vectors(found, out.catalogue, whole, ks=(5,), users_per_block=8)
    np.testing.assert_array_equal(by_scores.ranks, by_vectors.ranks)


def test_a_batch_without_what_the_tower_reads():
    spec, batch = towers_of(tiny.config(**ON)), next(iter(batches_of(tiny.config())))
    params = two_tower.init(jax.random.key(0), spec)
    with pytest.raises(RecJaxError, match=r"the history tower reads ratings of events, and the batch has none"):
        jax.eval_shape(lambda p: batches_lib.encode_batch(p, spec, batch, table=tiny.table(), catalogue=False, keys=None), params)


# -- configs --


def test_off_is_what_the_defaults_say_and_no_part_of_a_fingerprint():
    user = config_lib.defaults().towers.user
    assert {key: user[key] for key in config_places.OFF} == config_places.OFF
    of_two = {"towers.user.layers": 2}
    marks = {chain.fingerprint(tiny.config(**of_two), "data")}
    for key, value in ON.items():
        more = {"towers.user.inputs": ("rating",)} if key == "towers.user.rating_edges" else {}
        marks.add(chain.fingerprint(tiny.config(**{**of_two, **more, key: value}), "data"))
    assert len(marks) == len(ON)  # one of them is `of_two`


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"towers.user.layer": "gru"}, r"config.towers.user.layer='gru': expected one of attention, hstu"),
        ({"towers.user.positions": "alibi"}, r"config.towers.user.positions='alibi': expected one of learned, rotary"),
        ({"towers.user.inputs": ("gap", "price")}, r"config.towers.user.inputs=\('gap', 'price'\): expected some of gap, rating"),
        ({"towers.user.inputs": ("gap", "gap")}, r"each once"),
        ({"towers.user.positions": "rotary", "towers.dim": 6}, r"config.towers.dim=6 / config.towers.user.heads=2 .*: make that even"),
        ({"towers.user.session_gap": -1}, r"config.towers.user.session_gap=-1: must be at least 0 seconds"),
        ({"towers.user.session_gap": 60, "towers.user.layers": 1}, r"config.towers.user.layers=1 has no half: set it to 2 or more"),
        ({"towers.user.rating_edges": (1.0,)}, r"is about ratings, which config.towers.user.inputs=\(\) does not name"),
        ({"towers.user.inputs": ("rating",), "towers.user.rating_edges": (2.0, 1.0)}, r"each above the one before"),
        ({"towers.user.time_bias": True, "objectives.history_views.weight": 0.1}, r"makes views of histories without times"),
        ({"towers.user.max_positions": 8}, r"histories of 16 places need config.towers.user.max_positions=8"),
    ],
)
def test_keys_that_do_not_go_together(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)


def test_positions_that_are_not_learned_have_no_longest_history():
    for positions in ("rotary", "relative", "none"):
        c = tiny.config(**{"towers.user.positions": positions, "towers.user.max_positions": 8})
        spec = towers_of(c).history
        run = jax.jit(lambda s=spec: history.encode(history.init(jax.random.key(0), s), s, jnp.ones((1, 16, 8)), jnp.ones((1, 16), int)))
        assert np.isfinite(run()).all()
