"""Multinomial logistic regression, all of the data at every iteration. Shapes: N rows, D features, C classes."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

ITERATIONS, TOLERANCE = 500, 1e-5  # at most; and of the largest number of the gradient, which is of the mean loss


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


@jax.jit
def fit(x: jax.Array, y: jax.Array, penalty: jax.Array, start: Linear) -> Linear:
    """The weights with the least sum of losses + penalty / 2 x the sum of their squares; the biases are free.

    It is scikit-learn's LogisticRegression(C=1 / penalty), by L-BFGS (Liu and Nocedal 1989) as there.

    Args:
      x: float32 (N, D).
      y: labels (N,).
      penalty: on the squared weights.
      start: near the result, for speed; (D, C) says how many classes there are.
    """

    def objective(w: Linear) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(w(x), y)
        return (losses.sum() + penalty / 2 * (w.kernel**2).sum()) / len(y)

    solver = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(objective)

    def again(carry: tuple) -> jax.Array:
        _, _, steps, steepest = carry
        return (steps < ITERATIONS) & (steepest > TOLERANCE)

    def iterate(carry: tuple) -> tuple:
        w, state, steps, _ = carry
        value, grad = value_and_grad(w, state=state)
        updates, state = solver.update(grad, state, w, value=value, grad=grad, value_fn=objective)
        steepest = jnp.maximum(jnp.abs(grad.kernel).max(), jnp.abs(grad.bias).max())
        return optax.apply_updates(w, updates), state, steps + 1, steepest

    return jax.lax.while_loop(again, iterate, (start, solver.init(start), 0, jnp.inf))[0]
