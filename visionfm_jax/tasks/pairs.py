"""The base of tasks that learn from images and texts: everything but the networks and the losses.

Shapes: B rows, H W image, L tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.models.clip import MAX_SCALE
from visionfm_jax.parallel.context import Context
from visionfm_jax.tasks.task import Stateless


class PairTask(Stateless):
    """The part of a `tasks.task.ContrastTask` that follows from its `config`, `model`, `forward` and `contrast`."""

    config: Config
    model: nn.Module

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        images, texts = (jnp.zeros(s.shape, jnp.int32) for s in self.batch_spec(1).values())
        return self.model.init(key, images.astype(jnp.float32), texts)["params"]

    def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
        """What the loader gives: uint8 images (B, H, W, 3) and int32 token ids (B, L), zeros where there is no text."""
        size, length = height_width(self.config.model.image_size), self.config.model.text.context
        return {
            "image": jax.ShapeDtypeStruct((batch_size, *size, 3), jnp.uint8),
            "text": jax.ShapeDtypeStruct((batch_size, length), jnp.int32),
        }

    def loss(
        self, params: Any, batch: dict, keys: jax.Array, context: Context
    ) -> tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]]:
        """Mean loss of this device's rows, and per-sample arrays: see `forward` and `join`.

        Args:
          params: usable parameters (`parallel.zero`).
          batch: as `batch_spec`.
          keys: (B,), one for each sample.
          context: of the step.
        """
        embedded, own, means = self.forward(params, batch, keys, context)
        per_sample = self.join(own, self.contrast(embedded, context))
        return per_sample["loss"].mean(), per_sample, means

    def constrain(self, params: Any) -> Any:
        """The logarithm of the logit scale in [0, ln 100]."""
        return {**params, "scale": jnp.clip(params["scale"], 0, MAX_SCALE)}
