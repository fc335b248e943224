"""What a stage's softmax policy would have earned on logged impressions, beside the logging policy and the uniform one.

The policy is that of the objective `policy`: user vector . item vectors / temperature, over the items that the log showed in its train
part; of the others the log can say nothing. Rewards are predicted by a logistic regression of the train part, and everything is measured on
another part. The rows are taken as independent.

Intervals are normal ones. Where rewards are rare and weights large they are too narrow, for what was not drawn is not in the variance: on
3,000 rows with 16 clicks and weights up to 150, two in three held the true value, not 95%. `effective rewards` in the table shows it: below
some tens, believe no interval but that of the logging policy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special

from rec_jax.data.impression_batches import blocks
from rec_jax.data.impressions import Impressions
from rec_jax.data.prepare import Prepared
from rec_jax.eval import ctr_baselines, policy_value
from rec_jax.eval.encoder import Say
from rec_jax.eval.policy_value import Estimate
from rec_jax.towers import batches, two_tower
from rec_jax.types import Array, Params, RecJaxError

BLOCK = 1024  # impressions that are scored at a time
MOST_CELLS = 1 << 26  # of [impressions, items]: of a longer part so many rows are drawn
# Context fields that tell of the item that was shown, not of the circumstances (readers.open_bandit): of the other items nobody knows them,
# and a prediction for these that used them would depend on what was logged, which biases the doubly robust estimate too.
OF_ITEM = ("affinity",)
ROWS = {
    "logged": "logging policy, what it earned",
    "uniform": "uniform policy, SNIPS",
    "ips": "trained policy, IPS",
    "clipped_ips": "trained policy, clipped IPS",
    "snips": "trained policy, SNIPS",
    "dm": "trained policy, direct method",
    "dr": "trained policy, doubly robust",
}
PER = 1000  # a click is rare: the table has rewards per so many impressions
METRIC = "policy_value"


def asked(config: Any, prepared: Prepared, split: str) -> bool:
    """Whether a stage's policy is to be valued: it was trained by logged feedback, and this part of the log has propensities."""
    return config.objectives.policy.weight > 0 and prepared.impressions(split).propensity is not None


def allowed_items(prepared: Prepared) -> np.ndarray:
    """Whether the log ever showed each item in its train part -> [N] bool."""
    out = np.zeros(prepared.n_items, bool)
    out[prepared.impressions("train").item] = True
    return out


class Logged:
    """Values the policy of a stage's towers by logged impressions.

    Args:
      spec: of the towers.
      prepared: the data.
      temperature: of the softmax (config.objectives.policy.temperature).
      cap: of the weights of the clipped estimate; 0 = leave it out.
      features: of the catalogue's items, where the towers read some.
    """

    def __init__(self, spec: two_tower.TwoTowerSpec, prepared: Prepared, *, temperature: float, cap: float = 0.0, features: Any = None):
        self._prepared, self._cap, self._features = prepared, cap, features
        self.allowed = allowed_items(prepared)
        plain = two_tower.with_encoder(spec, False)

        def logits(params: Params, batch: Any, table: Array | None, features: Any) -> jax.Array:
            made = batches.encode_batch(params, plain, batch, table=table, features=features, catalogue=True, keys=None)
            return jnp.einsum("gqd,nd->gqn", made.user, made.catalogue) / temperature

        self._logits = jax.jit(logits)

    def probabilities(self, params: Params, table: np.ndarray | None, impressions: Impressions) -> np.ndarray:
        """Impressions [E], text vectors of the catalogue [N, D_text] -> the policy's probability of every item [E, N] float64.

        Rows sum to 1; items that the train part never showed have 0.
        """
        made = [np.asarray(self._logits(params, block, table, self._features), np.float64)[0] for block in blocks(impressions, BLOCK)]
        logits = np.concatenate(made)[: len(impressions)]
        return scipy.special.softmax(np.where(self.allowed, logits, -np.inf), axis=1)

    def measure(self, params: Params, table: np.ndarray | None, split: str, say: Say) -> dict[str, float]:
        """Values by SPLIT/policy_value_NAME for the names of ROWS, with _low, _high (95%), _rows (effective) and _mean_weight of each.

        And _rewards of those that are weighted, see `effective_rewards`. Impressions whose reward (the first label) was not observed are
        left out.

        Raises:
          RecJaxError: fewer than two rewards, rewards outside [0, 1], or as `policy_value`.
        """
        impressions = self._prepared.impressions(split)
        rows = np.flatnonzero(~np.isnan(impressions.labels[:, 0]))
        if len(rows) < 2:
            raise RecJaxError(f"{len(rows)} rewards were observed in the {split} part of the log: no policy can be valued by them")
        most = max(2, MOST_CELLS // self._prepared.n_items)
        if len(rows) > most:
            say(f"policies are valued by {most:,} of {len(rows):,} impressions, drawn by seed 0")
            rows = np.sort(np.random.default_rng(0).choice(rows, most, replace=False))
        taken = impressions[rows]
        say(f"  policies: {len(taken):,} impressions, {int((taken.labels[:, 0] != 0).sum()):,} of them with a reward")
        policy = self.probabilities(params, table, taken)
        found = estimates(taken, policy, predictor(self._prepared)(taken), self.allowed, cap=self._cap)
        return figures(found, effective_rewards(taken, policy, self.allowed, cap=self._cap), split)


def predictor(prepared: Prepared) -> Callable[[Impressions], np.ndarray]:
    """-> a function of impressions [E] that predicts the reward of every item [E, N], whatever item was shown.

    A logistic regression on user, item and context, fitted on the train part, its penalty chosen on the validation part.

    Raises:
      RecJaxError: rewards outside [0, 1], or none observed in one of these parts.
    """
    train, valid = prepared.impressions("train"), prepared.impressions("valid")
    kept = [n for n, field in enumerate(train.fields) if field not in OF_ITEM]
    sizes = (prepared.n_users, *(train.sizes[n] for n in kept), prepared.n_items)

    def fields(part: Impressions, item: np.ndarray) -> np.ndarray:
        return np.column_stack([part.user, part.context[:, kept], item])

    rewards = (np.asarray(part.labels[:, 0]) for part in (train, valid))
    model = ctr_baselines.fit_logistic(fields(train, train.item), next(rewards), sizes, valid=(fields(valid, valid.item), next(rewards)))

    def predict(impressions: Impressions) -> np.ndarray:
        return scipy.special.expit(model.logits_of_all(fields(impressions, impressions.item), -1))

    return predict


def estimates(
    impressions: Impressions, policy: np.ndarray, predictions: np.ndarray, allowed: np.ndarray, *, cap: float = 0.0
) -> dict[str, Estimate]:
    """Impressions [E], policy [E, N], predicted rewards [E, N], allowed [N] -> an Estimate for each name of ROWS.

    Args:
      impressions: with propensities, and rewards that were all observed.
      policy: probability of every item; rows sum to 1.
      predictions: from other rows than these.
      allowed: the items among which the uniform policy draws.
      cap: of the clipped estimate's weights; 0 = leave it out.

    Raises:
      RecJaxError: as `policy_value`.
    """
    rewards, items, propensities = np.asarray(impressions.labels[:, 0]), np.asarray(impressions.item), impressions.propensity
    assert propensities is not None
    target = policy_value.probability_of(policy, items)
    out = {
        "logged": policy_value.ips(rewards, propensities, propensities),
        "uniform": policy_value.snips(rewards, (allowed / allowed.sum())[items], propensities),
        "ips": policy_value.ips(rewards, target, propensities),
    }
    if cap:
        out["clipped_ips"] = policy_value.clipped_ips(rewards, target, propensities, cap=cap)
    return out | {
        "snips": policy_value.snips(rewards, target, propensities),
        "dm": policy_value.direct_method(predictions, policy),
        "dr": policy_value.doubly_robust(rewards, items, propensities, predictions, policy),
    }


def effective_rewards(impressions: Impressions, policy: np.ndarray, allowed: np.ndarray, *, cap: float = 0.0) -> dict[str, float]:
    """Arguments as of `estimates` -> how many rewards carry each weighted estimate: (sum of weight * reward)^2 / sum of their squares."""
    rewards, items = np.asarray(impressions.labels[:, 0], np.float64), np.asarray(impressions.item)
    propensities = np.asarray(impressions.propensity, np.float64)
    trained = policy_value.probability_of(policy, items) / propensities
    weights = {"logged": np.ones(len(items)), "uniform": (allowed / allowed.sum())[items] / propensities}
    weights |= dict.fromkeys(("ips", "snips", "dr"), trained)
    if cap:
        weights["clipped_ips"] = np.minimum(trained, cap)
    return {name: policy_value.effective_sample_size(weight * rewards) for name, weight in weights.items()}


def figures(found: Mapping[str, Estimate], rewards: Mapping[str, float], split: str) -> dict[str, float]:
    """Estimates and effective rewards by name -> metrics by name, as `Logged.measure` describes them."""
    out: dict[str, float] = {}
    for name, e in found.items():
        key = f"{split}/{METRIC}_{name}"
        out |= {key: e.value, f"{key}_low": e.low, f"{key}_high": e.high}
        out |= {f"{key}_rows": e.effective_sample_size, f"{key}_mean_weight": e.mean_weight}
    return out | {f"{split}/{METRIC}_{name}_rewards": value for name, value in rewards.items()}


def table_rows(metrics: Mapping[str, float], split: str) -> dict[str, dict[str, float]]:
    """Metrics of a stage -> rows of a table of its policy's values; none where it has none. Rewards are per PER impressions."""
    out = {}
    for name, title in ROWS.items():
        key = f"{split}/{METRIC}_{name}"
        if key in metrics:
            ends = {"": "reward", "_low": "95% from", "_high": "to"}
            counts = {"_rewards": "effective rewards", "_rows": "effective rows", "_mean_weight": "mean weight"}
            row = {column: PER * metrics[key + end] for end, column in ends.items()}
            out[title] = row | {column: metrics[key + end] for end, column in counts.items() if key + end in metrics}
    return out
