"""Multinomial logistic regression, on all rows at every iteration (`fit`) or on batches of them (`fit_by_sgd`).

Shapes: N rows, D features, C classes, B batch, R learning rates, K steps.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from visionfm_jax.evals.beats import beat

ITERATIONS, TOLERANCE = 500, 1e-5  # at most; and of the largest number of the gradient, which is of the mean loss
BETWEEN_BEATS = 50  # iterations
BATCH, EPOCHS, STEPS = 1024, 10, 1000  # of SGD: steps at least, however few the rows are
MOMENTUM, AT_ONCE = 0.9, 25  # steps that are on the device at a time


class Linear(NamedTuple):
    """Weights (D, C) and biases (C,)."""

    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits (N, C) of rows (N, D)."""
        return jnp.dot(x, self.kernel, precision=jax.lax.Precision.HIGHEST) + self.bias


def zeros(features: int, classes: int) -> Linear:
    """From which `fit` may start."""
    return Linear(jnp.zeros((features, classes)), jnp.zeros(classes))


def fit(x: jax.Array, y: jax.Array, penalty: float, start: Linear) -> Linear:
    """The weights with the least sum of losses + penalty / 2 x the sum of their squares; the biases are free.

    It is scikit-learn's LogisticRegression(C=1 / penalty), by L-BFGS (Liu and Nocedal 1989) as there.

    Args:
      x: float32 (N, D).
      y: labels (N,).
      penalty: on the squared weights.
      start: near the result, for speed; (D, C) says how many classes there are.

    Raises:
      Stopped: as `beats.beat`.
    """
    x, y, penalty = jnp.asarray(x), jnp.asarray(y), jnp.float32(penalty)
    carry = (start, optax.lbfgs().init(start), 0, jnp.inf)
    carry = jax.tree.map(lambda a: jnp.asarray(a, jnp.result_type(a)), carry)  # of the types it has later: one program
    for until in range(BETWEEN_BEATS, ITERATIONS + BETWEEN_BEATS, BETWEEN_BEATS):
        carry = _iterate(x, y, penalty, carry, min(until, ITERATIONS))
        if not carry[3] > TOLERANCE:  # also where it is not finite
            break
        beat(alike=False)  # rounding may differ from process to process, and with it the number of iterations
    return carry[0]


@jax.jit
def _iterate(x: jax.Array, y: jax.Array, penalty: jax.Array, carry: tuple, until: jax.Array) -> tuple:
    """`fit` up to a number of iterations: weights, state of the solver, iterations, largest number of the gradient."""

    def objective(w: Linear) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(w(x), y)
        return (losses.sum() + penalty / 2 * (w.kernel**2).sum()) / len(y)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def again(carry: tuple) -> jax.Array:
        _, _, steps, steepest = carry
        return (steps < until) & (steepest > TOLERANCE)

    def iterate(carry: tuple) -> tuple:
        w, state, steps, _ = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
        steepest = jnp.maximum(jnp.abs(grad.kernel).max(), jnp.abs(grad.bias).max())
        return optax.apply_updates(w, updates), state, steps + 1, steepest

    return jax.lax.while_loop(again, iterate, carry)


def fit_by_sgd(x: np.ndarray, y: np.ndarray, rows: np.ndarray, rates: Sequence[float], classes: int) -> list[Linear]:
    """A classifier for each learning rate: SGD with momentum, the rate falling to 0 by a cosine, without a penalty.

    All of them see the same batches, so that one pass over the rows serves all (Oquab et al. 2023, "DINOv2", appendix
    B.3). Only batches are on the device.

    Args:
      x: float32 (N, D), on the host.
      y: labels (N,).
      rows: numbers of the rows to learn from, which are shuffled anew in every epoch.
      rates: at the first step; one that is far too high gives numbers that are not finite.
      classes: C.

    Raises:
      Stopped: as `beats.beat`.
    """
    size = min(BATCH, len(rows))
    steps = max(STEPS, EPOCHS * len(rows) // size)
    start = zeros(x.shape[1], classes)
    w = jax.tree.map(lambda a: jnp.broadcast_to(a, (len(rates), *a.shape)), start)
    trace = jax.tree.map(jnp.zeros_like, w)
    batches = _batches(rows, size)
    for first in range(0, steps, AT_ONCE):
        here = np.stack([next(batches) for _ in range(min(AT_ONCE, steps - first))])
        w, trace = _descend(w, trace, jnp.asarray(rates, jnp.float32), x[here], y[here], first, steps)
        beat()
    return [jax.tree.map(lambda a, i=i: a[i], w) for i in range(len(rates))]


def _batches(rows: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """Row numbers (B,), whole batches of one epoch after the other."""
    for epoch in range(2**62):
        shuffled = np.random.default_rng([epoch]).permutation(rows)
        yield from shuffled[: len(rows) // size * size].reshape(-1, size)


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames="steps")
def _descend(
    w: Linear, trace: Linear, rates: jax.Array, x: jax.Array, y: jax.Array, first: jax.Array, steps: int
) -> tuple[Linear, Linear]:
    """K steps on x (K, B, D) and y (K, B), from number `first` of `steps` on; w and trace have a leading R."""
    cosine = optax.cosine_decay_schedule(1.0, steps)

    def loss(w: Linear, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(w(x), y).mean()

    def step(carry: tuple[Linear, Linear], batch: tuple) -> tuple:
        w, trace = carry
        number, x, y = batch
        grads = jax.vmap(jax.grad(loss), (0, None, None))(w, x, y)
        trace = jax.tree.map(lambda t, g: MOMENTUM * t + g, trace, grads)
        now = rates * cosine(number)
        return (jax.tree.map(lambda a, t: a - now.reshape(-1, *[1] * (t.ndim - 1)) * t, w, trace), trace), None

    numbers = first + jnp.arange(len(x))
    return jax.lax.scan(step, (w, trace), (numbers, x, y))[0]
