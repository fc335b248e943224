"""How well a stage predicts the labels of impressions, beside a logistic regression and a factorisation machine of the same split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rec_jax.data.impression_batches import blocks
from rec_jax.data.impressions import Impressions
from rec_jax.data.prepare import Prepared
from rec_jax.eval import ctr_baselines, pointwise_metrics, slates, top_n
from rec_jax.eval.encoder import Say
from rec_jax.towers import batches, two_tower
from rec_jax.types import Params

BLOCK = 4096  # impressions that are scored at a time
BASELINES: dict[str, Callable[..., ctr_baselines.ClickModel]] = {
    "logistic": ctr_baselines.fit_logistic,
    "factorisation_machine": ctr_baselines.fit_fm,
}


class Labelled:
    """Scores impressions with a stage's towers.

    Args:
      spec: of the towers.
      prepared: the data.
      features: of the catalogue's items, where the towers read some.
    """

    def __init__(self, spec: two_tower.TwoTowerSpec, prepared: Prepared, features: Any = None):
        self._prepared, self._features = prepared, features
        plain = two_tower.with_encoder(spec, False)
        self._scores = jax.jit(
            lambda params, batch, table, features: (
                batches.encode_batch(params, plain, batch, table=table, features=features, catalogue=False, keys=None, scores=True).scores
            )
        )

    def logits(self, params: Params, table: np.ndarray | None, impressions: Impressions) -> np.ndarray:
        """Impressions [E], text vectors of the catalogue [N, D_text] -> logits [E, L]."""
        made = [np.asarray(self._scores(params, block, table, self._features))[0] for block in blocks(impressions, BLOCK)]
        return np.concatenate(made)[: len(impressions)]

    def measure(self, params: Params, table: np.ndarray | None, split: str) -> dict[str, float]:
        """Metrics of a part of the data, SPLIT/METRIC for the first task and SPLIT/TASK/METRIC for the others."""
        impressions = self._prepared.impressions(split)
        return metrics_of(self.logits(params, table, impressions), impressions, split, clock=self._prepared.meta["clock"])


def metrics_of(logits: np.ndarray, impressions: Impressions, split: str, *, clock: bool = False) -> dict[str, float]:
    """logits [E, L] -> metrics by name: those of clicks where a task's labels are 0 or 1, else errors of a regression.

    With a clock, what a user was shown at one time is a slate, and clicks are measured within slates as well, where there are any.
    """
    out: dict[str, float] = {}
    for n, task in enumerate(impressions.tasks):
        labels, place = np.asarray(impressions.labels[:, n]), f"{split}/{task}" if n else split
        seen = labels[~np.isnan(labels)]
        if np.isin(seen, (0, 1)).all():
            found = pointwise_metrics.binary_metrics(logits[:, n], labels, users=np.asarray(impressions.user))
            found |= _within_slates(logits[:, n], labels, impressions) if clock else {}
        else:
            found = {"rmse": pointwise_metrics.rmse(logits[:, n], labels), "mae": pointwise_metrics.mae(logits[:, n], labels)}
        out |= {f"{place}/{name}": value for name, value in found.items()}
    return out


def _within_slates(scores: np.ndarray, labels: np.ndarray, impressions: Impressions) -> dict[str, float]:
    """The metrics of slates; none where no slate has both a positive and a negative."""
    found = slates.slate_metrics(scores, labels, slates.slates_of(np.asarray(impressions.user), np.asarray(impressions.time)))
    return found if found["slates"] else {}


def baselines(prepared: Prepared, split: str, say: Say, rank: top_n.Ranker | None = None) -> dict[str, dict[str, float]]:
    """Each of BASELINES, fitted on the first task of the train part, its penalty chosen on the validation part -> metrics of `split`.

    With `rank` they have the metrics of top-n too.
    """
    parts = {name: prepared.impressions(name) for name in {"train", "valid", split}}
    sizes = (prepared.n_users, prepared.n_items, *parts["train"].sizes)
    fields = {name: np.column_stack([part.user, part.item, part.context]) for name, part in parts.items()}
    labels = {name: np.asarray(part.labels[:, 0]) for name, part in parts.items()}
    out = {}
    for name, fit in BASELINES.items():
        model = fit(fields["train"], labels["train"], sizes, valid=(fields["valid"], labels["valid"]))
        logits = model.logits(fields[split])
        found = pointwise_metrics.binary_metrics(logits, labels[split], users=np.asarray(parts[split].user))
        found |= _within_slates(logits, labels[split], parts[split]) if prepared.meta["clock"] else {}
        out[name] = {f"{split}/{metric}": value for metric, value in found.items()}
        say(f"  {name}: auc {found['auc']:.4f}")
        out[name] |= rank(top_n.of_clicks(model), name) if rank else {}
    return out
