"""The final evaluation of a workdir: stages and baselines on a split, as tables and as `eval/<split>.json`."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rec_jax import config as config_lib
from rec_jax.data import vocabulary
from rec_jax.data.prepare import Prepared, prepare
from rec_jax.eval import baselines, bootstrap, cold, cross, fusion, labelled, logged, rankings, report, top_n
from rec_jax.eval.encoder import Encoder, Say, encoder_of, load_encoder, text_table, text_vectors, trained_text
from rec_jax.eval.model import load, towers_of
from rec_jax.eval.workdir import best_params, read_config
from rec_jax.types import EvalSet, Ragged, RecJaxError

COLUMNS = ("ndcg@10", "hr@10", "recall@10", "ndcg@20", "hr@20", "mrr@10", "coverage@10")
CLICK_COLUMNS = (
    "auc", "gauc", "log_loss", "normalized_entropy", "calibration_error", "slate_auc", "slate_mrr", "slate_ndcg@5", "slate_ndcg@10",
)  # fmt: skip
OVERRIDES = (
    "eval.baselines", "eval.fuse", "eval.ease_max_items", "eval.ease_regularisation", "eval.ease_popularity_power", "eval.top_n",
)  # fmt: skip  # keys that an evaluation may set otherwise: they change no model
TEXTS_TIMED = 512  # texts by which an encoder's speed is measured
Metrics = dict[str, float]


def measure_baselines(
    config: Any, prepared: Prepared, eval_set: EvalSet, split: str, say: Say, *, table: Callable[[], np.ndarray]
) -> dict[str, Metrics]:
    """Each baseline of `config.eval.baselines` fitted on the train events and ranked like the model -> name -> metrics.

    `table` makes text vectors of the catalogue, for those that read them.
    """
    e, out = config.eval, {}
    for name in e.baselines:
        if name == "ease" and min(eval_set.n_items, prepared.n_users) > e.ease_max_items:
            say(f"ease is left out: {eval_set.n_items:,} items, above eval.ease_max_items={e.ease_max_items:,}, and as many users")
            continue
        began = time.perf_counter()
        scorer = baselines.of_config(name, config, prepared, table)
        ranked = rankings.evaluate_scores(scorer, eval_set, ks=tuple(e.k), name=split, users_per_block=e.users_per_block)
        out[name] = _with_cold(ranked, prepared, split)
        say(f"  {name}: {time.perf_counter() - began:.0f} s")
    return out


def text_alone(config: Any, table: np.ndarray, eval_set: EvalSet, split: str) -> rankings.Rankings:
    """Ranks by texts alone: text vectors of the catalogue [N, D_text], centred and of unit length; a user is the mean of the history's."""
    items = table - table.mean(0)
    items /= np.maximum(np.linalg.norm(items, axis=1, keepdims=True), 1e-12)
    users = np.zeros((len(eval_set.users), items.shape[1]), np.float32)
    for n in range(len(users)):
        history = eval_set.history[n]
        if len(history):
            users[n] = items[history].mean(0)
    e = config.eval
    return rankings.evaluate_vectors(
        users, items.astype(np.float32), eval_set, ks=tuple(e.k), name=split, users_per_block=e.users_per_block
    )


def texts_per_second(encoder: Encoder, tokens: Ragged, row_tokens: int) -> float:
    """How many of the catalogue's texts an encoder takes a second on this machine, packed, once it is compiled; best of three."""
    some = Ragged.from_rows([tokens[n] for n in range(min(TEXTS_TIMED, len(tokens)))])
    params, spec = jax.device_put(encoder[0]), encoder[1]
    text_vectors(some, params, spec, row_tokens)
    best = np.inf
    for _ in range(3):
        began = time.perf_counter()
        text_vectors(some, params, spec, row_tokens)
        best = min(best, time.perf_counter() - began)
    return len(some) / best


def _stage(workdir: epath.Path, whole: Any, stage: str | None, split: str, say: Say) -> tuple[Metrics, str]:
    """Measures a stage, writes its figures into its folder -> (metrics, what they are: "ranking", "texts", "labels" or "pairs")."""
    config = config_lib.for_stage(whole, stage) if stage else whole
    folder, prepared = workdir / stage if stage else workdir, prepare(config)
    if config.batch.kind == "texts":
        params, _ = best_params(folder)
        encoder = trained_text(config, params), encoder_of(whole, workdir, stage, prepared)[1]
        ranked = text_alone(config, _table(config, encoder, prepared, say), prepared.eval_set(split), split)
    elif config.batch.kind == "impressions":
        trained = load(workdir, stage, say=say)
        table = trained.model.table
        if table is None and trained.model.spec.item_text:
            table = text_vectors(trained.model.tokens, trained.params["text"], trained.model.spec.text, config.batch.row_tokens)
        found = labelled.Labelled(trained.model.spec, prepared, trained.model.features).measure(trained.params, table, split)
        if logged.asked(config, prepared, split):
            policy = config.objectives.policy
            features = trained.model.features
            values = logged.Logged(trained.model.spec, prepared, temperature=policy.temperature, cap=policy.cap, features=features)
            found |= values.measure(trained.params, table, split, say)
        if rank := top_n.ranker(config, prepared, split, say):
            users_per_block = config.eval.users_per_block
            scorer = top_n.of_towers(trained.params, trained.model.spec, trained.items, users_per_block=users_per_block)
            found |= rank(scorer, stage or "model")
        if stage:
            report.write_json(folder / "eval" / f"{split}.json", found)
        return found, "labels"
    elif config.batch.kind == "pairs":
        params, _ = best_params(folder)
        towers = towers_of(config, prepared, encoder_of(whole, workdir, stage, prepared)[1])
        model = cross.CrossEncoder(config, prepared, vocabulary.catalogue_tokens(config, prepared), towers)
        if not config.eval.rerank:
            found = model.measure(params, split)
            if stage:
                report.write_json(folder / "eval" / f"{split}.json", found)
            return found, "pairs"
        before = _ranking_stage_before(whole, stage)
        ranked = model.rerank(params, cross.first_rankings(config, prepared, workdir, before, split, say), split)
    else:
        trained = load(workdir, stage, say=say)
        ranked = trained.model.rank(trained.params, prepared.eval_set(split), name=split, items=trained.items)
    found = _with_cold(ranked, prepared, split)
    if stage:
        report.write_json(folder / "eval" / f"{split}.json", found)
    users = prepared.eval_set(split).users
    fingerprint = prepared.meta["fingerprint"]
    bootstrap.write_users(folder, split, users, ranked.per_user, fingerprint=fingerprint)
    if stage and stage == whole.stages[-1]:
        bootstrap.write_users(workdir, split, users, ranked.per_user, fingerprint=fingerprint)
    return found, "texts" if config.batch.kind == "texts" else "ranking"


def _with_cold(ranked: rankings.Rankings, prepared: Prepared, split: str) -> Metrics:
    """The metrics, and those of cold targets alone."""
    ks = sorted({int(name.partition("@")[2]) for name in ranked.metrics if name.startswith(f"{split}/ndcg@")})
    return ranked.metrics | cold.measure(ranked.ranks, prepared.eval_set(split), prepared.item_counts(), ks=ks, name=split)


def _ranking_stage_before(whole: Any, stage: str | None) -> str | None:
    """The last stage before another one that ranks by vectors or a task head; None where there is none."""
    earlier = whole.stages[: whole.stages.index(stage)] if stage else ()
    ranking = [name for name in earlier if config_lib.for_stage(whole, name).batch.kind == "histories"]
    return ranking[-1] if ranking else None


def _table(config: Any, encoder: Encoder, prepared: Prepared, say: Say) -> np.ndarray:
    return text_table(config, vocabulary.catalogue_tokens(config, prepared), *encoder, say)


def run(workdir: epath.PathLike, split: str = "test", *, overrides: Sequence[tuple[str, str]] = (), say: Say = print) -> dict[str, Metrics]:
    """Evaluates the stages of a workdir and the baselines, writes `eval/<split>.json` and says the tables -> row name -> metrics.

    Each stage's figures are also in its own folder; those at the top are the last stage's, with the baselines' beside them, and those of
    the last stage and `config.eval.fuse` together, which have a folder too.

    Args:
      overrides: keys among `OVERRIDES` that differ from the workdir's config for this evaluation, as (key, text).

    Raises:
      RecJaxError: nothing trained there, an override of another key.
    """
    for key, text in overrides:
        if key not in OVERRIDES:
            raise RecJaxError(f"--config.{key}={text}: an evaluation takes {', '.join(OVERRIDES)}; the rest is the workdir's")
    whole, workdir = read_config(workdir, overrides), epath.Path(workdir)
    fusion.check(whole)
    rows: dict[str, Metrics] = {}
    clicks: dict[str, Metrics] = {}
    pairs: dict[str, Metrics] = {}
    last: Metrics = {}
    for stage in whole.stages or (None,):
        last, kind = _stage(workdir, whole, stage, split, say)
        if kind == "labels":
            clicks[stage or "model"] = last
        elif kind == "pairs":
            pairs[stage or "model"] = last
        else:
            rows[f"{stage}: texts alone" if kind == "texts" else stage or "model"] = last
    config = config_lib.for_stage(whole, whole.stages[-1]) if whole.stages else whole
    prepared, flat = prepare(config), dict(last)
    if rows:
        texts = functools.cache(lambda: _table(config, load_encoder(whole, prepared), prepared, say))
        others = measure_baselines(config, prepared, prepared.eval_set(split), split, say, table=texts)
        if any(name.endswith(": texts alone") for name in rows):
            others["texts alone"] = text_alone(config, texts(), prepared.eval_set(split), split).metrics
        flat |= _named(others, split)
        table = {**others, **rows}
        if config.eval.fuse:
            row, both = _fuse(workdir, config, whole.stages[-1] if whole.stages else None, prepared, split, say, texts)
            table[row] = rows[row] = both
            weights = {f"{fusion.FOLDER}/{key}": value for key, value in both.items() if key.startswith("weight/")}
            flat |= _named({fusion.FOLDER: both}, split) | weights
        titles = {split: "items of the history removed", f"{split}_all": "nothing removed"}
        if users := last.get(f"{split}_cold/users"):
            most = cold.most_seen(prepared.item_counts())
            titles[f"{split}_cold"] = f"the {users:,} users whose target training saw at most {most} times (a tenth of the items or more)"
        # With one target each, recall is hr.
        several = prepared.eval_set(split).targets.lengths().max() > 1
        columns = [c for c in COLUMNS if several or not c.startswith("recall")]
        for prefix, title in titles.items():
            shown = {name: {c: m[f"{prefix}/{c}"] for c in columns if f"{prefix}/{c}" in m} for name, m in table.items()}
            say(f"\n{split}: {title}\n{report.table(shown)}")
    if clicks:
        rank = top_n.ranker(config, prepared, split, say)
        fitted = labelled.baselines(prepared, split, say, rank)
        counted = {name: rank(scorer(prepared), name) for name, scorer in top_n.COUNTED.items()} if rank else {}
        for name, metrics in {**fitted, **counted}.items():
            flat |= {f"{name}/{metric.removeprefix(split + '/')}": v for metric, v in metrics.items()}
        shown = {n: {c: m[f"{split}/{c}"] for c in CLICK_COLUMNS if f"{split}/{c}" in m} for n, m in {**fitted, **clicks}.items()}
        say(f"\n{split}: labels of impressions\n{report.table(shown, best=False)}")
        for prefix, title in top_n.titles(split).items() if rank else ():
            columns = [f"{prefix}/{c}" for c in COLUMNS if not c.startswith("recall")]  # of one target it is hr
            every = {**counted, **fitted, **clicks}.items()
            shown = {n: {c.removeprefix(prefix + "/"): m[c] for c in columns if c in m} for n, m in every}
            say(f"\n{split}: {title}\n{report.table(shown)}")
        for name, metrics in clicks.items():
            if valued := logged.table_rows(metrics, split):
                say(f"\n{split}: {name}, reward per {logged.PER:,} impressions by the log\n{report.table(valued, best=False)}")
    if pairs:
        say(f"\n{split}: the target beside batch.pair_negatives drawn items\n{report.table(pairs)}")
    report.write_json(workdir / "eval" / f"{split}.json", flat)
    return {**rows, **clicks, **pairs}


def _fuse(
    workdir: epath.Path, config: Any, stage: str | None, prepared: Prepared, split: str, say: Say, table: Callable[[], np.ndarray]
) -> tuple[str, Metrics]:
    """Ranks the last stage and the baselines of config.eval.fuse together, writes its figures into `fusion.FOLDER` -> (row, metrics)."""
    began, name = time.perf_counter(), stage or "model"
    trained = load(workdir, stage, say=say)
    model = trained.model.scorer(trained.params, trained.items)
    ranked, weights = fusion.fused(config, prepared, model, name, split, say, table=table)
    found = _with_cold(ranked, prepared, split) | {f"weight/{part}": weight for part, weight in weights.items()}
    folder, row = workdir / fusion.FOLDER, " + ".join((name, *weights))
    report.write_json(folder / "eval" / f"{split}.json", found)
    users, fingerprint = prepared.eval_set(split).users, prepared.meta["fingerprint"]
    bootstrap.write_users(folder, split, users, ranked.per_user, fingerprint=fingerprint)
    say(f"  {row}: {time.perf_counter() - began:.0f} s")
    return row, found


def _named(others: dict[str, Metrics], split: str) -> Metrics:
    """The baselines' metrics under their names, those of the first protocol without the split."""
    out: Metrics = {}
    for name, metrics in others.items():
        key = name.replace(" ", "_")
        out |= {f"{key}/{metric.removeprefix(split + '/')}": v for metric, v in metrics.items() if metric.startswith(split + "/")}
        out |= {f"{key}/{metric}": v for metric, v in metrics.items() if metric.startswith((f"{split}_all/", f"{split}_cold/"))}
    return out


def costs(workdir: epath.PathLike, *, say: Say = print) -> None:
    """Says what each stage has cost and left: minutes, parameters, the encoder's speed on this machine; of a student also the share that
    it keeps of the NDCG@10 of the stage before, its teacher."""
    workdir, whole = epath.Path(workdir), read_config(workdir)
    rows: dict[str, Metrics] = {}
    speeds: dict[Any, float] = {}
    sizes: dict[Any, int] = {}
    before: Metrics = {}
    for stage in whole.stages:
        config = config_lib.for_stage(whole, stage)
        prepared, kept = prepare(config), json.loads((workdir / stage / "stage.json").read_text())
        encoder = encoder_of(whole, workdir, stage, prepared)
        if encoder[1] not in speeds:
            tokens = vocabulary.catalogue_tokens(config, prepared)
            speeds[encoder[1]] = texts_per_second(encoder, tokens, config.batch.row_tokens)
            sizes[encoder[1]] = sum(int(np.size(x)) for x in jax.tree.leaves(encoder[0]))
        figures = json.loads((workdir / stage / "eval" / "test.json").read_text())
        rows[stage] = {
            "minutes": kept["cost"]["seconds"] / 60,
            "trained (million)": kept["cost"]["parameters"] / 1e6,
            "encoder (million)": sizes[encoder[1]] / 1e6,
            "texts/s": speeds[encoder[1]],
        } | {name: figures[f"test/{name}"] for name in ("ndcg@10", "hr@10", "auc") if f"test/{name}" in figures}
        if config_lib.is_student(config) and before.get("ndcg@10") and not config.teacher.path:
            rows[stage]["kept"] = rows[stage]["ndcg@10"] / before["ndcg@10"]
        before = rows[stage]
    say(f"\nwhat each stage cost, and what it left\n{report.table(rows, best=False)}")
