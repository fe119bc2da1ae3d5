"""Dynamic loss scaling for fp16 (Micikevicius et al. 2018), by the rule of DeepSpeed up to 0.17.0.

The loss is multiplied by a scale before the backward pass, so that small gradients do not vanish in fp16, and gradients
are divided by it afterwards. The scale rises as long as nothing overflows and falls when something does.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

START = 2.0**16
FACTOR = 2.0
INTERVAL = 1000  # clean steps in a row after which the scale rises
HYSTERESIS = 2  # the overflow that lowers the scale, counted since it last rose; each later one lowers it too
FLOOR = 1.0  # an overflow here is no matter of the scale: the run stops


@struct.dataclass
class LossScale:
    """The scale of the next step, and what moves it."""

    scale: jax.Array  # fp32
    clean: jax.Array  # int32: steps since the last overflow or rise
    hysteresis: jax.Array  # int32: at 1, an overflow lowers the scale


def init() -> LossScale:
    """Of step 0."""
    return LossScale(jnp.float32(START), jnp.int32(0), jnp.int32(HYSTERESIS))


def update(state: LossScale, finite: jax.Array) -> LossScale:
    """After a step, `finite` (a bool) or not.

    The rule is that of `DynamicLossScaler.update_scale` (deepspeed/runtime/fp16/loss_scaler.py) with its default
    `consecutive_hysteresis=False`, before commit e440506be (June 2025, release 0.17.1): an overflow lowers the scale
    once the hysteresis is down to 1, and until then spends one of it; clean steps restore it only where they raise the
    scale. Since that commit DeepSpeed's first rise after the start or an overflow comes one clean step later.
    """
    grows = finite & (state.clean + 1 >= INTERVAL)
    falls = ~finite & (state.hysteresis <= 1)
    factor = jnp.where(grows, FACTOR, jnp.where(falls, 1 / FACTOR, 1.0))
    spent = jnp.where(finite | falls, state.hysteresis, state.hysteresis - 1)
    return LossScale(
        scale=jnp.maximum(state.scale * factor, FLOOR),
        clean=jnp.where(finite & ~grows, state.clean + 1, 0),
        hysteresis=jnp.where(grows, HYSTERESIS, spent),
    )
