"""Losses of a student that follows its own average (Caron et al. 2021, "DINO"; Oquab et al. 2023, "DINOv2").

In fp32, whatever the logits come in.

Shapes: B rows of this device, G rows of all devices, V views of the student, U of the teacher, K prototypes, D width,
M masked patches of an image.
"""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp

from visionfm_jax.models.layers import l2_normalize


def sinkhorn(
    logits: jax.Array, temperature: jax.Array, chosen: jax.Array, axes: tuple[str, ...] = (), iterations: int = 3
) -> jax.Array:
    """Targets (B, K) by which all prototypes are used alike over the rows of all devices, of the teacher's logits.

    Sinkhorn-Knopp as in SwAV (Caron et al. 2020, appendix A) and DINOv2: alternately each prototype's sum over rows is
    made 1/K and each row's sum 1/G. What travels is sums of K numbers.

    Args:
      logits: (B, K).
      temperature: scalar, positive.
      chosen: (B,) bool; rows that are not are left out, and get zeros.
      axes: of the mesh, over which the rows are spread; none: these are all.
      iterations: how often.
    """
    chex.assert_rank(logits, 2)
    chex.assert_shape(chosen, logits.shape[:1])
    logits = jnp.where(chosen[:, None], logits.astype(jnp.float32), -jnp.inf)
    rows = jax.lax.psum(chosen.sum(dtype=jnp.float32), axes)
    q = jnp.exp((logits - jax.lax.pmax(logits.max(), axes)) / temperature)
    q = jnp.where(chosen[:, None], q, 0)  # also where no row of any device is chosen
    for _ in range(iterations):
        q = _share(q, jax.lax.psum(q.sum(0), axes)) / logits.shape[1]
        q = _share(q, q.sum(1, keepdims=True)) / jnp.maximum(rows, 1)
    return q * rows


def _share(q: jax.Array, total: jax.Array) -> jax.Array:
    return q / jnp.where(total > 0, total, 1)


def centred(logits: jax.Array, centre: jax.Array, temperature: jax.Array) -> jax.Array:
    """Targets (…, K) of the teacher's logits (…, K) less their running mean (K,) (Caron et al. 2021, section 3.1)."""
    return jax.nn.softmax((logits.astype(jnp.float32) - centre) / temperature)


def views_loss(student: jax.Array, targets: jax.Array, temperature: float) -> jax.Array:
    """Cross-entropy of every view of the student under every other view's target, their mean (B,).

    Args:
      student: logits (V, B, K), of which the first U are of the teacher's views, in its order.
      targets: (U, B, K), U > 1 or V > U.
      temperature: of the student.
    """
    chex.assert_rank([student, targets], 3)
    chex.assert_equal_shape_suffix([student, targets], 2)
    (V, U), log_p = (len(student), len(targets)), _log_softmax(student, temperature)
    others = targets.sum(0) - jnp.concatenate([targets, jnp.zeros((V - U, *targets.shape[1:]))])
    return -(others * log_p).sum((0, 2)) / (U * V - U)


def patches_loss(student: jax.Array, targets: jax.Array, masked: jax.Array, temperature: float) -> jax.Array:
    """Mean cross-entropy of an image's masked patches, (B,); 0 where there is none (Zhou et al. 2022, "iBOT").

    Args:
      student: logits (B, M, K).
      targets: (B, M, K), of the same patches, which the teacher sees.
      masked: (B, M) bool; the other rows do not count.
      temperature: of the student.
    """
    chex.assert_rank(student, 3)
    chex.assert_equal_shape([student, targets])
    chex.assert_shape(masked, student.shape[:2])
    losses = -(targets * _log_softmax(student, temperature)).sum(2)
    return jnp.where(masked, losses, 0).sum(1) / jnp.maximum(masked.sum(1), 1)


def _log_softmax(logits: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)


def koleo(features: jax.Array) -> jax.Array:
    """-log of the distance to the nearest of the other rows, (B,), which spreads features (Sablayrolles et al. 2019).

    Args:
      features: (B, D), of any length; B > 1.
    """
    chex.assert_rank(features, 2)
    x = l2_normalize(features)
    scores = jnp.dot(x, x.T, precision=jax.lax.Precision.HIGHEST)
    nearest = jnp.where(jnp.eye(len(x), dtype=bool), -1, scores).argmax(1)
    difference = x - x[nearest] + 1e-8  # as torch's PairwiseDistance has it
    return -jnp.log(jnp.sqrt((difference**2).sum(1)) + 1e-8)
