import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rec_jax import mesh
from rec_jax.checkpoint import Checkpoints
from rec_jax.types import RecJaxError


def state(value=1.0):
    params = {"a": {"w": jnp.full((8, 4), value), "b": jnp.arange(3.0)}}
    return {"params": params, "opt_state": optax.adamw(1e-3).init(params), "step": jnp.int32(3), "rng": jnp.arange(2, dtype=jnp.uint32)}


def like(tree, m, rules=((".*", ()),)):
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, mesh.shardings(tree, rules, m))


def test_latest_and_best_stay(tmp_path):
    c = Checkpoints(tmp_path / "c")
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        c.save(step, state(step), {"at": step}, best=best)
    c.wait()
    assert c.steps() == [2, 4]
    assert c.latest_step() == 4
    assert c.place(2) == {"at": 2}
    c.close()


@pytest.mark.parametrize("devices", [1, 2, 8])
def test_restores_on_another_number_of_devices(tmp_path, devices):
    rules = (("params/a/w", ("data",)), (".*", ()))
    eight = mesh.make_mesh({"data": 8})
    tree = jax.device_put(state(2.0), mesh.shardings(state(), rules, eight))
    c = Checkpoints(tmp_path / "c")
    c.save(1, tree, {}, best=None)
    c.wait()
    fewer = mesh.make_mesh({"data": devices}, devices=jax.devices()[:devices])
    back = c.restore(1, like(state(), fewer, rules))
    c.close()
    assert len(back["params"]["a"]["w"].sharding.device_set) == devices
    assert jax.tree.structure(back) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


def test_a_part_is_enough(tmp_path):
    c = Checkpoints(tmp_path / "c")
    c.save(1, state(5.0), {}, best=1)
    c.close()
    c = Checkpoints(tmp_path / "c", read_only=True)
    one = mesh.make_mesh({"data": 1}, devices=jax.devices()[:1])
    back = c.restore(1, like({"params": state()["params"]}, one), part=True)
    np.testing.assert_array_equal(back["params"]["a"]["w"], np.full((8, 4), 5.0))
    assert c.arrays(1)["params/a/w"][0] == (8, 4)


def test_errors_name_the_step_and_the_array(tmp_path):
    with pytest.raises(RecJaxError, match="no checkpoints at"):
        Checkpoints(tmp_path / "nothing", read_only=True)
    c = Checkpoints(tmp_path / "c")
    c.save(1, state(), {}, best=1)
    c.wait()
    one = mesh.make_mesh({"data": 1}, devices=jax.devices()[:1])
    with pytest.raises(RecJaxError, match=r"no checkpoint of step 7 .* there are \[1\]"):
        c.restore(7, like(state(), one))
    other = state()
    other["params"]["a"]["w"] = jnp.zeros((8, 5))
    with pytest.raises(RecJaxError, match=r"params/a/w is \(8, 4\) in it, but the config makes it \(8, 5\)"):
        c.restore(1, like(other, one))
    del other["params"]["a"]
    other["params"]["c"] = jnp.zeros(2)
    with pytest.raises(RecJaxError, match="use another --workdir"):
        c.restore(1, like(other, one))
    c.close()


def test_a_half_written_checkpoint_does_not_count(tmp_path):
    c = Checkpoints(tmp_path / "c")
    c.save(1, state(), {"at": 1}, best=1)
    c.close()
    # A writer that was killed leaves its temporary folder behind.
    (tmp_path / "c" / "2.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "c" / "2.orbax-checkpoint-tmp" / "state").mkdir()
    c = Checkpoints(tmp_path / "c")
    assert c.steps() == [1]
    c.save(2, state(), {"at": 2}, best=1)
    c.wait()
    assert c.steps() == [1, 2]
    c.close()
