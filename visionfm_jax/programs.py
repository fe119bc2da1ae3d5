"""A trained model as programs that run without this package: StableHLO, as `jax.export` keeps it.

Shapes: N images or texts, any number; H W image, T tokens of a text, C classes, D width, E embedding.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from visionfm_jax.api import Model
from visionfm_jax.config.limits import height_width
from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import flatten, unflatten
from visionfm_jax.models.layers import no_gather
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.task import make_task

PLATFORMS = ("cpu", "cuda")


def programs_of(model: Model) -> tuple[dict[str, np.ndarray], dict[str, bytes], tuple[str, ...]]:
    """The weights by name, the serialised programs by file, and the names of what that of images gives.

    Each program is called as (weights, rows) and returns a dictionary of float32 arrays:
      images.stablehlo: uint8 (N, H, W, 3), not normalised, to `features` (N, D) and, where the model has them,
        `probabilities` (N, C) or `image_embedding` (N, E), of length 1.
      texts.stablehlo, of two towers: int32 (N, T) to `text_embedding` (N, E), of length 1.

    Raises:
      UserError: the model has no features of images.
    """
    config = model.config
    task, predictions = make_task(config, no_gather), config.task.predictions
    if "features" not in predictions:
        raise UserError(f"--to=stablehlo: {type(config.task).__name__} makes no features of images; keep the run")
    outputs = ["features"]
    outputs += ["probabilities"] if "labels" in predictions else []
    outputs += ["embeddings"] if "embeddings" in predictions else []

    def images(weights: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
        params, out = unflatten(weights), {}
        for what in outputs:
            out |= task.predict(params, {"image": rows}, what)
        return {name: value.astype(jnp.float32) for name, value in out.items()}

    def texts(weights: dict[str, jax.Array], rows: jax.Array) -> dict[str, jax.Array]:
        return task.predict(unflatten(weights), {"text": rows}, "embeddings")

    weights = {name: np.asarray(value) for name, value in flatten(model.params).items()}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    (count,) = jax_export.symbolic_shape("n")

    def serialised(function: Any, shape: tuple[int, ...], dtype: Any) -> bytes:
        exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)
        return bytes(exported(shapes, jax.ShapeDtypeStruct((count, *shape), dtype)).serialize())

    size = height_width(model.transform.size)
    files = {"images.stablehlo": serialised(images, (*size, 3), jnp.uint8)}
    named = {"features": "features", "probabilities": "probabilities", "embeddings": "image_embedding"}
    if isinstance(config.task, ContrastiveConfig):
        files["texts.stablehlo"] = serialised(texts, (config.model.text.context,), jnp.int32)
    return weights, files, tuple(named[what] for what in outputs)
