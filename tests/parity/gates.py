"""How close two fp32 computations must be, README.md says why; and the elements of gradients that are compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import jax

FORWARD, FORWARD_MAX = 3e-6, 1e-5  # ||a - b|| / ||b||, max |a - b| / max |b|
GRADIENT, GRADIENT_TENSOR = 1e-5, 5e-5  # over all parameters, over the worst one


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """||a - b|| / ||b||."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def sample(gradient: np.ndarray) -> np.ndarray:
    """At most 511 elements, spread over rows and columns: the stride is odd, and sides are even."""
    return gradient.ravel()[:: gradient.size // 256 | 1]


def tensors(row: np.ndarray, shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
    """What was written one after the other, in float32, by its names."""
    parts = np.split(row.astype(np.float32), np.cumsum([math.prod(s) for s in shapes.values()])[:-1])
    return {k: p.reshape(s) for (k, s), p in zip(shapes.items(), parts, strict=True)}


def gradients_of_squares(
    forward: Callable[[dict], dict[str, jax.Array]], params: dict
) -> tuple[dict, dict[str, jax.Array]]:
    """The gradient of the sum of all outputs' mean squares, and the outputs; the scripts take the peer's likewise."""
    import jax  # here alone: the scripts run where JAX is not
    import jax.numpy as jnp

    def loss(params: dict) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs = forward(params)
        return sum(jnp.mean(out**2) for out in outputs.values()), outputs

    return jax.jit(jax.grad(loss, has_aux=True))(params)


def check_forward(ours: np.ndarray, theirs: np.ndarray, what: str) -> None:
    """Maps, features, logits."""
    assert ours.shape == theirs.shape, what
    assert relative(ours, theirs) <= FORWARD, what
    assert np.abs(ours - theirs).max() <= FORWARD_MAX * np.abs(theirs).max(), what


def check_gradients(
    gradients: Mapping[str, np.ndarray], frozen: np.ndarray, shapes: Mapping[str, Sequence[int]]
) -> None:
    """Ours, whole, in the peer's names, against the frozen samples of the peer's."""
    ours = {k: sample(np.asarray(v)) for k, v in gradients.items()}
    assert set(ours) == set(shapes)
    theirs = tensors(frozen, {k: ours[k].shape for k in shapes})
    worst = {}
    for key, gradient in theirs.items():
        if gradient.any():
            worst[key] = relative(ours[key], gradient)
        else:  # in a window of one token nothing but the values counts
            assert np.abs(ours[key]).max() < 1e-7, key
    assert max(worst.values()) <= GRADIENT_TENSOR, max(worst.items(), key=lambda kv: kv[1])
    together = [np.concatenate([grads[key] for key in theirs]) for grads in (ours, theirs)]
    assert relative(*together) <= GRADIENT
