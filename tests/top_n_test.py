"""Top-n with context: against a plain loop in float64, ties, what is removed, other numbers of the items, and the click baselines."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path

import interactions_test
import jax
import numpy as np
import pytest
import tiny

from rec_jax import config as config_lib
from rec_jax.data.impressions import Impressions
from rec_jax.eval import ctr_baselines, final, labelled, top_n
from rec_jax.towers import interactions, two_tower
from rec_jax.train import __main__ as command
from rec_jax.train import plan
from rec_jax.types import RecJaxError

ROOT = Path(__file__).resolve().parents[1]
U, N, DIM = 5, 30, interactions_test.DIM
HEAD = interactions.InteractionSpec("dcn", hidden=(8,), cross_layers=2, tower=(4,), context=(2, 3), context_dim=4)
KS = (1, 3, 10)


def impressions_of(rows: int, seed: int) -> Impressions:
    """Few users and contexts, so that a case has several positives, in several parts."""
    random = np.random.default_rng(seed)
    return Impressions(
        user=random.integers(0, U, rows).astype(np.int32),
        item=random.integers(0, N, rows).astype(np.int32),
        context=np.stack([random.integers(0, 2, rows), random.integers(-1, 3, rows)], axis=1).astype(np.int32),
        labels=random.choice(np.array([0, 1, np.nan], np.float32), (rows, 1), p=(0.5, 0.4, 0.1)),
        propensity=None,
        time=np.arange(rows),
        categories={"day": "ab", "place": "xyz"},
        tasks=("used",),
    )


class Prepared:
    """Stands for the prepared data: impressions in three parts."""

    n_users, n_items = U, N

    def __init__(self):
        self.parts = {name: impressions_of(rows, n) for n, (name, rows) in enumerate({"train": 150, "valid": 60, "test": 120}.items())}

    def impressions(self, split: str) -> Impressions:
        return self.parts[split]


def towers() -> tuple[two_tower.TwoTowerSpec, dict, np.ndarray]:
    """-> spec, parameters, items [N, DIM]."""
    c = tiny.config(**{"towers.user.kind": "id", "towers.item.ids": True, "batch.kind": "impressions", "towers.user.heads": 1})
    spec = two_tower.make_spec(c.towers, tiny.bert_spec(), texts_per_row=8, n_items=N, n_users=U, tasks=1, context=HEAD.context)
    spec = dataclasses.replace(spec, dim=DIM, task=HEAD)
    random = np.random.default_rng(0)
    params = {"users": {"embedding": random.normal(size=(256, DIM)).astype(np.float32)}, "task": interactions_test.random_params(HEAD)}
    return spec, params, interactions_test.unit(random, N, DIM)


def naive_ranks(score, prepared: Prepared, split: str) -> dict[str, list[int]]:
    """score(user, context) -> [N]: ranks of all positives of a part, by loops; `NAME/` and `NAME_all/`."""
    earlier = [prepared.parts[name] for name in ({"valid": ["train"], "test": ["train", "valid"]}[split])]
    out: dict[str, list[int]] = {split: [], f"{split}_all": []}
    for user, item, context, label in _rows(prepared.parts[split]):
        if label != 1:
            continue
        scores = score(user, context)
        had = {i for part in earlier for u, i, c, y in _rows(part) if (u, c, y) == (user, context, 1)}
        rivals = [i for i in range(N) if i != item and scores[i] >= scores[item]]
        out[f"{split}_all"].append(1 + len(rivals))
        out[split].append(1 + len([i for i in rivals if i not in had]))
    return out


def _rows(part: Impressions):
    return zip(part.user.tolist(), part.item.tolist(), map(tuple, part.context.tolist()), part.labels[:, 0].tolist(), strict=True)


def naive_metrics(ranks: dict[str, list[int]]) -> dict[str, float]:
    out = {}
    for name, of in ranks.items():
        for k in KS:
            inside = [r if r <= k else 0 for r in of]
            out[f"{name}/hr@{k}"] = sum(r > 0 for r in inside) / len(of)
            out[f"{name}/ndcg@{k}"] = sum(1 / math.log2(1 + r) for r in inside if r) / len(of)
            out[f"{name}/mrr@{k}"] = sum(1 / r for r in inside if r) / len(of)
    return out


def ranked(scorer, split="test", **options):
    return top_n.rank(scorer, top_n.positives(Prepared(), split, **options), ks=KS, name=split, users_per_block=7)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_the_models_metrics_are_those_of_a_plain_loop_in_float64(split):
    spec, params, items = towers()
    found = ranked(top_n.of_towers(params, spec, items, users_per_block=7), split)
    users = params["users"]["embedding"].astype(np.float64)
    users /= np.linalg.norm(users, axis=1, keepdims=True)
    one = lambda user, context, item: interactions_test.reference(params["task"], HEAD, users[user], items[item], context)[0]
    naive = naive_ranks(lambda user, context: [one(user, context, item) for item in range(N)], Prepared(), split)
    assert sum(a != b for a, b in zip(naive[split], naive[f"{split}_all"], strict=True)) > 5, "nothing was removed"
    assert len(found.ranks) == len(naive[split]) > len(top_n.positives(Prepared(), split).user)
    np.testing.assert_array_equal(np.sort(found.ranks[:, 0]), np.sort(naive[split]))
    for name, value in naive_metrics(naive).items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-12), name


def test_a_target_is_scored_as_its_label_is_predicted():
    """By the very head that AUC measures: of all items, the scores of those that were shown are their impressions' logits."""
    spec, params, items = towers()
    shown = impressions_of(40, 3)
    # the tower makes these very items: there is no text, and vectors of items are as they are given
    whole = dataclasses.replace(spec, item_text=False, features=None)
    params |= {"ids": {"embedding": np.pad(items, ((0, 256 - N), (0, 0)))}}
    logits = labelled.Labelled(whole, Prepared()).logits(params, None, shown)[:, 0]
    scores = top_n.of_towers(params, spec, items, users_per_block=40)(shown.user, shown.context)
    np.testing.assert_allclose(scores[np.arange(40), shown.item], logits, atol=1e-5)


@pytest.mark.parametrize("fit", labelled.BASELINES.values(), ids=labelled.BASELINES)
def test_click_baselines_rank_by_their_logits(fit):
    prepared = Prepared()
    fields, labels = {}, {}
    for name, part in prepared.parts.items():
        fields[name], labels[name] = np.column_stack([part.user, part.item, part.context]), part.labels[:, 0]
    options = {"max_epochs": 3} if fit is ctr_baselines.fit_fm else {}
    model = fit(fields["train"], labels["train"], (U, N, 2, 3), valid=(fields["valid"], labels["valid"]), l2=(0.3,), **options)
    score = lambda user, context: model.logits(np.array([[user, item, *context] for item in range(N)]))
    every = model.logits_of_all(fields["test"], 1)
    for row in (0, 7):
        np.testing.assert_allclose(every[row], score(fields["test"][row, 0], fields["test"][row, 2:]), rtol=1e-9, atol=1e-12)
    found = ranked(top_n.of_clicks(model))
    # rounded as the scorer rounds, for an item that never came has the very logit of another one such
    naive = naive_ranks(lambda user, context: every_of(model, user, context), prepared, "test")
    for name, value in naive_metrics(naive).items():
        assert found.metrics[name] == pytest.approx(value, abs=1e-12), name


def every_of(model, user, context):
    return model.logits_of_all(np.array([[user, -1, *context]]), 1)[0].astype(np.float32)


@pytest.mark.parametrize("name", top_n.COUNTED)
def test_what_is_used_most(name):
    prepared = Prepared()
    train = [row for row in _rows(prepared.parts["train"]) if row[3] == 1]
    everybody = [sum(row[1] == item for row in train) for item in range(N)]

    def score(user, context):
        own = [sum(row[:2] == (user, item) for row in train) if name == "most_used_by_user" else 0 for item in range(N)]
        return list(zip(own, everybody, strict=True))  # pairs compare by the first, then by the second

    for metric, value in naive_metrics(naive_ranks(score, prepared, "test")).items():
        assert ranked(top_n.COUNTED[name](prepared)).metrics[metric] == pytest.approx(value, abs=1e-12), metric


def test_ties_never_count_for_the_target():
    found = ranked(lambda user, context: np.zeros((len(user), N), np.float32))
    positives = top_n.positives(Prepared(), "test")
    removed = [np.setdiff1d(positives.removed[k], item) for k, item in zip(positives.case, positives.item, strict=True)]
    np.testing.assert_array_equal(found.ranks_all[:, 0], N)
    np.testing.assert_array_equal(found.ranks[:, 0], [N - len(some) for some in removed])
    assert found.metrics["test/hr@10"] == 0


def test_what_was_had_in_another_context_and_a_target_that_was_had_before_stay():
    prepared = Prepared()
    row = lambda user, item, context, label: (user, item, context, label)
    train = [row(0, 1, (0, 0), 1), row(0, 2, (1, 0), 1), row(0, 3, (0, 0), 0), row(1, 4, (0, 0), 1), row(0, 6, (0, 0), 1)]
    for name, rows in {"train": train, "valid": [row(0, 5, (0, 0), 1)], "test": [row(0, 0, (0, 0), 1), row(0, 6, (0, 0), 1)]}.items():
        user, item, context, label = (np.array(column) for column in zip(*rows, strict=True))
        prepared.parts[name] = dataclasses.replace(
            prepared.parts[name], user=user, item=item, context=context, labels=label[:, None].astype(np.float32)
        )
    scores = -np.arange(N, dtype=np.float32)
    scores[0] = -7.5  # behind 1 to 7, of which 1, 5 and 6 go
    found = top_n.positives(prepared, "test")
    assert found.removed[0].tolist() == [1, 5, 6]
    out = top_n.rank(lambda user, context: np.tile(scores, (len(user), 1)), found, ks=(1,), name="test", users_per_block=2)
    assert dict(zip(found.item.tolist(), out.ranks[:, 0].tolist(), strict=True)) == {0: 5, 6: 4}
    assert dict(zip(found.item.tolist(), out.ranks_all[:, 0].tolist(), strict=True)) == {0: 8, 6: 6}
    valid = top_n.positives(prepared, "valid")
    assert valid.removed[0].tolist() == [1, 6], "validation knows train alone"


def test_other_numbers_of_the_items_change_no_metric(monkeypatch):
    spec, params, items = towers()
    before = ranked(top_n.of_towers(params, spec, items, users_per_block=7))
    number = np.random.default_rng(5).permutation(N)  # of each item, the new one

    def renumbered(self, split):
        part = self.parts[split]
        return dataclasses.replace(part, item=number[part.item].astype(np.int32))

    monkeypatch.setattr(Prepared, "impressions", renumbered)
    after = ranked(top_n.of_towers(params, spec, items[np.argsort(number)], users_per_block=7))
    assert before.metrics == after.metrics


def test_some_positives_are_drawn_by_seed():
    every = top_n.positives(Prepared(), "test")
    some, again, other = (top_n.positives(Prepared(), "test", most=9, seed=seed) for seed in (0, 0, 1))
    pairs = lambda p: sorted(zip(p.user[p.case].tolist(), map(tuple, p.context[p.case].tolist()), p.item.tolist(), strict=True))
    assert len(some.item) == 9
    assert pairs(some) == pairs(again) != pairs(other)
    assert set(pairs(some)) <= set(pairs(every))
    had = {(u, tuple(c)): every.removed[k].tolist() for k, (u, c) in enumerate(zip(every.user, every.context.tolist(), strict=True))}
    for k, (user, context) in enumerate(zip(some.user, some.context.tolist(), strict=True)):
        assert some.removed[k].tolist() == had[user, tuple(context)]
    assert len(top_n.positives(Prepared(), "test", most=10**6).item) == len(every.item)


def test_what_cannot_be_ranked_is_refused():
    prepared = Prepared()
    part = prepared.parts["test"]

    def refused(message, **changes):
        prepared.parts["test"] = dataclasses.replace(part, **changes)
        with pytest.raises(RecJaxError, match=message):
            top_n.positives(prepared, "test")

    refused("the test part has no positive of the label 'used' to rank", labels=np.zeros_like(part.labels))
    refused("the test part has 4.5 as a label 'used'.*set config.eval.top_n=0", labels=np.full_like(part.labels, 4.5))
    refused("context field 'affinity' tells of the item", categories={"day": "ab", "affinity": "xyz"})
    with pytest.raises(RecJaxError, match="split 'train': expected valid or test"):
        top_n.positives(prepared, "train")
    with pytest.raises(RecJaxError, match=r"config.eval.top_n=-2: expected how many positives"):
        tiny.config(**{"eval.top_n": -2})
    with pytest.raises(RecJaxError, match=r"scores of shape \(\d+, 3\), expected"):
        ranked(lambda user, context: np.zeros((len(user), 3), np.float32))


def test_it_is_off_by_default():
    assert config_lib.defaults().eval.top_n == 0
    assert top_n.ranker(tiny.config(), Prepared(), "test", print) is None


def test_the_time_of_top_n_is_foretold_by_what_is_compiled():
    """The products of one more item: known twice and thrice as wide before the cross layers, then the dense ones."""
    expected = 2 * (12 * 12 + 24 * 12 + 36 * 8 + 8 * 4)
    assert plan.top_n_flops(HEAD, DIM, 10) == 10 * expected
    params = interactions_test.random_params(HEAD)

    def flops(items: int) -> float:
        shapes = jax.ShapeDtypeStruct((1, DIM), np.float32), jax.ShapeDtypeStruct((items, DIM), np.float32)
        score = jax.jit(lambda u, i: interactions.score_all(params, HEAD, u, i, once=True))
        return score.lower(*shapes).compile().cost_analysis()["flops"]

    more = (flops(900) - flops(100)) / 800
    assert expected < more < 1.4 * expected


@pytest.fixture
def frappe(tmp_path):
    """A folder as the reader of Frappe wants it: 12 users, 20 apps, two places; what is used goes by user and place."""
    random, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    head = "user\titem\tcnt\tdaytime\tweekday\tisweekend\thomework\tcost\tweather\tcountry\tcity\n"
    rows = []
    for user in range(12):
        for place in ("home", "work"):
            for item in random.choice(20, 6, replace=False):
                rows.append(f"{user}\t{item}\t1\tnoon\tmonday\tworkday\t{place}\tfree\tsunny\tSpain\t1\n")
    (folder / "frappe.csv").write_text(head + "".join(rows))
    apps = "".join(f"{n}\tp\tTools\t1\tMe\tx\ten\tLong\tApp {n}\tFree\t4\tShort {n}\n" for n in range(20))
    columns = ("item", "package", "category", "downloads", "developer", "icon", "language", "description", "name", "price", "rating")
    (folder / "meta.csv").write_text("\t".join((*columns, "short desc\n")) + apps)
    return folder


def test_the_command_ranks_and_an_evaluation_may_rank_others(frappe, tmp_path, capsys, monkeypatch):
    monkeypatch.delitem(labelled.BASELINES, "factorisation_machine")  # it takes longer than all the rest
    flags = tiny.FLAGS | {"data.path": frappe, "train.duration": "2 steps", "towers.task.hidden": "(8,)", "towers.task.cross_layers": 1}
    flags |= {"batch.shards": 8, "batch.impressions": 8, "eval.users_per_block": 16}
    flags = [f"--config.{key}={value}" for key, value in flags.items()]
    assert command.main([f"--config={ROOT}/configs/frappe.py", f"--workdir={tmp_path / 'w'}", *flags]) == 0
    said = capsys.readouterr().out
    positives = re.search(r"model: (\d+) positives in \d+ pairs of user and context, top-n: \d+ s", said)
    assert positives, said
    for title in top_n.titles("test").values():
        assert title in said
    figures = json.loads((tmp_path / "w" / "eval" / "test.json").read_text())
    for row in ("test", "test_all", *(f"{name}{part}" for name in ("logistic", "most_used_by_user") for part in ("", "/test_all"))):
        for metric in ("hr@10", "ndcg@5"):
            assert 0 <= figures[f"{row}/{metric}"] <= 1
    again = final.run(tmp_path / "w", overrides=[("eval.top_n", "5")], say=lambda _: None)
    assert (5 * again["model"]["test/hr@5"]) % 1 == pytest.approx(0, abs=1e-9), "a share of five positives"
