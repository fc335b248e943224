"""Histories are encoded with others of about their length: every user once, in few shapes, and the vectors of one by one."""

import jax
import numpy as np
import pytest
import tiny

from rec_jax.data.packing import texts_per_row
from rec_jax.eval import model as model_lib
from rec_jax.towers import two_tower
from rec_jax.types import Ragged


@pytest.mark.parametrize("longest", [10, 16, 100, 128])
def test_every_user_is_in_one_block_that_fits(longest):
    lengths = np.minimum(np.random.default_rng(0).geometric(0.05, 500), longest)
    lengths[:3] = 0, 1, longest
    blocks = model_lib.by_length(lengths, longest, 32)
    assert sorted(np.concatenate([users for users, _ in blocks]).tolist()) == list(range(500))
    for users, places in blocks:
        assert 0 < len(users) <= 32
        assert lengths[users].max() <= places <= longest
        assert places <= max(model_lib.SHORTEST, 2 * lengths[users].min())
    assert {places for _, places in blocks} <= {16, 32, 64, 128, longest}
    full = [len(users) == 32 for users, _ in blocks]
    assert full.count(False) <= len({places for _, places in blocks})


def test_vectors_are_those_of_each_history_alone():
    config = tiny.config(**{"batch.history_length": 40, "towers.user.max_positions": 40, "eval.users_per_block": 4})
    spec = two_tower.make_spec(config.towers, tiny.bert_spec(), texts_per_row=texts_per_row(64), n_items=tiny.N_ITEMS)
    model = model_lib.Model(config, tiny.World(), tiny.tokens(), spec, tiny.table())
    params = two_tower.init(jax.random.key(0), spec)
    items = model.item_vectors(params)
    rng = np.random.default_rng(1)
    histories = Ragged.from_rows([rng.integers(0, tiny.N_ITEMS, n) for n in (0, 1, 16, 17, 5, 40, 61, 33, 2, 16, 9, 70)])
    found = model.user_vectors(params, items, histories)
    encode = jax.jit(lambda histories: two_tower.user_vectors(params, spec, items, histories))
    for n in range(len(histories)):
        alone = encode(np.asarray(histories[n][-40:], np.int32)[None] if n else np.full((1, 1), -1))
        np.testing.assert_allclose(found[n], np.asarray(alone)[0], rtol=1e-5, atol=1e-6)
