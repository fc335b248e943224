"""The final evaluation of a workdir: the model and the baselines on a split, as a table and as `eval/<split>.json`."""

from __future__ import annotations

import time
from typing import Any

from etils import epath

from rec_jax.data.prepare import Prepared
from rec_jax.eval import baselines, rankings, report
from rec_jax.eval.model import Say, Trained, load, read_config
from rec_jax.types import EvalSet

COLUMNS = ("ndcg@10", "hr@10", "ndcg@20", "hr@20", "mrr@10", "coverage@10")


def measure_baselines(config: Any, prepared: Prepared, eval_set: EvalSet, split: str, say: Say) -> dict[str, dict[str, float]]:
    """Each baseline of `config.eval.baselines` fitted on the train events and ranked like the model -> name -> metrics."""
    train, e, out = prepared.train_histories(), config.eval, {}
    for name in e.baselines:
        if name == "ease" and eval_set.n_items > e.ease_max_items:
            say(f"ease is left out: {eval_set.n_items:,} items, above eval.ease_max_items={e.ease_max_items:,}")
            continue
        began = time.perf_counter()
        scorer = baselines.fit(name, train, eval_set.n_items)
        out[name] = rankings.evaluate_scores(scorer, eval_set, ks=tuple(e.k), name=split, users_per_block=e.users_per_block).metrics
        say(f"  {name}: {time.perf_counter() - began:.0f} s")
    return out


def stage_metrics(trained: Trained, split: str) -> dict[str, float]:
    """Metrics of a trained stage on a split, `test/...` with the history's items removed and `test_all/...` with nothing removed."""
    eval_set = trained.model.prepared.eval_set(split)
    return trained.model.rank(trained.params, eval_set, name=split, items=trained.items).metrics


def run(workdir: epath.PathLike, split: str = "test", *, say: Say = print) -> dict[str, dict[str, float]]:
    """Evaluates the stages of a workdir and the baselines, writes `eval/<split>.json` and says the table -> row name -> metrics.

    Each stage's figures are also in its own folder; those at the top are the last stage's, with the baselines' beside them.

    Raises:
      RecJaxError: nothing trained there.
    """
    config, workdir = read_config(workdir), epath.Path(workdir)
    rows: dict[str, dict[str, float]] = {}
    trained = None
    for stage in config.stages or (None,):
        trained = load(workdir, stage, say=say)
        rows[stage or "model"] = stage_metrics(trained, split)
        if stage:
            report.write_json(workdir / stage / "eval" / f"{split}.json", rows[stage])
    assert trained is not None
    model = rows[config.stages[-1] if config.stages else "model"]
    prepared = trained.model.prepared
    others = measure_baselines(config, prepared, prepared.eval_set(split), split, say)
    flat = dict(model)
    for name, metrics in others.items():
        flat |= {f"{name}/{metric.removeprefix(split + '/')}": v for metric, v in metrics.items() if metric.startswith(split + "/")}
        flat |= {f"{name}/{metric}": v for metric, v in metrics.items() if metric.startswith(split + "_all/")}
    report.write_json(workdir / "eval" / f"{split}.json", flat)
    table = {**others, **rows}
    for title, prefix in ((f"{split}: items of the history removed", split), (f"{split}: nothing removed", f"{split}_all")):
        shown = {name: {c: m[f"{prefix}/{c}"] for c in COLUMNS if f"{prefix}/{c}" in m} for name, m in table.items()}
        say(f"\n{title}\n{report.table(shown)}")
    return table
