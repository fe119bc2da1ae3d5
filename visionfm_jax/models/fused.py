"""GELU, LayerNorm, residual sums and products in forms that XLA's GPU compiler fuses into few passes over memory.

Their values are those of the plain forms. What differs is how often an array of the size of the tokens is read and
written: beside matmuls, that is the time of a step. Norms and sums carry names for rematerialisation (`models.layers`).

Shapes: R rows (all but the last dim of an array as one), D width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x Φ(x) (Hendrycks & Gimpel 2016), computed in fp32; any shape, in the dtype of x.

    One elementwise kernel each way. The derivative that JAX finds for its own has erfc as an array in memory, for some
    shapes in fp32.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _normal_cdf(x32)).astype(x.dtype)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * np.float32(math.sqrt(0.5))))


def _gelu_fwd(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gelu(x), x


def _gelu_bwd(x: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * x32 * x32) * np.float32(1 / math.sqrt(2 * math.pi))
    return ((cotangent.astype(jnp.float32) * (_normal_cdf(x32) + x32 * density)).astype(x.dtype),)


gelu.defvjp(_gelu_fwd, _gelu_bwd)


class LayerNorm(nn.Module):
    """LayerNorm (Ba et al. 2016) whose statistics are fp32 and of two passes; (…, D) to (…, D) in `dtype`.

    Parameters are named as Flax's own.
    """

    dtype: jnp.dtype
    epsilon: float
    scale_init: nn.initializers.Initializer = nn.initializers.ones

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        D = x.shape[-1]
        scale = self.param("scale", self.scale_init, (D,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (D,), jnp.float32)
        y = normalize(x.reshape(-1, D), scale, bias, self.epsilon, self.dtype)
        return checkpoint_name(y.reshape(x.shape), "normed")


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def normalize(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype) -> jax.Array:
    """Rows (R, D) normed, times scale (D,), plus bias (D,); (R, D) in `dtype`.

    The backward pass is one kernel for the gradient of x, which reads x and the cotangent once; the statistics again,
    2 R numbers; and one for the gradients of scale and bias, which reads both once more.
    """
    mean, rstd = _statistics(x, epsilon)
    return ((x.astype(jnp.float32) - mean) * rstd * scale + bias).astype(dtype)


def _statistics(x: jax.Array, epsilon: float) -> tuple[jax.Array, jax.Array]:
    """Mean and reciprocal standard deviation of each row, (R, 1)."""
    x = x.astype(jnp.float32)
    mean = x.mean(-1, keepdims=True)
    return mean, jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + epsilon)


def _normalize_fwd(
    x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float, dtype: jnp.dtype
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return normalize(x, scale, bias, epsilon, dtype), (x, scale)


def _normalize_bwd(
    epsilon: float, dtype: jnp.dtype, saved: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, scale = saved
    mean, rstd = _statistics(x, epsilon)
    y, g = (x.astype(jnp.float32) - mean) * rstd, cotangent.astype(jnp.float32) * scale
    dx = (g - g.mean(-1, keepdims=True) - y * (g * y).mean(-1, keepdims=True)) * rstd
    # Without the barriers XLA finds y in both, and writes and reads it, in fp32: more bytes than x and the cotangent.
    x_again, cotangent = jax.lax.optimization_barrier((x, cotangent))
    mean, rstd = jax.lax.optimization_barrier(_statistics(x_again, epsilon))
    y, g = (x_again.astype(jnp.float32) - mean) * rstd, cotangent.astype(jnp.float32)
    return dx.astype(x.dtype), (g * y).sum(0), g.sum(0)


normalize.defvjp(_normalize_fwd, _normalize_bwd)


def add_rows(x: jax.Array, branch: jax.Array) -> jax.Array:
    """x + branch, (…, D), in training laid out in memory as rows of D.

    Left to choose, XLA keeps the sums of a transformer with D or the tokens outermost for some versions and shapes: all
    norms then read columns, and biases are no part of matmuls any more.
    """
    D = x.shape[-1]
    total = _add(x.reshape(-1, D), branch.reshape(-1, D))
    return checkpoint_name(total.reshape(x.shape), "residual")


@jax.custom_vjp
def _add(x: jax.Array, y: jax.Array) -> jax.Array:
    return x + y  # exported programs have no place for layouts


def _rows(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=(0, 1)))


def _add_fwd(x: jax.Array, y: jax.Array) -> tuple[jax.Array, None]:
    return _rows(x + y), None


def _add_bwd(_: None, cotangent: jax.Array) -> tuple[jax.Array, jax.Array]:
    cotangent = _rows(cotangent)
    return cotangent, cotangent


_add.defvjp(_add_fwd, _add_bwd)


@jax.custom_vjp
def products(x: jax.Array, kernels: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x (R, D) times each of the kernels, (D, M) each; (R, M) each.

    In the backward pass each matmul adds the sum of those before it, which XLA makes part of the matmul only where that
    sum is the second summand. JAX's own derivative leaves a kernel that does nothing but add.
    """
    return tuple(x @ kernel for kernel in kernels)


def _products_fwd(
    x: jax.Array, kernels: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, tuple[jax.Array, ...]]]:
    return products(x, kernels), (x, kernels)


def _products_bwd(
    saved: tuple[jax.Array, tuple[jax.Array, ...]], cotangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    x, kernels = saved
    dx = cotangents[0] @ kernels[0].T
    for cotangent, kernel in zip(cotangents[1:], kernels[1:], strict=True):
        dx = cotangent @ kernel.T + dx
    return dx, tuple(x.T @ cotangent for cotangent in cotangents)


products.defvjp(_products_fwd, _products_bwd)
