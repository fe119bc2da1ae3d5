"""Matrix products of 8-bit floats, for training (Micikevicius et al. 2022, "FP8 formats for deep learning").

Activations and weights are rounded to e4m3, whose 3 bits of mantissa are worth more to them than range; gradients to
e5m2. Each tensor is divided by a scale of its own that brings its largest magnitude to the largest of its format
("current scaling"): nothing is carried from step to step. Scales are powers of two, so that rounding is all that is
lost, and a product of rounded operands is the same in every dtype.

On cards with FP8 units (Ada, Hopper, Blackwell) XLA makes one kernel of each product and its scales. Elsewhere the
rounded operands are multiplied in the compute dtype: the same result, and no gain.

Shapes: M rows, K channels, N features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2


@jax.custom_vjp
def dot(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x (M, K) times kernel (K, N), in their dtype, (M, N); of 8-bit operands, with gradients of such, in training.

    Training is what differentiates. Otherwise the product is the plain one: what a model says of an image must not
    depend on the others of its batch, by which the scale is chosen.
    """
    return x @ kernel


def _forward(x: jax.Array, kernel: jax.Array) -> tuple[jax.Array, tuple[Any, ...]]:
    scale_x, scale_kernel = scale_of(x, FORWARD), scale_of(kernel, FORWARD)
    rows = quantize(x, scale_x, FORWARD)
    y = _product(rows, scale_x, quantize(kernel, scale_kernel, FORWARD), scale_kernel, (1, 0), x.dtype)
    # Not the quantized kernel: under ZeRO-3, what is kept of gathered weights undoes the sharding. Rows as bits, as
    # `jax.checkpoint` rounds floats that it keeps as IEEE 754 would have them: e4m3 without what lies above 240.
    return y, (jax.lax.bitcast_convert_type(rows, jnp.uint8), scale_x, kernel, scale_kernel)


def _backward(saved: tuple[Any, ...], gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    bits, scale_x, kernel, scale_kernel = saved
    rows = jax.lax.bitcast_convert_type(bits, FORWARD)
    scale, dtype = scale_of(gradient, BACKWARD), gradient.dtype
    gradient = quantize(gradient, scale, BACKWARD)
    weights = quantize(kernel, scale_kernel, FORWARD)
    of_x = _product(gradient, scale, weights, scale_kernel, (1, 1), dtype)
    return of_x, _product(rows, scale_x, gradient, scale, (0, 0), dtype)


dot.defvjp(_forward, _backward)


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers: Any, precision: Any = None) -> jax.Array:
    """`dot`, as `flax.linen.Dense` calls its `dot_general` on x (M, K)."""
    return dot(x, kernel)


def scale_of(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The least power of two by which x, divided, fits the range of an 8-bit dtype; a scalar, fp32.

    It has a name for rematerialisation: with it, the backward pass need not look at all of x before it rounds it.
    """
    share = jnp.max(jnp.abs(x)).astype(jnp.float32) / float(jnp.finfo(dtype).max)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(share, jnp.finfo(jnp.float32).tiny), jnp.int32)
    mantissa = 2**23 - 1
    scale = jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return checkpoint_name(scale, "fp8_scale")


def quantize(x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x / scale, rounded to an 8-bit dtype.

    In x's dtype, or XLA would keep the fp32 values of which x was rounded, to round them anew.
    """
    wide = _wide(x.dtype)
    return (x.astype(wide) * (1 / scale).astype(wide)).astype(dtype)


def _product(
    a: jax.Array, scale_a: jax.Array, b: jax.Array, scale_b: jax.Array, dims: tuple[int, int], dtype: jnp.dtype
) -> jax.Array:
    """Of 8-bit a and b, of which `dims` are summed, times their scales; in `dtype`.

    XLA looks for products of operands that are scaled in the dtype of the result (`__cublas$lt$matmul$f8`).
    """
    wide = _wide(dtype)
    a, b = a.astype(wide) * scale_a.astype(wide), b.astype(wide) * scale_b.astype(wide)
    return jax.lax.dot_general(a, b, (((dims[0],), (dims[1],)), ((), ()))).astype(dtype)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Where scales are exact: fp16 has not their range."""
    return jnp.float32 if dtype == jnp.float16 else dtype
