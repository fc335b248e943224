"""Features of events, like their kind: read and coded, with their events in batches and towers, trained, measured again, gone on from."""

import dataclasses
import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny
from etils import epath

from rec_jax import config as config_lib
from rec_jax import mesh as mesh_lib
from rec_jax.data import describe, event_features, identity, places, prepare, readers, records
from rec_jax.data.packing import texts_per_row
from rec_jax.data.pipeline import Batches, BatchSpec
from rec_jax.eval import final, model, teacher
from rec_jax.serve.recommend import Recommender
from rec_jax.towers import batches as batches_lib
from rec_jax.towers import history, two_tower
from rec_jax.train import __main__ as command
from rec_jax.train import carry, chain, stages
from rec_jax.types import Ragged, RecJaxError

KINDS = ("view", "cart", "buy")
ON = {"data.event_features": ("kind",), "towers.user.inputs": ("kind",)}

# -- prepared data --


def rows(n_users=12, n_events=9, seed=0, kinds=KINDS):
    """(who, what, when, stars, kind, device) of events in any order; the last event of users 0 to 2 is of a kind that no other is of."""
    random = np.random.default_rng(seed)
    out = []
    for u in range(n_users):
        for n, i in enumerate(random.integers(0, 15, n_events)):
            kind = "gift" if n == n_events - 1 and u < 3 else str(random.choice(kinds))
            out.append((f"u{u}", f"i{i}", 100 * n + u, float(random.integers(1, 6)), kind, int(random.integers(7, 10))))
    return [out[n] for n in random.permutation(len(out))]


def write(path, events):
    frame = pl.DataFrame(events, schema=["who", "what", "when", "stars", "kind", "device"], orient="row")
    path.parent.mkdir(exist_ok=True)
    (frame.write_parquet if path.name.endswith(".parquet") else frame.write_csv)(path)
    return path


def config_of(path, **changes):
    c = config_lib.defaults()
    c.data.reader, c.data.path, c.data.cache = "table", str(path), str(path.parent / "cache")
    c.data.columns.update({"user": "who", "item": "what", "time": "when", "rating": "stars"})
    c.data.on_bad.duplicate_event = "keep"
    c.data.event_features = ("kind", "device")
    c.towers.user.inputs = ("gap", "rating", "kind", "device")
    for key, value in changes.items():
        group, _, name = key.rpartition(".")
        config_lib.get(c, group)[name] = value
    config_lib.check(c)
    return c


@pytest.mark.parametrize("name", ["events.csv", "events.parquet"])
def test_numbers_are_those_of_a_loop_over_the_events(tmp_path, name):
    events = rows()
    for n in (5, 40, 60, 77):  # of which it is not known
        who, what, when, stars, _, device = events[n]
        events[n] = (who, what, when, stars, " " if n == 5 else None, device)
    prepared = prepare.prepare(config_of(write(tmp_path / name, events)))
    assert prepared.columns == ("event_device", "event_kind", "ratings", "times")
    train, histories = set(), {}
    for who, _, when, stars, kind, device in sorted(events, key=lambda e: e[2]):
        histories.setdefault(who, []).append(((kind or "").strip(), str(device), stars, when))
    for history_ in histories.values():
        train |= {(0, kind) for kind, *_ in history_[:-2]} | {(1, device) for _, device, *_ in history_[:-2]}
    numbers = [{c: n for n, c in enumerate(sorted(c for k, c in train if k == kind and c), start=1)} for kind in (0, 1)]
    assert list(numbers[0]) == ["buy", "cart", "view"]
    source, test, of_train = prepared.source(), prepared.eval_set("test"), prepared.train_histories()
    for row, who in enumerate(prepared.users()["user"].to_list()):
        expected = {"ratings": [e[2] for e in histories[who]], "times": [e[3] for e in histories[who]]}
        expected |= {"event_kind": [numbers[0].get(e[0], 0) for e in histories[who]]}
        expected |= {"event_device": [numbers[1].get(e[1], 0) for e in histories[who]]}
        known = slice(*test.history.offsets[row : row + 2])
        for column, values in expected.items():
            np.testing.assert_array_equal(source[row][column], values)
            np.testing.assert_array_equal(test.history.columns[column][known], values[:-1])
            np.testing.assert_array_equal(of_train.columns[column][slice(*of_train.offsets[row : row + 2])], values[:-2])
    assert source[0]["event_kind"].dtype == np.int32
    last = [histories[who][-1][0] for who in ("u0", "u1", "u2")]
    assert last == ["gift"] * 3
    found = prepared.meta["event_features"]
    assert found["kind"] == {"categories": ["buy", "cart", "view"], "missing": 4, "unseen": 3}
    assert prepared.meta["bad_input"]["missing_feature"]["count"] == 4
    (section,) = [s for s in describe._features(prepared) if s.heading == "Features of events"]
    assert ["kind", "3", "4", "3"] in section.rows
    c = config_of(tmp_path / name)
    assert places.event_rows(c, prepared) == {"kind": 4, "device": 4}
    spec = model.towers_of(c, prepared, tiny.bert_spec()).history
    assert spec.events == (("kind", 4), ("device", 4))
    assert set(spec.columns) == set(prepared.columns)


def test_an_event_without_a_kind_may_be_an_error(tmp_path):
    events = rows()
    events[3] = (*events[3][:4], "", events[3][5])
    path = write(tmp_path / "events.csv", events)
    with pytest.raises(RecJaxError, match=r"events.csv:5: column kind of an event is empty.*on_bad.missing_feature='skip'"):
        prepare.prepare(config_of(path, **{"data.on_bad.missing_feature": "error"}))


def test_off_prepared_data_and_stages_are_what_they_were(tmp_path):
    path = write(tmp_path / "events.csv", rows())
    off = config_of(path, **{"data.event_features": (), "towers.user.inputs": ("gap", "rating")})
    settings = identity.settings_of(off)
    assert "event_features" not in settings
    assert "missing_feature" not in settings["on_bad"]
    assert "missing_feature" in identity.settings_of(config_of(path))["on_bad"]
    prepared = prepare.prepare(off)
    assert set(prepared.source()[0]) == {"user", *records.COLUMNS}
    assert event_features.META not in prepared.meta
    assert prepare.fingerprint_of(off) != prepare.fingerprint_of(config_of(path))
    marks = [chain.fingerprint(tiny.config(**changes), "data") for changes in ({}, {"data.event_features": ()}, ON)]
    assert marks[0] == marks[1] != marks[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.event_features": ("kind", "shop")}, r"no column 'shop'"),
        ({"data.event_features": ("kind", "what")}, r"event_features='what' is also config.data.columns.item; each role needs its own"),
        ({"data.event_features": ("kind", "price")}, r"column price is Float64; features of events are categories: text or whole numbers"),
        ({"data.event_features": ("kind", "empty")}, r"event_features names 'empty', which has no value in any train event; leave it out"),
    ],
)
def test_columns_that_are_no_features(tmp_path, change, message):
    path = write(tmp_path / "events.parquet", rows())
    pl.read_parquet(path).with_columns(price=pl.lit(1.5), empty=pl.lit("")).write_parquet(path)
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(config_of(path, **{"towers.user.inputs": ("kind",), **change}))


def test_other_readers_give_them_or_say_so(tmp_path):
    lines = [f"{u}\t{i}\t{10 * i + u}\t{'ab'[(u + i) % 2]}" for u in range(4) for i in range(5)]
    (tmp_path / "x.inter").write_text("\n".join(["user_id:token\titem_id:token\ttimestamp:float\tkind:token", *lines]) + "\n")
    c = config_of(tmp_path / "x.inter", **{"data.reader": "recbole", "data.event_features": ("kind",), "towers.user.inputs": ("kind",)})
    prepared = prepare.prepare(c)
    for user, record in enumerate(prepared.source()):
        assert record["event_kind"].tolist() == [1 + (user + i) % 2 for i in range(5)]
    for absent in ("shop", "timestamp"):
        c.data.event_features = (absent,)
        with pytest.raises(RecJaxError, match=rf"names '{absent}', which config.data.reader='recbole' does not find among the columns"):
            prepare.prepare(c)
    c.data.event_features = ("kind",)
    (tmp_path / "order.txt").write_text("".join(f"{u} 1 2 3 4\n" for u in range(1, 5)))
    c.data.reader, c.data.path = "sequences", str(tmp_path / "order.txt")
    with pytest.raises(RecJaxError, match=r"config.data.reader='sequences' does not find .* table and recbole take any column"):
        prepare.prepare(c)


def test_events_that_are_impressions_have_them_too(tmp_path):
    path = write(tmp_path / "events.csv", rows())
    frame = pl.read_csv(path).with_columns(clicked=pl.col("stars") > 2).with_columns(pl.col("clicked").cast(pl.Int8))
    frame.write_csv(path)
    c = config_of(path)
    c.data.impressions.split, c.data.columns.labels, c.data.columns.context = "random", ("clicked",), ()
    found = readers.read(c.data)
    expected = frame.filter(pl.col("clicked") == 1)
    assert found.events["event_kind"].to_list() == expected["kind"].to_list()
    assert found.events["event_device"].to_list() == [str(device) for device in expected["device"]]
    assert not [column for column in found.impressions.frame.columns if column.startswith("event_")]


# -- batches --


class World(tiny.World):
    """The tiny world with a category of its own for each event of a user, the same that another user's event of that place has."""

    def __init__(self):
        super().__init__()
        for record in self._records:
            record["event_kind"] = np.arange(1, len(record["items"]) + 1, dtype=np.int32)

    def train_histories(self) -> Ragged:
        kinds = np.concatenate([record["event_kind"][record["splits"] == 0] for record in self._records])
        return dataclasses.replace(super().train_histories(), columns={"event_kind": kinds})


def first_batch(c, *, disk=False):
    world = World()
    source = world.source() if disk else world.train_histories()
    return next(iter(Batches(source, world.train_lengths(), BatchSpec.from_config(c), seed=c.seed, texts=tiny.tokens())))


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("changes", [{}, {"batch.drop_events": 0.4}, {"batch.shuffle_events": True, "towers.user.positions": "none"}])
def test_places_of_a_batch_have_the_kinds_of_their_events(changes, disk):
    batch, records_ = first_batch(tiny.config(**ON, **changes), disk=disk), World().source()
    kinds, order = batch.history_events["event_kind"], []
    assert kinds.dtype == np.int32
    assert (kinds[batch.history_segments == 0] == 0).all()
    for g, row in itertools.product(range(8), range(batch.history.shape[1])):
        for segment in range(1, int(batch.history_segments[g, row].max(initial=0)) + 1):
            here = batch.history_segments[g, row] == segment
            items, of = batch.item_ids[g][batch.history[g, row, here]].tolist(), kinds[g, row, here] - 1
            users = [u for u in batch.examples[g] if u >= 0 and of.max() < len(records_[u]["items"])]
            assert any(records_[u]["items"][of].tolist() == items for u in users), "items and kinds are of the same events of a user"
            order += np.diff(of).tolist()
    assert (max(order) > 1) == bool(changes)
    assert (min(order) < 0) == ("batch.shuffle_events" in changes)


def test_off_there_are_no_columns_and_the_same_batches():
    off, on = first_batch(tiny.config()), first_batch(tiny.config(**ON))
    assert off.history_events is None
    jax.tree.map(np.testing.assert_array_equal, off, dataclasses.replace(on, history_events=None))


# -- towers --

SPEC = history.HistorySpec(8, 1, 2, 16, 0.0, 32, mask=True, inputs=("rating", "kind"), ratings=(1.0, 3.0), events=(("kind", 4),))
PLAIN = dataclasses.replace(SPEC, inputs=("rating",), events=())
encode = jax.jit(history.encode, static_argnames="spec")


def known(length=12):
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(1, length, 8)) * 8**-0.5).astype(np.float32)
    ratings, kinds = random.integers(0, 6, (1, length)).astype(np.float32), random.integers(1, 4, (1, length)).astype(np.int32)
    segments = np.asarray([[1] * 5 + [2] * 4 + [0] * (length - 9)], np.int32)
    return {"vectors": vectors, "segment_ids": segments, "ratings": ratings}, kinds


def test_a_kind_moves_its_own_place_and_later_ones_of_its_history():
    params = history.init(jax.random.key(0), SPEC)
    inputs, kinds = known()
    run = lambda kinds, **more: np.asarray(encode(params, SPEC, **inputs, events={"event_kind": jnp.asarray(kinds)}, **more))
    plain = {name: part for name, part in params.items() if name != "event_kind"}
    assert params["event_kind"]["embedding"].shape == (4, 8)
    np.testing.assert_array_equal(run(kinds), encode(plain, PLAIN, **inputs))  # tables begin at zero
    moved = np.random.default_rng(1).normal(size=(4, 8)).astype(np.float32)
    params = {**params, "event_kind": {"embedding": moved}}
    before = run(kinds)
    for place, (first, end) in {2: (0, 5), 6: (5, 9)}.items():
        other = kinds.copy()
        other[0, place] = kinds[0, place] % 3 + 1
        distance = np.abs(run(other) - before).max(-1)[0]
        assert (distance[place:end] > 1e-4).all()
        distance[place:end] = 0
        assert (distance == 0).all(), f"neither places before {place} nor other users', {first}"
    # The place's vector is what it is with the row of its kind added, and ratings count beside it.
    vectors = np.linalg.solve(np.asarray(params["in"]["kernel"]).T, moved[kinds[0]].T).T / 8**0.5
    shifted = {**inputs, "vectors": inputs["vectors"] + vectors[None]}
    np.testing.assert_allclose(before, encode(plain, PLAIN, **shifted), atol=1e-4)
    # Unknown is row 0, and of a hidden place nothing is known.
    np.testing.assert_array_equal(run(np.zeros_like(kinds)), encode(params, SPEC, **inputs))
    hidden = np.zeros((1, 12), bool)
    hidden[0, 2] = True
    other = kinds.copy()
    other[0, 2] = kinds[0, 2] % 3 + 1
    np.testing.assert_array_equal(run(kinds, hidden=hidden), run(other, hidden=hidden))


def towers_of(c):
    k = texts_per_row(c.batch.row_tokens)
    return two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=k, n_items=tiny.N_ITEMS, events={"kind": 40})


def test_kinds_are_trained_alike_on_one_device_and_on_eight(tmp_path):
    c, world = tiny.config(**ON), World()
    batches = Batches(world.source(), world.train_lengths(), BatchSpec.from_config(c), seed=c.seed, texts=tiny.tokens())
    inputs = stages.Inputs(world, tiny.tokens(), towers_of(c), None, tiny.table())
    evaluate = lambda params, *, step: {"valid/ndcg@10": 0.0}
    task = stages.make_task(c, "", epath.Path(tmp_path), inputs, batches, tiny.one_device(), evaluate)
    gradient = tiny.gradient_of_one_device_and_eight(task)
    assert (np.abs(gradient["user"]["event_kind"]["embedding"]).max(1) > 0).sum() > 20


def test_vectors_for_ranking_are_those_of_batches():
    c = tiny.config(**ON, **{"batch.history_length": 32})
    spec = towers_of(c)
    params = two_tower.init(jax.random.key(0), spec)
    rule = mesh_lib.rules_of("sharded", ())
    mesh_lib.shardings(params, rule, mesh_lib.make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))  # every parameter has a rule
    params["user"]["event_kind"]["embedding"] = jax.random.normal(jax.random.key(1), (40, 8))
    batch = first_batch(c)
    made = jax.jit(batches_lib.encode_batch, static_argnames=("spec", "catalogue"))
    out = made(params, spec, batch, table=tiny.table(), catalogue=True, keys=None)
    user = int(batch.examples[0, 0])
    train = World().train_histories().take(np.asarray([user]), without_last=1)
    found = model.Model(c, World(), tiny.tokens(), spec, tiny.table()).user_vectors(params, np.asarray(out.catalogue), train)
    assert np.abs(np.asarray(out.user[0]) - found[0]).max(-1).min() < 2e-5
    with pytest.raises(RecJaxError, match="the history tower reads kind of events, and the batch has none"):
        jax.eval_shape(lambda p: made(p, spec, first_batch(tiny.config()), table=tiny.table(), catalogue=False, keys=None), params)


# -- from one workdir to another --


def test_rows_go_with_their_categories():
    metas = (
        {"event_features": {"kind": {"categories": c}, n: {"categories": c}}} for n, c in (("a", ["buy", "view"]), ("b", ["cart", "view"]))
    )
    found = event_features.rows_in(*metas)
    assert {name: rows_.tolist() for name, rows_ in found.items()} == {"event_kind": [0, -1, 2]}
    old = {"user": {"event_kind": {"embedding": np.arange(3.0)[:, None] + np.ones((3, 8), np.float32)}}}
    fresh = {"user": {"event_kind": {"embedding": np.zeros((3, 8), np.float32)}}}
    out = carry.laid_out(carry.Carried(old, found, "runs/old"), fresh)
    np.testing.assert_array_equal(out["user"]["event_kind"]["embedding"][:, 0], [1, 0, 3])
    with pytest.raises(RecJaxError, match=r"user/event_kind/embedding is absent in runs/old .* and \(3, 8\) in this run"):
        carry.laid_out(carry.Carried({"user": {}}, found, "runs/old"), fresh)


def test_a_teacher_that_numbers_kinds_otherwise_is_refused(monkeypatch, tmp_path):
    meta = lambda *kinds: {"event_features": {"kind": {"categories": list(kinds)}}}
    data = types.SimpleNamespace(n_items=tiny.N_ITEMS, meta=meta("buy", "view"))
    stub = types.SimpleNamespace(model=types.SimpleNamespace(prepared=data, spec=types.SimpleNamespace(history=SPEC)))
    monkeypatch.setattr(teacher, "load", lambda *_, **__: stub)
    monkeypatch.setattr(teacher, "read_config", lambda _: tiny.config())
    with pytest.raises(RecJaxError, match=r"the teacher .* and the student number the categories of 'kind' .* otherwise"):
        teacher.teacher_of(tiny.config(), tmp_path, "before", tiny.tokens(), print, meta=meta("cart", "view"))
    spec = teacher.towers_of_encoder(tiny.config(**ON), tiny.bert_spec())
    assert spec.history is None


def train(path, workdir, **changes):
    flags = tiny.EIGHT_STEPS | {"data.reader": "table", "data.path": path, "data.columns.user": "who", "data.columns.item": "what"}
    flags |= {
        "data.columns.time": "when",
        "data.columns.rating": "stars",
        "data.event_features": "('kind',)",
        "data.on_bad.empty_text": "keep",
    }
    flags |= {"towers.user.inputs": "('gap','rating','kind')", "eval.fuse": "", "eval.examples": "(('i3', 'i4'),)", **changes}
    return command.main(["--config=configs/sequences.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    assert train(write(folder / "old" / "events.csv", rows(40)), folder / "work") == 0
    return folder


def test_a_run_learns_kinds_and_is_measured_with_them(world):
    trained = model.load(world / "work", say=lambda _: None)
    table = np.asarray(trained.params["user"]["event_kind"]["embedding"])
    assert np.abs(table[1:]).max(1).all(), "each kind has moved"
    assert not table[0].any(), "no train event was without"
    test = trained.model.prepared.eval_set("test")
    kinds = test.history.columns["event_kind"]
    assert set(kinds.tolist()) == {1, 2, 3}
    vectors = lambda columns: trained.model.user_vectors(trained.params, trained.items, dataclasses.replace(test.history, columns=columns))
    whole = vectors(test.history.columns)
    without = vectors({name: column for name, column in test.history.columns.items() if name != "event_kind"})
    assert (np.abs(whole - without).max(1) > 1e-5).all()
    np.testing.assert_array_equal(without, vectors({**test.history.columns, "event_kind": np.zeros_like(kinds)}))
    assert len(Recommender(trained).recommend(["i3", "i4"], k=5)) == 5
    before = (world / "work" / "eval" / "test.json").read_bytes()
    final.run(world / "work", say=lambda _: None)
    assert (world / "work" / "eval" / "test.json").read_bytes() == before


def test_a_run_goes_on_where_a_new_kind_comes_first(world):
    events = [*rows(40), *((f"n{u}", f"i{n}", 10**4 + n, 3.0, "add" if n % 2 else "view", 7) for u in range(8) for n in range(8))]
    changes = {"start.path": world / "work", "optimizer.learning_rate": 1e-9, "train.duration": "1 steps"}
    assert train(write(world / "new" / "events.csv", events), world / "on", **changes) == 0
    old, new = (
        np.asarray(model.load(world / name, say=lambda _: None).params["user"]["event_kind"]["embedding"]) for name in ("work", "on")
    )
    kept = json.loads((world / "on" / "config.json").read_text())
    assert kept["data"]["event_features"] == ["kind"]
    np.testing.assert_allclose(new[[0, 2, 3, 4]], old, atol=1e-6)  # unknown, buy, cart, view
    np.testing.assert_allclose(new[1], 0, atol=1e-6)
    assert np.abs(old[1:]).max(1).min() > 1e-3
