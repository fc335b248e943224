"""Features of users: read and coded, added at the places of their own histories alone, trained, measured again, gone on from."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
import tiny
from scene_readers_test import LASTFM
from scene_readers_test import folder as write_lastfm

from rec_jax.data import describe, prepare, user_features
from rec_jax.eval import final, model
from rec_jax.serve.recommend import Recommender
from rec_jax.towers import features, history
from rec_jax.train import __main__ as command
from rec_jax.types import Ragged, RecJaxError

FLAGS = {
    **tiny.EIGHT_STEPS,
    "eval.fuse": "sequence_knn",
    "data.user_features.categorical": "('gender',)",
    "data.user_features.multi_hot": "('friends',)",
    "data.user_features.numeric": "('age',)",
    "towers.user.attended": "('friends',)",
}
MISSING = 7  # a user whom the file lacks


def write(folder, n_users, *, first=0):
    """Histories of `n_users` users, and a file of their features in another order, with a user whom nobody knows."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    rows = [(random.integers(30) + np.cumsum(random.choice([1, 1, 5], 9))) % 30 + 1 for _ in range(n_users)]
    (folder / "events.txt").write_text("".join(f"{u} {' '.join(map(str, row))}\n" for u, row in enumerate(rows)))
    users = [u for u in range(first, n_users) if u != MISSING]
    lines = [f"{u}\t{'abc'[u % 3]}\t{20 + u if u % 4 else ''}\t{(u + 1) % n_users}, {(u + 2) % n_users}" for u in reversed(users)]
    (folder / "users.tsv").write_text("\n".join(["user_id\tgender\tage\tfriends", "999\td\t1\t0", *lines]) + "\n")
    return folder


def train(folder, workdir, **changes):
    flags = FLAGS | {"data.path": f"{folder}/events.txt", "data.users": f"{folder}/users.tsv"} | changes
    return command.main(["--config=configs/sequences.py", f"--workdir={workdir}", *(f"--config.{k}={v}" for k, v in flags.items())])


def config_of(folder, **changes):
    group = {"data.user_features.categorical": ("gender",), "data.reader": "sequences", "data.cache": f"{folder}/cache"}
    return tiny.config(**{"data.path": f"{folder}/events.txt", "data.users": f"{folder}/users.tsv", **group, **changes})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("users")
    write(folder / "data", 40)
    assert train(folder / "data", folder / "work") == 0
    return folder


def test_columns_go_with_their_users(world):
    trained = model.load(world / "work", say=lambda _: None)
    prepared, rows = trained.model.prepared, trained.model.of_users
    columns = pl.read_parquet(prepared.local / "user_features.parquet")
    for row, name in enumerate(prepared.users()["user"].to_list()):
        u = int(name)
        there = u != MISSING
        assert columns["categorical.gender"][row] == ("abc"[u % 3] if there else None)
        assert columns["numeric.age"][row] == (20 + u if there and u % 4 else None)
        assert (rows["categorical"]["gender"][row] == 0) == (not there)
        assert np.count_nonzero(rows["multi_hot"]["friends"][row]) == (2 if there else 0)
    assert prepared.meta["user_features"]["categorical"]["gender"] == {"values": 3, "missing": 1}
    assert prepared.meta["bad_input"]["missing_feature"]["count"] == 1 + 1 + 11
    (shown,) = [section for section in describe._features(prepared) if section.heading == "Features of users"]
    assert ["gender", "categorical", "3", "1"] in shown.rows


def test_training_moves_them_and_they_have_a_part_in_the_scores(world):
    trained = model.load(world / "work", say=lambda _: None)
    params = trained.params["user"]["features"]
    assert set(params) == {"categorical", "multi_hot", "numeric"}
    assert np.any(params["multi_hot"]["friends"]["query"])
    assert np.all(np.any(params["categorical"]["gender"]["embedding"][1:], axis=1))
    assert not np.any(params["categorical"]["gender"]["embedding"][0])
    test = trained.model.prepared.eval_set("test")
    whole = trained.model.user_vectors(trained.params, trained.items, test.history)
    unknown = trained.model.user_vectors(trained.params, trained.items, Ragged(test.history.flat, test.history.offsets))
    moved = np.abs(whole - unknown).max(1) > 1e-4
    names = trained.model.prepared.users()["user"].to_list()
    assert moved[[i for i, u in enumerate(test.users) if names[u] != str(MISSING)]].all()
    assert len(Recommender(trained).recommend(["3", "4"], k=5)) == 5, "a history without a user is recommended for too"


def test_another_evaluation_gives_the_same_figures(world):
    before = (world / "work" / "eval" / "test.json").read_bytes()
    final.run(world / "work", say=lambda _: None)
    assert (world / "work" / "eval" / "test.json").read_bytes() == before


@pytest.mark.slow
def test_a_run_goes_on_with_new_users_and_values(world, tmp_path):
    new = write(tmp_path / "new", 50)
    text = (new / "users.tsv").read_text().replace("49\tb", "49\tnew")
    (new / "users.tsv").write_text(text)
    assert train(new, tmp_path / "second", **{"start.path": world / "work"}) == 0
    first, second = (json.loads((w / "user_features.json").read_text()) for w in (world / "work", tmp_path / "second"))
    assert second["categorical"]["gender"] == [*first["categorical"]["gender"], "new"]
    assert second["numeric"] == first["numeric"]
    old, grown = (model.load(w, say=lambda _: None).params["user"]["features"] for w in (world / "work", tmp_path / "second"))
    assert grown["categorical"]["gender"]["embedding"].shape[0] == 1 + old["categorical"]["gender"]["embedding"].shape[0]
    assert len(grown["multi_hot"]["friends"]["embedding"]) > len(old["multi_hot"]["friends"]["embedding"])


def test_a_place_gets_its_own_users_features():
    spec = features.make_sum({"categorical": {"gender": 3}, "multi_hot": {"friends": 5}}, 8)
    tower = history.HistorySpec(dim=8, layers=1, heads=2, mlp=16, dropout=0.0, max_positions=16, features=spec)
    params = history.init(jax.random.key(0), tower)
    rows = {"categorical": {"gender": np.array([1, 2, 0])}, "multi_hot": {"friends": np.array([[1, 2], [3, 0], [0, 0]])}}
    x, segments = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 8)), jnp.float32), jnp.asarray([[1, 1, 1, 2, 2, 0]])
    users = jnp.asarray([[0, 0, 0, 1, 1, -1]])
    encode = lambda users, params=params: np.asarray(history.encode(params, tower, x, segments, users=users, features=rows))
    np.testing.assert_array_equal(encode(users), encode(None), "they begin at zero")
    random = np.random.default_rng(1)
    drawn = jax.tree.map(lambda t: jnp.asarray(random.normal(size=t.shape), jnp.float32), params["features"])
    encode = lambda users, params={**params, "features": drawn}: np.asarray(
        history.encode(params, tower, x, segments, users=users, features=rows)
    )
    plain, known = encode(None), encode(users)
    assert (np.abs(known - plain).max(-1)[0, :5] > 1e-3).all()
    np.testing.assert_array_equal(encode(jnp.asarray([[2, 2, 2, 2, 2, 2]])), plain, "a user without any adds nothing")
    np.testing.assert_array_equal(encode(jnp.full((1, 6), -1)), plain)
    np.testing.assert_array_equal(encode(users.at[0, :3].set(-1))[0, 3:], known[0, 3:], "another segment's user has no part")
    gender, friends = (np.asarray(drawn[kind][name]["embedding"]) for kind, name in (("categorical", "gender"), ("multi_hot", "friends")))
    added = [gender[1] + friends[[1, 2]].mean(0)] * 3 + [gender[2] + friends[3]] * 2 + [np.zeros(8)]
    by_hand = x + np.stack(added) @ np.linalg.inv(np.asarray(params["in"]["kernel"])) / 8**0.5
    found = history.encode({**params, "features": drawn}, tower, jnp.asarray(by_hand), segments)
    np.testing.assert_allclose(found[0, :5], known[0, :5], atol=1e-3)
    with pytest.raises(RecJaxError, match="features of users"):
        history.encode(params, tower, x, segments, users=users)


def test_a_place_weighs_friends_by_attention():
    """Against numpy, and with gradients: at the start as the mean; then by query and value; none and unknown users add nothing."""
    spec = features.make_sum({"multi_hot": {"friends": 5, "tags": 3}}, 8, ("friends",))
    params, random = features.init(jax.random.key(0), spec, 8), np.random.default_rng(0)
    assert "query" not in params["multi_hot"]["tags"]
    friends, x = np.array([[1, 2, 4], [3, 0, 0], [0, 0, 0]]), random.normal(size=(3, 8)).astype(np.float32)
    rows = {"multi_hot": {"friends": friends, "tags": np.zeros((3, 1), np.int32)}}
    params["multi_hot"]["friends"]["embedding"] = jnp.asarray(random.normal(size=(5, 8)), jnp.float32)
    added = lambda params, x=x: features.fuse(params, spec, jnp.zeros_like(x), rows, jnp.asarray(x))
    mean = features.fuse(params, features.make_sum({"multi_hot": {"friends": 5, "tags": 3}}, 8), jnp.zeros_like(x), rows)
    np.testing.assert_allclose(added(params), mean, atol=1e-6)
    gradient = jax.grad(lambda p: (added(p) ** 2).sum())(params)["multi_hot"]["friends"]
    assert np.abs(gradient["query"]).max() > 1e-3
    weights = random.normal(size=(8, 8)).astype(np.float32)
    params["multi_hot"]["friends"]["query"] = jnp.asarray(weights)
    vectors = np.asarray(params["multi_hot"]["friends"]["embedding"])
    scores = np.exp([vectors[n] @ (x[0] @ weights) / 8**0.5 for n in friends[0]])
    expected = np.stack([scores / scores.sum() @ vectors[friends[0]], vectors[3], np.zeros(8)])
    np.testing.assert_allclose(added(params), expected, atol=1e-5)

    def naive(table, query):
        logits = jnp.einsum("ud,de,uke->uk", x, query, table[friends]) / 8**0.5
        shares = jnp.where(friends > 0, jax.nn.softmax(jnp.where(friends > 0, logits, -jnp.inf), -1), 0)[:2]
        return (jnp.einsum("uk,uke->ue", shares, table[friends[:2]]) ** 3).sum()

    wanted = jax.grad(naive, (0, 1))(jnp.asarray(vectors), jnp.asarray(weights))
    found = jax.grad(lambda p: (added(p) ** 3).sum())(params)["multi_hot"]["friends"]
    np.testing.assert_allclose(found["embedding"], wanted[0], atol=1e-4)
    np.testing.assert_allclose(found["query"], wanted[1], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.replace("\tgender", "\tsex"), r"user_features\.categorical names 'gender', which is no column of the users"),
        (lambda f: f + "5\ta\t1\t2\n", r"users\.tsv:42: user id '5' occurs a second time; the first is at .*users\.tsv:36"),
        (lambda f: "user_id\tgender\n77\ta\n", r"users\.tsv' has none of the users; ids there are like '77', of users like '0'"),
        (lambda f: f.replace("user_id", "person"), r"no id column \(user_id or user or id\)"),
    ],
)
def test_bad_files_are_refused(tmp_path, change, message):
    folder = write(tmp_path / "data", 40)
    (folder / "users.tsv").write_text(change((folder / "users.tsv").read_text()))
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(config_of(folder))


def lastfm(folder, **changes):
    return tiny.config(**{
        "data.reader": "lastfm", "data.path": str(folder), "data.cache": f"{folder}/cache", "data.filter.min_user_events": 1,
        "data.split.history": "train", "data.split.kind": "random", "data.user_features.multi_hot": ("friends",), **changes,
    })  # fmt: skip


def test_a_readers_own_columns_need_no_file(tmp_path):
    """Friends of Last.fm, from its files to the numbers of the tower; the same as from a file of users, and only there they count."""
    write_lastfm(tmp_path / "own", LASTFM)
    prepared = prepare.prepare(lastfm(tmp_path / "own"))
    assert pl.read_parquet(prepared.local / "user_features.parquet")["multi_hot.friends"].to_list() == [["9"], ["2", "44"]]
    coding = user_features.coding_of_run(lastfm(tmp_path / "own"), prepared)
    assert coding.multi_hot == {"friends": ["2", "44", "9"]}
    rows = user_features.arrays(coding, prepared)
    assert rows["multi_hot"]["friends"].tolist() == [[3, 0], [1, 2]]
    assert prepared.meta["user_features"]["multi_hot"]["friends"] == {"values": 3, "missing": 0}
    (tmp_path / "users.tsv").write_text("user_id\tfriends\n9\t2, 44\n2\t9\n")
    of_file = prepare.prepare(lastfm(tmp_path / "own", **{"data.users": f"{tmp_path}/users.tsv"}))
    assert of_file.folder != prepared.folder
    named = user_features.arrays(coding, of_file)
    jax.tree.map(np.testing.assert_array_equal, named, rows)


def test_a_user_of_whom_the_reader_says_nothing(tmp_path):
    write_lastfm(tmp_path, LASTFM, **{"user_friends.dat": "userID\tfriendID\n9\t2\n"})
    prepared = prepare.prepare(lastfm(tmp_path))
    assert prepared.meta["user_features"]["multi_hot"]["friends"] == {"values": 1, "missing": 1}
    assert prepared.meta["bad_input"]["missing_feature"]["examples"][0].endswith("user '2': column friends is empty")
    message = r"config\.data\.path='.*user '2': column friends is empty"
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(lastfm(tmp_path, **{"data.on_bad.missing_feature": "error"}))


def test_a_column_that_the_reader_does_not_give(tmp_path):
    write_lastfm(tmp_path, LASTFM)
    changes = {"data.user_features.multi_hot": (), "data.user_features.numeric": ("age",)}
    message = r"numeric names 'age', which is no column of the users; these have: friends \(config\.data\.users='' means .*'lastfm'"
    with pytest.raises(RecJaxError, match=message):
        prepare.prepare(lastfm(tmp_path, **changes))
    (tmp_path / "user_friends.dat").unlink()
    with pytest.raises(RecJaxError, match=r"names 'friends', which is no column of the users; these have: none \("):
        prepare.prepare(lastfm(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.users": "users.tsv"}, r"data\.users='users\.tsv': name columns of it in config\.data\.user_features, or no file"),
        (
            {"data.users": "u.tsv", "data.user_features.categorical": ("friends",), "towers.user.attended": ("friends",)},
            r"attended=\('friends',\): expected some of config\.data\.user_features\.multi_hot=\(\)",
        ),
        ({"data.user_features.numeric": ("age", "age")}, r"user_features\.numeric names 'age' twice"),
        (
            {"data.users": "u.tsv", "data.user_features.numeric": ("age",), "batch.cloze": 0.2},
            r"read by a history tower that sees the past alone",
        ),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(RecJaxError, match=message):
        tiny.config(**changes)
