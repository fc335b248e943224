"""Preparing: made once, keyed by input and settings, whole or not at all; what is read back equals a naive reading of the events."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tensorflow_datasets as tfds

from rec_jax import config as config_lib
from rec_jax.data import folders, identity, prepare, readers, records
from rec_jax.data.tables import code
from rec_jax.types import RecJaxError

KINDS = ("leave_one_out", "temporal", "ratio", "random", "cold_item")


def write_events(folder: Path, n_users: int = 30, n_items: int = 20, seed: int = 0) -> None:
    """events.csv (with ratings and times) and items.tsv, in which items without genres and one without year occur."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{item}", int(rng.integers(1_000, 9_000)), float(rng.integers(1, 6)))
        for user in range(n_users)
        for item in rng.permutation(n_items)[: rng.integers(3, 12)]
    ]
    pl.DataFrame(rows, schema=["who", "what", "when", "stars"], orient="row").sample(fraction=1, shuffle=True, seed=seed).write_csv(
        folder / "events.csv"
    )
    items = {
        "item_id": [f"i{i}" for i in range(n_items)],
        "title": [f"Film {i}" for i in range(n_items)],
        "year": ["" if i == 3 else str(1990 + i) for i in range(n_items)],
        "genres": ["" if i % 5 == 0 else "Drama" for i in range(n_items)],
    }
    pl.DataFrame(items).write_csv(folder / "items.tsv", separator="\t", quote_style="never")


@pytest.fixture
def config(tmp_path):
    (tmp_path / "in").mkdir()
    write_events(tmp_path / "in")
    c = config_lib.defaults()
    c.data.reader = "table"
    c.data.path, c.data.items = str(tmp_path / "in" / "events.csv"), str(tmp_path / "in" / "items.tsv")
    c.data.columns.update({"user": "who", "item": "what", "time": "when", "rating": "stars"})
    c.data.cache = str(tmp_path / "cache")
    c.data.text.template = "{title} ({year}). {genres}"
    return c


def naive(config):
    """The events by user: [(item, split, time, rating)] each, in time order."""
    _, _, coded = code(readers.read(config.data), config.data, config.seed)
    users = [[] for _ in range(coded.n_users)]
    for user, *event in zip(coded.user, coded.item, coded.split, coded.time, coded.rating, strict=True):
        users[user].append(tuple(x.item() for x in event))
    return users, coded


def snapshot(folder) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in Path(folder).rglob("*")}


class TestOnce:
    def test_second_call_reuses_and_rewrites_nothing(self, config, monkeypatch, capsys):
        first = prepare.prepare(config)
        before = snapshot(first.folder)
        monkeypatch.setattr(readers, "read", lambda data: pytest.fail("the input was read again"))
        capsys.readouterr()
        second = prepare.prepare(config)
        assert second.folder == first.folder
        assert second.meta == first.meta
        assert snapshot(first.folder) == before
        assert capsys.readouterr().err == f"prepared data is there: {first.folder}\n"

    def test_folder_is_named_by_input_and_fingerprint(self, config):
        prepared = prepare.prepare(config)
        assert prepared.folder.name == f"events.csv-{prepared.meta['fingerprint'][:12]}"
        assert {i["name"] for i in prepared.meta["inputs"]} == {"events.csv", "items.tsv"}

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("data.split.kind", "ratio"),
            ("data.text.template", "{title}"),
            ("data.filter.min_rating", 3.0),
            ("data.on_bad.duplicate_event", "keep"),
            ("data.columns.time", ""),
        ],
    )
    def test_a_setting_that_matters_gives_another_folder(self, config, key, value):
        before = identity.identify(config)[0]
        group, name = key.rsplit(".", 1)
        config_lib.get(config, group)[name] = value
        assert identity.identify(config)[0] != before

    def test_content_gives_another_folder(self, config):
        before = identity.identify(config)[0]
        with open(config.data.path, "a") as f:
            f.write("u0,i3,9500,4.0\n")
        assert identity.identify(config)[0] != before

    def test_what_does_not_matter_does_not(self, config, tmp_path):
        before = identity.identify(config)[0]
        shutil.copytree(tmp_path / "in", tmp_path / "moved")
        config.data.path, config.data.items = str(tmp_path / "moved" / "events.csv"), str(tmp_path / "moved" / "items.tsv")
        config.data.text.max_tokens, config.data.text.tokenizer, config.seed, config.train.duration = 9, "elsewhere", 7, "1 steps"
        assert identity.identify(config)[0] == before

    def test_seed_matters_where_the_split_is_drawn(self, config):
        config.data.split.kind = "cold_item"
        before = identity.identify(config)[0]
        config.seed = 1
        assert identity.identify(config)[0] != before

    def test_meta_is_the_same_when_made_again(self, config):
        first = prepare.prepare(config)
        text = (first.folder / "meta.json").read_text()
        shutil.rmtree(first.folder)
        assert (prepare.prepare(config).folder / "meta.json").read_text() == text


class TestWholeOrNotAtAll:
    def test_a_catalogue_of_one_item_is_an_error_that_names_it_and_leaves_nothing(self, config, tmp_path):
        rows = [("u", "i1", when, 1.0) for when in range(3)] + [("v", "i2", 1, 1.0)]
        pl.DataFrame(rows, schema=["who", "what", "when", "stars"], orient="row").write_csv(tmp_path / "in" / "events.csv")
        config.data.on_bad.duplicate_event = "keep"
        config.data.filter.min_user_events = 3
        with pytest.raises(RecJaxError, match=r"config\.data\.path=.*the catalogue has one item, 'i1',.*left out 1 users"):
            prepare.prepare(config)
        assert list((tmp_path / "cache").iterdir()) == []

    def test_failing_writer_leaves_nothing(self, config, tmp_path, monkeypatch):
        def fail(columns, offsets, folder):
            (folder / "histories").mkdir()
            raise OSError("no space left on device")

        with monkeypatch.context() as m:
            m.setattr(records, "write", fail)
            with pytest.raises(OSError, match="no space"):
                prepare.prepare(config)
        assert list((tmp_path / "cache").iterdir()) == []
        assert len(prepare.prepare(config).source()) == 30

    def test_killed_in_the_middle(self, config, tmp_path):
        (tmp_path / "config.json").write_text(config_lib.to_json(config))
        script = f"""
            import os, signal
            from pathlib import Path
            from rec_jax import config
            from rec_jax.data import prepare, records
            records._encode = lambda user, arrays: os.kill(os.getpid(), signal.SIGKILL) if user == 20 else b""
            prepare.prepare(config.from_json(Path({str(tmp_path / "config.json")!r}).read_text()))
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        left = [p.name for p in (tmp_path / "cache").iterdir()]
        assert len(left) == 1
        assert ".tmp-" in left[0]
        prepared = prepare.prepare(config)
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [prepared.folder.name]

    def test_leftover_of_a_living_process_stays(self, config):
        folder = Path(identity.identify(config)[0])
        living = folder.parent / f"{folder.name}.tmp-{folders.socket.gethostname()}-{os.getppid()}-0a1b2c3d"
        living.mkdir(parents=True)
        prepare.prepare(config)
        assert living.exists()

    def test_folder_without_meta_does_not_count(self, config, capsys):
        prepared = prepare.prepare(config)
        (prepared.folder / "meta.json").unlink()
        with pytest.raises(RecJaxError, match=r"no complete prepared folder \(it has no meta.json\)"):
            prepare.open_prepared(prepared.folder)
        assert len(prepare.prepare(config).source()) == 30
        assert "is incomplete: replaced" in capsys.readouterr().err

    def test_the_faster_of_two_stays(self, config):
        folder = identity.identify(config)[0]
        with folders.new(folder, "meta.json") as slow:
            prepared = prepare.prepare(config)
            (slow / "meta.json").write_text("{}")
        assert prepare.open_prepared(folder).meta == prepared.meta
        assert [p.name for p in folder.parent.iterdir()] == [folder.name]

    def test_other_format_is_refused(self, config, monkeypatch):
        folder = prepare.prepare(config).folder
        monkeypatch.setattr(prepare, "FORMAT", 2)
        with pytest.raises(RecJaxError, match="has format 1, this version reads 2"):
            prepare.open_prepared(folder)


class TestPlaces:
    def test_other_processes_wait(self, config, monkeypatch):
        monkeypatch.setattr(prepare, "_process", lambda: (0, 2) if threading.current_thread().name == "first" else (1, 2))
        first = threading.Timer(0.3, prepare.prepare, [config])
        first.name = "first"
        first.start()
        prepared = prepare.prepare(config)
        first.join()
        assert len(prepared.source()) == 30

    def test_waiting_ends_with_an_error(self, config, monkeypatch):
        monkeypatch.setattr(prepare, "_process", lambda: (1, 2))
        monkeypatch.setattr(prepare, "WAIT_SECONDS", 0.05)
        with pytest.raises(RecJaxError, match=r"process 1 of 2 waited 0 s .* config.data.cache"):
            prepare.prepare(config)

    def test_remote_folder(self, config, tmp_path, monkeypatch):
        """A folder that cannot be renamed: written here, copied there with its marker last, and read from a copy here."""
        remote, mirror = tmp_path / "cache", tmp_path / "mirror"
        monkeypatch.setattr(folders, "is_local", lambda path: not str(path).startswith(str(remote)))
        monkeypatch.setenv("REC_JAX_MIRROR", str(mirror))
        monkeypatch.setenv("REC_JAX_CACHE", str(tmp_path / "unused"))
        prepared = prepare.prepare(config)
        files = sorted((p for p in Path(prepared.folder).rglob("*") if p.is_file()), key=lambda p: p.stat().st_mtime_ns)
        assert files[-1].name == "meta.json"
        assert len(prepared.source()) == 30
        assert prepared.local == mirror / prepared.folder.name
        shutil.rmtree(remote)
        assert prepared.source()[29]["user"] == 29


class TestReadBack:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("split", ["valid", "test"])
    def test_eval_set(self, config, kind, split):
        config.data.split.kind, config.data.split.valid, config.data.split.test = kind, 0.2, 0.2
        users, coded = naive(config)
        value = {"valid": 1, "test": 2}[split]
        expected = {}
        for user, events in enumerate(users):
            targets = [item for item, part, *_ in events if part == value]
            if targets:
                first = len(events) if kind == "random" else [part for _, part, *_ in events].index(value)
                expected[user] = [item for item, part, *_ in events[:first] if part < value], targets
        got = prepare.prepare(config).eval_set(split)
        assert got.users.tolist() == list(expected)
        assert len(expected) > 0
        assert len(got.history) == len(got.targets) == len(expected)
        for row, (history, targets) in enumerate(expected.values()):
            assert got.history[row].tolist() == history
            assert got.targets[row].tolist() == targets
        assert got.n_items == coded.n_items
        assert got.history.flat.dtype == got.targets.flat.dtype == np.int32

    @pytest.mark.parametrize("kind", KINDS)
    def test_users_known_by_their_train_events_alone(self, config, kind):
        config.data.split.kind, config.data.split.valid, config.data.split.test = kind, 0.2, 0.2
        earlier, first = prepare.prepare(config).eval_set("test"), prepare.fingerprint_of(config)
        config.data.split.history = "train"
        assert prepare.fingerprint_of(config) != first
        prepared = prepare.prepare(config)
        got, train = prepared.eval_set("test"), prepared.train_histories()
        assert earlier.removed is None
        assert [got.removed[n].tolist() for n in range(len(got.users))] == [earlier.history[n].tolist() for n in range(len(got.users))]
        assert [got.targets[n].tolist() for n in range(len(got.users))] == [earlier.targets[n].tolist() for n in range(len(got.users))]
        fewer = 0
        for row, user in enumerate(got.users):
            history, removed, own = (set(x.tolist()) for x in (got.history[row], got.removed[row], train[int(user)]))
            assert history == removed & own
            fewer += history != removed
        assert fewer > 0 or kind == "cold_item"

    @pytest.mark.parametrize("kind", KINDS)
    def test_train_side(self, config, kind):
        config.data.split.kind = kind
        users, coded = naive(config)
        prepared = prepare.prepare(config)
        train = [[item for item, part, *_ in events if part == 0] for events in users]
        histories = prepared.train_histories()
        assert [histories[u].tolist() for u in range(len(users))] == train
        assert prepared.train_lengths().tolist() == [len(t) for t in train]
        assert prepared.lengths().tolist() == [len(events) for events in users]
        assert prepared.item_counts().tolist() == np.bincount(np.concatenate(train), minlength=coded.n_items).tolist()
        assert prepared.item_counts().dtype == np.int64

    def test_unknown_split(self, config):
        with pytest.raises(RecJaxError, match="'train': expected valid or test"):
            prepare.prepare(config).eval_set("train")

    @pytest.mark.parametrize("events_per_shard", [40, 1 << 22])
    def test_records(self, config, monkeypatch, events_per_shard):
        monkeypatch.setattr(records, "EVENTS_PER_SHARD", events_per_shard)
        users, _ = naive(config)
        prepared = prepare.prepare(config)
        files = list((prepared.local / "histories" / "1.0.0").glob("*.array_record*"))
        assert (len(files) > 3) == (events_per_shard == 40)
        source = pickle.loads(pickle.dumps(prepared.source()))
        assert len(source) == prepared.n_users == len(users)
        with ThreadPoolExecutor(8) as threads:
            in_threads = list(threads.map(source.__getitem__, range(len(users))))
        builder = tfds.builder_from_directory(str(prepared.local / "histories" / "1.0.0"))
        by_tfds = builder.as_data_source("users")
        assert builder.info.splits["users"].num_examples == len(users)
        for user, events in enumerate(users):
            item, part, time, rating = zip(*events, strict=True)
            expected = {"items": item, "splits": part, "times": time, "ratings": rating}
            for record in (source[user], in_threads[user], source.__getitems__([user])[0], by_tfds[user]):
                assert int(record["user"]) == user
                for name, values in expected.items():
                    assert record[name].dtype == records.COLUMNS[name]
                    np.testing.assert_array_equal(record[name], values)
        assert int(source[-1]["user"]) == len(users) - 1
        assert [int(r["user"]) for r in source[3:6]] == [3, 4, 5]
        with pytest.raises(IndexError, match=f"user {len(users)} of {len(users)}"):
            source[len(users)]

    def test_missing_records(self, config):
        prepared = prepare.prepare(config)
        shutil.rmtree(prepared.local / "histories")
        with pytest.raises(RecJaxError, match="holds no prepared histories"):
            prepared.source()

    def test_columns_of_another_type_are_refused(self, tmp_path):
        columns = {"items": np.zeros(2, np.int64), "times": np.zeros(2, np.int64)}
        with pytest.raises(RecJaxError, match=r"column 'items' of the histories is int64 \(2,\); expected int32 \(2,\)"):
            records.write(columns, np.array([0, 2]), tmp_path)

    def test_items_and_users(self, config):
        items, users, _ = code(readers.read(config.data), config.data)
        prepared = prepare.prepare(config)
        assert prepared.item_ids() == items["item"].to_list()
        assert prepared.names() == items["name"].to_list()
        assert prepared.users()["user"].to_list() == users["user"].to_list()
        texts = dict(zip(prepared.item_ids(), prepared.texts(), strict=True))
        assert (texts["i3"], texts["i5"], texts["i7"]) == ("Film 3. Drama", "Film 5 (1995)", "Film 7 (1997). Drama")

    def test_meta(self, config):
        users, coded = naive(config)
        meta = prepare.prepare(config).meta
        parts = [part for events in users for _, part, *_ in events]
        assert meta["splits"] == {"train": parts.count(0), "valid": parts.count(1), "test": parts.count(2)}
        assert (meta["users"], meta["items"], meta["events"]) == (30, 20, len(parts))
        assert meta["density"] == len(parts) / 600
        assert meta["users_in_split"] == {"train": 30, "valid": 30, "test": 30}
        assert dict(meta["ratings"]) == {r: int((coded.rating == r).sum()) for r in (1.0, 2.0, 3.0, 4.0, 5.0)}
        assert meta["times"] == [int(coded.time.min()), int(coded.time.max())]
        assert json.loads(json.dumps(meta)) == meta
        assert str(config.data.cache) not in json.dumps(meta)

    def test_many_different_ratings_become_bins(self):
        histogram = prepare._histogram(np.arange(1000, dtype=np.float32))
        np.testing.assert_allclose([value for value, _ in histogram], np.arange(20) * 999 / 20)
        assert [count for _, count in histogram] == [50] * 20


class TestEmptyTemplate:
    """An item whose template renders to nothing counts as an item without text, though other columns have some."""

    def test_skip_leaves_it_out_and_reports(self, config):
        config.data.text.template = "{genres}"
        prepared = prepare.prepare(config)
        assert not {"i0", "i5", "i10", "i15"} & set(prepared.item_ids())
        assert prepared.n_items == 16
        assert prepared.meta["bad_input"]["empty_text"]["count"] == 4

    def test_error(self, config):
        config.data.text.template, config.data.on_bad.empty_text = "{genres}", "error"
        with pytest.raises(RecJaxError, match=r"item 'i0'.* has no text"):
            prepare.prepare(config)

    def test_keep_names_it(self, config):
        config.data.text.template, config.data.on_bad.empty_text = "{genres}", "keep"
        texts = dict(zip(prepare.prepare(config).item_ids(), prepare.prepare(config).texts(), strict=True))
        assert (texts["i5"], texts["i6"]) == ("Film 5", "Drama")
