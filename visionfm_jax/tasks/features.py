"""No objective: a backbone that is used for its features, such as one of another library without a classifier.

Shapes: B rows, H W image, D width.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from visionfm_jax.config import BackboneConfig, Config, TaskConfig
from visionfm_jax.config.limits import Problem, height_width
from visionfm_jax.data.augment import normalize
from visionfm_jax.data.fields import NoFields
from visionfm_jax.models.layers import GatherParams
from visionfm_jax.tasks.task import Stateless


@dataclass(kw_only=True)
class FeaturesConfig(TaskConfig):
    """No objective: a backbone is used, by `visionfm_jax.load`, and cannot be trained."""

    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"features"})

    def problems(self, run: Config) -> list[Problem]:
        return [("task", "FeaturesConfig()", "has no objective", "set one to train, such as ClassificationConfig()")]

    def fields(self, run: Config) -> NoFields:
        return NoFields()

    def make(self, run: Config, dtype: jnp.dtype, gather_params: GatherParams) -> Feature:
        return Feature(run, dtype, gather_params)


class Feature(Stateless):
    """The part of a `tasks.task.Task` that makes features."""

    def __init__(self, config: Config, dtype: jnp.dtype, gather_params: GatherParams):
        self.config = config
        self.model = config.model.make(dtype, gather_params)

    def init(self, key: jax.Array) -> Any:
        """Fresh parameters, fp32."""
        return self.model.init(key, jnp.zeros((1, *height_width(self.config.model.image_size), 3)))["params"]

    def predict(self, params: Any, batch: dict, what: Hashable = "features") -> dict[str, jax.Array]:
        """Per sample: `features` (B, D), pooled."""
        images = normalize(batch["image"], self.config.data.augment)
        return {"features": self.model.apply({"params": params}, images).pooled}
