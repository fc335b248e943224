"""Going on with new data: what a run that started from another workdir has gained on what is new, and lost on what was there."""

from __future__ import annotations

import numpy as np
from etils import epath

from rec_jax.data.start import Difference, Start
from rec_jax.eval import metrics, report
from rec_jax.eval.encoder import Say
from rec_jax.eval.rankings import Rankings
from rec_jax.eval.workdir import best_params
from rec_jax.towers import lora
from rec_jax.types import EvalSet, Params

K = 10
NAMES = ("ndcg", "hr")
GROUPS = {"new": "users with new events", "old": "users without", "new items": "users whose target is a new item"}


def params_of(start: Start) -> Params:
    """What the stage has trained, without its encoder; adapters are in the kernels."""
    params, _ = best_params(start.folder)
    kept = {name: value for name, value in params.items() if name != "lora"}
    if "lora" in params:
        kept = dict(lora.merge(kept, params["lora"], alpha=start.config.towers.text.lora.alpha))
    return {name: value for name, value in kept.items() if name != "text"}


def measure(ranked: Rankings, eval_set: EvalSet, difference: Difference) -> dict[str, dict[str, np.ndarray]]:
    """Rankings of an evaluation set -> group of GROUPS -> {"ndcg@10", "hr@10"} of each of its users, items of the history removed.

    A group that no user belongs to is left out. For "new items" the other targets do not count.
    """
    active = difference.active[eval_set.users][:, None]
    there = np.arange(ranked.ranks.shape[1]) < eval_set.targets.lengths()[:, None]
    fresh = np.zeros(there.shape, bool)
    fresh[there] = difference.items[eval_set.targets.flat] < 0
    out = {}
    for group, targets in {"new": there & active, "old": there & ~active, "new items": fresh}.items():
        rows = targets.any(1)
        if rows.any():
            out[group] = metrics.per_user(np.where(targets, ranked.ranks, 0)[rows], ks=(K,), names=NAMES)
    return out


def compare(workdir: epath.Path, before: Rankings, after: Rankings, eval_set: EvalSet, difference: Difference, *, say: Say) -> None:
    """Says the table of both models by GROUPS, with the change and its 95% interval over users, and writes `eval/continual.json`.

    The file has "before/old/ndcg@10", "after/...", "change/...", the interval's ends "low/..." and "high/...", and "users/old".
    """
    old, new = (measure(ranked, eval_set, difference) for ranked in (before, after))
    rows: dict[str, dict[str, float]] = {name: {} for name in ("before", "after", "change", "low", "high")}
    figures: dict[str, float] = {f"users/{group}": len(next(iter(values.values()))) for group, values in new.items()}
    for group, values in new.items():
        for name, of_users in values.items():
            change = metrics.paired_bootstrap(of_users, old[group][name], seed=0)
            cells = (old[group][name].mean(), of_users.mean(), change["difference"], change["low"], change["high"])
            for row, value in zip(rows, cells, strict=True):
                rows[row][f"{group} {name}"] = figures[f"{row}/{group}/{name}"] = float(value)
    counts = ", ".join(f"{group}: {figures[f'users/{group}']:,} {GROUPS[group]}" for group in new)
    say(f"\ngoing on: test, items of the history removed ({counts}); the change with its 95% interval over users")
    say(report.table(rows, best=False))
    report.write_json(workdir / "eval" / "continual.json", figures)
