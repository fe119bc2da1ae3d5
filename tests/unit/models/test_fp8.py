"""Products of 8-bit operands, against numpy's of the same rounding."""

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from visionfm_jax.models import fp8
from visionfm_jax.models.layers import Mlp

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """x as 8-bit floats times a power of two represent it, float64."""
    x = np.asarray(x).astype(np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
    return (x / scale).astype(dtype).astype(np.float64) * scale


def operands(dtype: jnp.dtype, gradients: float) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    shapes, sizes = [(48, 32), (32, 80), (48, 80)], [3.0, 0.02, gradients]
    return [(s * jax.random.normal(k, shape)).astype(dtype) for k, shape, s in zip(keys, shapes, sizes, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "gradients", "tolerance"),
    [(jnp.float32, 50.0, 1e-6), (jnp.bfloat16, 1e-12, 8e-3), (jnp.float16, 1e-4, 1e-3)],  # 1e-12: no number of fp16
)
def test_products_and_gradients_are_those_of_rounded_operands(dtype, gradients, tolerance):
    x, kernel, gradient = operands(dtype, gradients)
    y, back = jax.vjp(fp8.dot, x, kernel)
    of_x, of_kernel = back(gradient)
    chex.assert_type([y, of_x, of_kernel], dtype)
    x, kernel, gradient = rounded(x, E4M3), rounded(kernel, E4M3), rounded(gradient, E5M2)
    for found, expected in [(y, x @ kernel), (of_x, gradient @ kernel.T), (of_kernel, x.T @ gradient)]:
        error = np.abs(np.asarray(found, np.float64) - expected).max()
        assert error < tolerance * np.abs(expected).max()


def test_what_is_not_differentiated_is_the_plain_product():
    x, kernel, _ = operands(jnp.bfloat16, 1.0)
    np.testing.assert_array_equal(fp8.dot(x, kernel), x @ kernel)


@pytest.mark.parametrize(("largest", "dtype"), [(448.0, jnp.float8_e4m3fn), (57344.0, jnp.float8_e5m2)])
def test_the_scale_is_the_least_power_of_two_that_fits(largest, dtype):
    for at, expected in [(largest, 1.0), (largest * 1.001, 2.0), (largest / 2, 0.5), (largest * 2.0**-40, 2.0**-40)]:
        assert fp8.scale_of(jnp.array([-at, 0.0]), dtype) == expected
    zero = jnp.zeros(3)
    np.testing.assert_array_equal(fp8.quantize(zero, fp8.scale_of(zero, dtype), dtype).astype(jnp.float32), zero)


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_so(bad):
    x, kernel, gradient = operands(jnp.float16, 1.0)
    y, back = jax.vjp(fp8.dot, x.at[3, 4].set(bad), kernel)
    assert not np.isfinite(y[3]).any()
    for found in back(gradient.at[3, 4].set(bad)):
        assert not np.isfinite(found).all()


def test_an_mlp_s_matmuls_are_of_8_bit_operands_and_its_biases_are_not():
    x = jax.random.normal(jax.random.key(1), (2, 8, 32), jnp.bfloat16)
    mlps = [Mlp(64, jnp.bfloat16, activation="swiglu", matmuls=m) for m in ("compute", "fp8")]
    params = mlps[0].init(jax.random.key(2), x)

    @jax.jit
    def gradients(params):
        return [jax.grad(lambda p, m=m: m.apply(p, x).astype(jnp.float32).sum())(params)["params"] for m in mlps]

    plain, rounded = gradients(params)
    for name in ("fc1", "gate", "fc2"):
        a, b = (np.asarray(layer[name]["kernel"]) for layer in (plain, rounded))
        assert 0.001 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1, name
    np.testing.assert_array_equal(plain["fc2"]["bias"], rounded["fc2"]["bias"])
