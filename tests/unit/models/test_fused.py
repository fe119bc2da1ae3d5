"""Fused forms equal the plain ones, values and gradients."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from visionfm_jax.models.fused import LayerNorm, add_rows, gelu, products


def relative(ours, plain):
    ours, plain = (np.asarray(a, np.float64) for a in (ours, plain))
    return np.linalg.norm(ours - plain) / np.linalg.norm(plain)


def both(f, plain, *inputs):
    """Largest relative error of value and gradients, under a random cotangent."""
    cotangent = jax.random.normal(jax.random.key(9), jax.eval_shape(plain, *inputs).shape)

    def of(f):
        y, vjp = jax.vjp(f, *inputs)
        return jax.tree.leaves((y, vjp(cotangent.astype(y.dtype))))

    return max(relative(a, b) for a, b in zip(of(f), of(plain), strict=True))


def test_gelu_is_the_exact_one():
    x = jnp.concatenate([jnp.linspace(-12, 12, 4001), 4 * jax.random.normal(jax.random.key(0), (4000,))])
    assert both(gelu, lambda x: nn.gelu(x, approximate=False), x) < 1e-6
    assert gelu(jnp.float32([-1e30, -40.0, 0.0, 40.0, 1e30])).tolist() == [0, 0, 0, 40, np.float32(1e30)]
    far = jax.vmap(jax.grad(gelu))(jnp.float32([-1e30, -40.0, 40.0, 1e30]))
    assert far.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_gelu_in_16_bit_is_rounded_once(dtype):
    x = (3 * jax.random.normal(jax.random.key(0), (1000,))).astype(dtype)
    assert gelu(x).dtype == dtype
    exact = nn.gelu(x.astype(jnp.float32), approximate=False)
    # Half of the distance to the next number of 16 bit, and what fp32 adds where Φ is near 0.
    assert (jnp.abs(gelu(x) - exact) <= float(jnp.finfo(dtype).eps) / 2 * jnp.abs(exact) + 1e-6).all()


def test_products_are_those_of_each_kernel():
    keys = jax.random.split(jax.random.key(0), 4)
    x, *kernels = (jax.random.normal(key, shape) for key, shape in zip(keys, [(9, 8), *3 * [(8, 5)]], strict=True))

    def joined(f):
        return lambda x, kernels: jnp.concatenate(f(x, kernels), 1)

    assert both(joined(products), joined(lambda x, ks: [x @ k for k in ks]), x, tuple(kernels)) < 1e-6


@pytest.mark.parametrize("shape", [(2, 5, 24), (3, 1), (7, 33), (2, 3, 4, 8)])
def test_layer_norm_is_flaxs(shape):
    x = 3 * jax.random.normal(jax.random.key(0), shape) + 20  # a mean that a single pass would lose digits to
    ours = LayerNorm(jnp.float32, 1e-6)
    plain = nn.LayerNorm(epsilon=1e-6, use_fast_variance=False)
    params = ours.init(jax.random.key(1), x)
    chex.assert_trees_all_equal_shapes(params, plain.init(jax.random.key(1), x))
    keys = iter(jax.random.split(jax.random.key(2), 2))
    params = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    if shape[-1] == 1:  # nothing is left of one channel: no relative error
        chex.assert_trees_all_close(ours.apply(params, x), plain.apply(params, x), atol=1e-5)
        return
    assert both(ours.apply, plain.apply, params, x) < 2e-6


def test_layer_norm_in_16_bit_has_statistics_in_fp32():
    x = (jax.random.normal(jax.random.key(0), (4, 64)) + 100).astype(jnp.bfloat16)
    ours, plain = LayerNorm(jnp.bfloat16, 1e-5), nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    params = ours.init(jax.random.key(1), x)
    y = ours.apply(params, x)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_equal(y, plain.apply(params, x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_rows_are_added():
    x, y = jax.random.normal(jax.random.key(0), (2, 3, 5, 4)), jax.random.normal(jax.random.key(1), (2, 3, 5, 4))
    assert both(add_rows, jnp.add, x, y) == 0
    chex.assert_trees_all_equal(jax.jit(jax.vmap(add_rows))(x, y), x + y)


def test_forms_can_be_exported():
    """A layout has no place in a program that is to outlive this version of XLA."""

    def forward(x):
        return gelu(add_rows(x, LayerNorm(jnp.float32, 1e-6).apply({"params": params}, x)))

    params = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    x = jnp.ones((2, 3, 4))
    again = jax.export.deserialize(jax.export.export(jax.jit(forward))(x).serialize())
    chex.assert_trees_all_equal(again.call(x), forward(x))
