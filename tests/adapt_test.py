"""What a config leaves to the data: how long, and how much against learning by heart."""

from __future__ import annotations

import numpy as np
import pytest
import tiny

from rec_jax.eval import model
from rec_jax.train import __main__ as command
from rec_jax.train import adapt


def test_without_texts_items_are_known_by_their_ids_alone():
    keys = {"train.adapt": True, "towers.item.ids": True, "towers.item.words": 8, "towers.item.text_length": 1.0}
    keys |= {"objectives.info_nce.mask_history": True, "towers.item.id_shrinkage": 3.0}
    given, ids = tiny.config(**keys), ["a", "b"]
    found = adapt.without_texts(given, ["a", "b"], ids)
    assert (found.towers.item.text, found.towers.item.words, found.towers.item.text_length) == (False, 0, 0.0)
    assert (found.towers.item.id_shrinkage, found.objectives.info_nce.mask_history) == (0.0, False)
    assert found.is_locked
    assert given.towers.item.text
    tiny.config_lib.check(found)
    assert adapt.without_texts(given, ["a", "a text"], ids) is given
    for key, value in (("train.adapt", False), ("towers.item.ids", False), ("towers.item.id_dropout", 0.1)):
        other = tiny.config(**{**keys, key: value})
        assert adapt.without_texts(other, ["a", "b"], ids) is other


def test_times_predicted_counts_all_but_first_events():
    assert adapt.times_predicted(np.array([0, 1, 2, 5]), 10) == 0.5


def test_epochs_and_strengths_by_how_often_an_item_is_predicted():
    for times in (0, 0.1, 10.86, 30):
        assert (adapt.epochs(times), adapt.strength(times), adapt.haste(times)) == (7, 1, 1)
    assert adapt.epochs(290) == pytest.approx(15.84, rel=1e-2)
    assert adapt.epochs(290, wide=True) == pytest.approx(15.84 * 0.587, rel=1e-2)
    assert adapt.epochs(1e6) == 30
    assert adapt.epochs(10.86, 20) == 19
    assert adapt.epochs(290, 40) == pytest.approx(15.84, rel=1e-2)
    assert adapt.epochs(10.86, 1) == 30
    assert adapt.strength(290) == pytest.approx(0.2951, rel=1e-2)
    assert adapt.haste(290) == pytest.approx(2.27, rel=1e-2)


def test_adapted_fills_in_what_is_left_to_the_data_alone(tmp_path):
    lengths, items = np.full(100, 1 + 29_000), 10_000
    as_it_is = tiny.config()
    assert adapt.adapted(as_it_is, lengths, items) is as_it_is
    given = tiny.config(
        **{"train.duration": "auto", "train.adapt": True, "batch.drop_events": 0.2},
        **{"objectives.info_nce.neighbour_share": 0.3, "objectives.info_nce.label_smoothing": 0.1},
    )
    said = []
    found = adapt.adapted(given, lengths, items, said.append)
    assert said[0].startswith("  an epoch predicts an item 290.0 times on average: train.duration='9.")
    assert "batch.drop_events=0.059" in said[0]
    assert adapt.adapted(as_it_is, lengths, items, said.append) is as_it_is
    assert len(said) == 1
    assert found.train.duration == f"{adapt.epochs(290, wide=True):.2f} epochs"
    of_a_stage = adapt.adapted(tiny.config(**{"train.duration": "auto"}), lengths, items)
    assert of_a_stage.train.duration == f"{adapt.epochs(290):.2f} epochs", "its towers are as wide as the config says"
    shares = found.batch.drop_events, found.objectives.info_nce.neighbour_share, found.objectives.info_nce.label_smoothing
    assert shares == pytest.approx([0.2 * 0.2951, 0.3 * 0.2951, 0.1 * 0.2951], rel=1e-2)
    assert found.towers.user.dropout == pytest.approx(given.towers.user.dropout * 0.2951**0.5, rel=1e-2)
    assert found.optimizer.learning_rate == pytest.approx(given.optimizer.learning_rate * 2.27, rel=1e-2)
    assert found.is_locked
    assert given.train.duration == "auto"
    assert given.batch.drop_events == 0.2
    again = adapt.adapted(found, lengths, items)
    assert again.train.duration == found.train.duration
    only_long = adapt.adapted(tiny.config(**{"train.duration": "auto", "batch.drop_events": 0.2}), lengths, items)
    assert only_long.batch.drop_events == 0.2


def test_a_run_takes_that_many_epochs(tmp_path):
    world = tiny.World()
    keys = {"train.duration": "auto", "batch.shards": 1, "batch.history_rows": 1}
    config = adapt.adapted(tiny.config(**keys), world.train_lengths(), tiny.N_ITEMS)
    task = tiny.task(config, tmp_path)
    per_item = sum(max(0, n - 1) for n in world.train_lengths()) / tiny.N_ITEMS
    epoch = task.batches.examples_per_epoch / task.batches.examples_per_step()
    found = adapt.epochs(per_item, per_item * tiny.N_ITEMS / 16)
    assert 7 < found <= 30
    assert task.loop.total == round(float(f"{found:.2f}") * epoch) > epoch


DENSE, SPARSE, ITEMS = np.full(100, 1 + 29_000), np.full(100, 1 + 1_000), 10_000
WIDTH = {"train.adapt": True, "towers.dim": 8, "towers.user.heads": 2}


def test_towers_are_wider_where_items_are_predicted_often():
    said: list[str] = []
    given = tiny.config(**WIDTH)
    found = adapt.widened(given, DENSE, ITEMS, text_width=12, say=said.append)
    assert found.towers.dim == 12
    assert said == ["  an epoch predicts an item 290.0 times on average: towers.dim=12"]
    assert found.is_locked
    assert given.towers.dim == 8
    tiny.config_lib.check(found)
    assert adapt.widened(given, SPARSE, ITEMS, text_width=12, say=said.append) is given
    assert len(said) == 1


@pytest.mark.parametrize(
    ("changes", "text_width"),
    [
        ({"train.adapt": False}, 12),
        ({"towers.item.whiten": True}, 11),
        ({"towers.dim": 10, "towers.user.heads": 10}, 16),  # 15 numbers do not divide into 10 heads
        ({"start.path": "runs/before"}, 12),
        ({"stages": ("contrastive",), "stage.contrastive": {}}, 12),
    ],
)
def test_towers_stay_where_they_cannot_be_wider(changes, text_width):
    given = tiny.config(**{**WIDTH, **changes})
    assert adapt.widened(given, DENSE, ITEMS, text_width=text_width) is given


def test_a_run_that_goes_on_is_as_wide_as_the_one_before():
    given, wide = tiny.config(**WIDTH), tiny.config(**{**WIDTH, "towers.dim": 12})
    assert adapt.as_wide_as(given, wide).towers.dim == 12
    for changes in ({"train.adapt": False}, {"towers.dim": 16}, {"towers.dim": 12}):  # such a width is another that is asked for
        other = tiny.config(**{**WIDTH, **changes})
        assert adapt.as_wide_as(other, wide) is other


def test_muon_is_for_items_that_are_predicted_often():
    given = tiny.config(**{"optimizer.muon": ("user/.*",), "train.adapt": True})
    between = np.full(100, 1 + 5_800)
    found = [adapt.adapted(given, lengths, ITEMS).optimizer.muon for lengths in (SPARSE, between, DENSE)]
    assert found == [(), (), ("user/.*",)]


def test_a_whole_run_keeps_its_width_and_goes_on_with_it(tmp_path, capsys):
    """Twelve items, each predicted about 170 times an epoch."""
    rng, lines = np.random.default_rng(0), []
    for user in range(60):
        lines.append(" ".join(map(str, [user, *(1 + (rng.integers(12) + np.cumsum(rng.choice([1, 5], 36))) % 12)])))
    flags = {
        "data.on_bad.duplicate_event": "keep", "objectives.info_nce.mask_history": False, "data.cache": tmp_path / "cache",
        "train.duration": "2 steps", "train.eval_every": "1 steps", "eval.baselines": "('popularity',)", "eval.fuse": "",
        "batch.history_length": 16, "towers.dim": 8, "towers.user.mlp": 16, "towers.user.layers": 1,
        "towers.user.heads": 2,
    }  # fmt: skip

    def train(name, **more):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n")
        words = [f"--config.{key}={value}" for key, value in {**flags, **more, "data.path": tmp_path / f"{name}.txt"}.items()]
        assert command.main(["--config=configs/sequences.py", *words, f"--workdir={tmp_path / name}"]) == 0
        return capsys.readouterr().out

    assert "towers.dim=12" in train("old")
    assert model.load(tmp_path / "old").items.shape == (12, 12)
    lines[0] += " 13"
    train("new", **{"start.path": tmp_path / "old"})
    assert model.load(tmp_path / "new").items.shape == (13, 12)
