"""A contextual bandit whose reward probabilities are known: the true value of any policy is a sum, and logs can be drawn from it."""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Logs:
    """Rows drawn by a logging policy: contexts, actions [B] int32, rewards (0 or 1), propensities [B] float64."""

    contexts: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    propensities: np.ndarray


@dataclasses.dataclass(frozen=True)
class Bandit:
    """Contexts X and actions A.

    Attributes:
      frequency: [X], how often each context comes; sums to 1.
      reward: [X, A], probability of reward 1.
      logging: [X, A], the policy that draws the logs; every row sums to 1 and is above 0.
    """

    frequency: np.ndarray
    reward: np.ndarray
    logging: np.ndarray

    def value(self, policy: np.ndarray, *, k: int = 1) -> float:
        """policy [X, A] -> its true value: the expected sum of rewards of the distinct actions among k draws; k = 1 is the mean reward."""
        shown = 1 - (1 - policy) ** k
        return float(np.einsum("x,xa,xa->", self.frequency, shown, self.reward))

    def draw(self, rows: int, *, seed: int) -> Logs:
        """Rows that the logging policy takes and earns."""
        random = np.random.default_rng(seed)
        contexts = random.choice(len(self.frequency), rows, p=self.frequency)
        above = random.random((rows, 1)) > np.cumsum(self.logging, axis=1)[contexts]
        actions = np.minimum(above.sum(1), self.reward.shape[1] - 1)
        rewards = (random.random(rows) < self.reward[contexts, actions]).astype(np.float64)
        return Logs(contexts.astype(np.int32), actions.astype(np.int32), rewards, self.logging[contexts, actions])


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [X, A] -> policy [X, A]."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def make(seed: int = 0, *, contexts: int = 6, actions: int = 8, sharpness: float = 0.7) -> Bandit:
    """A bandit whose logging policy prefers actions at random, with no regard to what they earn; `sharpness` is by how much."""
    random = np.random.default_rng(seed)
    reward = random.beta(1.0, 3.0, (contexts, actions))
    return Bandit(random.dirichlet(np.full(contexts, 5.0)), reward, softmax(sharpness * random.normal(size=(contexts, actions))))


def better(bandit: Bandit, *, sharpness: float = 4.0) -> np.ndarray:
    """A target policy [X, A] that prefers what earns more."""
    return softmax(sharpness * bandit.reward)
