"""The sharding rule and the micro-batch loop, by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from visionfm_jax.parallel.mesh import FSDP, make_mesh
from visionfm_jax.parallel.zero import Zero, accumulate_gradients, shard_dim

PARAMS = {
    "embed": {"kernel": jnp.zeros((6, 16)), "bias": jnp.zeros(16)},
    "blocks": {"kernel": jnp.zeros((8, 16, 24)), "scale": jnp.zeros((8, 16))},
    "odd": {"kernel": jnp.zeros((7, 9))},
}


def dims(shards: int) -> dict[str, int | None]:
    flat = jax.tree_util.tree_leaves_with_path(PARAMS)
    return {"/".join(k.key for k in path): shard_dim(path, leaf, shards) for path, leaf in flat}


def test_the_largest_dividing_dim_is_sharded_never_layers_or_vectors():
    expected = {"embed/kernel": -1, "embed/bias": None, "blocks/kernel": -1, "blocks/scale": None, "odd/kernel": None}
    assert dims(8) == expected
    assert dims(16) == {**expected, "blocks/kernel": -2}  # 24 does not divide by 16, the 16 rows do
    assert dims(3) == {**expected, "embed/kernel": -2, "odd/kernel": -1}
    assert set(dims(1).values()) == {None}


def test_specs_name_the_axis_in_the_right_place():
    specs = Zero(make_mesh(), 3, PARAMS, jnp.bfloat16).state_specs
    assert specs["blocks"]["kernel"] == P(None, None, FSDP)
    assert specs["embed"]["kernel"] == P(None, FSDP)
    assert specs["embed"]["bias"] == specs["odd"]["kernel"] == P()
    assert set(jax.tree.leaves(Zero(make_mesh(), 0, PARAMS, jnp.bfloat16).state_specs)) == {P()}


def test_replicas_are_groups_of_neighbours():
    mesh = make_mesh(2)
    assert mesh.shape == {"replica": 2, "fsdp": 4}
    assert [d.id for d in mesh.devices[0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_micro_batches_keep_order_and_sum_in_fp32(accumulate):
    batch = {"x": jnp.arange(8.0)}

    def micro(rows):
        return {"row": rows["x"]}, jnp.sum(rows["x"]).astype(jnp.bfloat16)

    per_sample, total = accumulate_gradients(micro, batch, accumulate)
    np.testing.assert_array_equal(per_sample["row"], batch["x"])
    assert float(total) == 28
    assert total.dtype == (jnp.bfloat16 if accumulate == 1 else jnp.float32)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_gradient_of_a_product_is_that_of_one_device(stage):
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32), "b": jnp.ones(16)}
    batch = {"x": jnp.asarray(rng.normal(size=(32, 8)), jnp.float32)}

    def loss(params, rows, _=None):
        y = jnp.tanh(rows["x"] @ params["w"] + params["b"]).sum(-1)
        return y.mean(), {"y": y}, {"y": y.mean()}

    zero = Zero(make_mesh(2), stage, params, jnp.float32)
    stored = jax.device_put(params, zero.shardings(zero.state_specs))
    per_sample, means, grads = jax.jit(lambda p, b: zero.loss_and_grads(loss, p, b, 2))(stored, batch)
    expected, (rows, mean) = jax.grad(lambda *inputs: (lambda loss, *rest: (loss, rest))(*loss(*inputs)), has_aux=True)(
        params, batch
    )
    chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close((per_sample, means), (rows, mean), rtol=1e-5)
    assert grads["w"].sharding.spec == zero.state_specs["w"]
