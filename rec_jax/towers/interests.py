"""Several vectors of a user, one for each interest: how a history makes them, which of them seeks a target, and what they score together.

Reference: Cen et al., "Controllable Multi-Interest Framework for Recommendation" (2020), sections 3.2 (self-attentive method) and 3.3. Ours
begins at the history tower's output, sees of each place what the tower itself sees, and adds the place's own vector to each interest, so
that the newest item counts, and the hidden places of a window differ.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

WIDER = 4  # the hidden layer that says how much a place is of each interest, against D


class Interests(nn.Module):
    """x [R, S, D], mask [R, S, S] (True where a place sees another) -> [R, S, K, D]."""

    interests: int

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = nn.tanh(nn.Dense(WIDER * x.shape[-1], use_bias=False, name="hidden")(x))
        logits = nn.Dense(self.interests, use_bias=False, name="interest")(hidden).astype(jnp.float32)
        # Of each interest: what a place sees, by how much that is of the interest.
        seen = jnp.where(mask[:, None], jnp.einsum("rtk->rkt", logits)[:, :, None], -1e30)
        return x[:, :, None] + jnp.einsum("rkst,rtd->rskd", jax.nn.softmax(seen, axis=-1).astype(x.dtype), x)


def nearest(users: jax.Array, targets: jax.Array) -> jax.Array:
    """users [..., K, D], targets [..., D] -> [..., D], of each query the vector of highest dot product with its target; only it gets the
    gradient. Of equal ones it is the first.
    """
    best = jnp.argmax(jnp.einsum("...kd,...d->...k", users, targets), axis=-1)
    return jnp.take_along_axis(users, best[..., None, None], axis=-2)[..., 0, :]


def scores(users: jax.Array, items: jax.Array) -> jax.Array:
    """users [q, D] or [q, K, D], items [N, D] -> scores [q, N]: dot products, the highest of each user's vectors."""
    if users.ndim == 2:
        return users @ items.T
    # One interest at a time: no [q, K, N] array exists.
    return functools.reduce(jnp.maximum, (users[:, n] @ items.T for n in range(users.shape[1])))
