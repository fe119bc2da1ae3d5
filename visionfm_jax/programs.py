"""A trained model as programs that run without this package: StableHLO, as `jax.export` keeps it, and ONNX.

Shapes: N images or texts, any number; H W image, T tokens of a text, C classes, D width, E embedding.
"""

from __future__ import annotations

import copy
import logging as standard_logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from visionfm_jax.api import Model, function_of
from visionfm_jax.config.limits import height_width
from visionfm_jax.errors import UserError, one_line
from visionfm_jax.interop.leaves import flatten, unflatten
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig

PLATFORMS = ("cpu", "cuda")
OPSET = 21  # of ONNX, since version 1.16
MOST = 2**31 - 2**20  # bytes of an ONNX file, whose lengths are 32 bit
NEEDED = "onnx onnx_ir onnxruntime sympy mpmath equinox jaxtyping wadler_lindig"  # by jax2onnx
REMEDY = (
    f"pip install --no-deps jax2onnx, then pip install {NEEDED}, best into an environment of its own: jax2onnx asks "
    "for an older Orbax, which it does not use"
)


class Program(NamedTuple):
    """A function of (params, rows), and what one of the rows is."""

    function: Callable[[Any, jax.Array], dict[str, jax.Array]]
    shape: tuple[int, ...]
    dtype: Any


def _programs(model: Model, to: str, precision: str) -> tuple[dict[str, Program], tuple[str, ...]]:
    """The programs by name, and the names of what that of images gives.

      images: uint8 (N, H, W, 3), not normalised, to `features` (N, D) and, where the model has them, `probabilities`
        (N, C) or `image_embedding` (N, E), of length 1.
      texts, of two towers: int32 (N, T) to `text_embedding` (N, E), of length 1.

    Raises:
      UserError: the model has no features of images.
    """
    config = copy.deepcopy(model.config)
    config.train.precision = precision
    try:
        function = function_of(config)
    except UserError as error:
        raise UserError(f"--to={to}: {error}; keep the run") from error
    found = {
        "images": Program(
            lambda params, rows: function(params, images=rows), (*height_width(model.transform.size), 3), jnp.uint8
        )
    }
    if isinstance(config.task, ContrastiveConfig):
        found["texts"] = Program(
            lambda params, rows: function(params, texts=rows), (config.model.text.context,), jnp.int32
        )
    image = jax.ShapeDtypeStruct((1, *found["images"].shape), jnp.uint8)
    return found, tuple(jax.eval_shape(found["images"].function, model.params, image))


def stablehlo_of(model: Model) -> tuple[dict[str, np.ndarray], dict[str, bytes], tuple[str, ...]]:
    """The weights by name, the serialised programs by file, and the names of what that of images gives.

    Each is called as (weights, rows), and computes in the precision of the run; in fp32 where that is fp16, whose
    products CPUs and GPUs make by different programs.

    Raises:
      UserError: the model has no features of images.
    """
    precision = model.config.train.precision
    programs, outputs = _programs(model, "stablehlo", "fp32" if precision == "fp16" else precision)
    weights = {name: np.asarray(value) for name, value in flatten(model.params).items()}
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    (count,) = jax_export.symbolic_shape("n")

    def serialised(program: Program) -> bytes:
        called = jax.jit(lambda weights, rows: program.function(unflatten(weights), rows))
        exported = jax_export.export(called, platforms=PLATFORMS)
        return bytes(exported(shapes, jax.ShapeDtypeStruct((count, *program.shape), program.dtype)).serialize())

    return weights, {f"{name}.stablehlo": serialised(program) for name, program in programs.items()}, outputs


def onnx_of(model: Model) -> tuple[dict[str, bytes], tuple[str, ...]]:
    """The programs by file, which hold the weights and compute in fp32, and the names of what that of images gives.

    Raises:
      UserError: jax2onnx is missing, the model is not of ViTs, or too large.
    """
    network = model.config.model.image if isinstance(model.config.model, ClipConfig) else model.config.model
    if not isinstance(network, ViTConfig):
        kind = type(network).__name__
        raise UserError(f"--to=onnx: is for ViTs, and CLIPs of them, and this is a {kind}; --to=stablehlo works")
    try:
        from jax2onnx import to_onnx
    except ImportError as error:
        raise UserError(f"--to=onnx: needs jax2onnx ({error}); {REMEDY}") from error
    standard_logging.getLogger("onnx_ir").setLevel(standard_logging.ERROR)  # it warns of shapes that it does not know
    programs, outputs = _programs(model, "onnx", "fp32")
    params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x, np.float32)), model.params)
    if (size := sum(x.nbytes for x in jax.tree.leaves(params))) > MOST:
        raise UserError(f"--to=onnx: {size:,} bytes of weights do not fit into one ONNX file; --to=stablehlo works")

    def converted(name: str, program: Program) -> bytes:
        names = outputs if name == "images" else ("text_embedding",)

        def called(rows: jax.Array) -> tuple[jax.Array, ...]:
            out = program.function(params, rows)
            return tuple(out[one] for one in names)

        # What is called "B" is any number of rows.
        try:
            made = to_onnx(called, [jax.ShapeDtypeStruct(("B", *program.shape), program.dtype)], opset=OPSET)
        except NotImplementedError as error:
            raise UserError(f"--to=onnx: jax2onnx has no {one_line(error)}; --to=stablehlo works") from error
        inside = (*made.graph.input, *made.graph.output)
        _rename(made.graph, dict(zip((value.name for value in inside), (name, *names), strict=True)))
        return made.SerializeToString()

    return {f"{name}.onnx": converted(name, program) for name, program in programs.items()}, outputs


def _rename(graph: Any, names: dict[str, str]) -> None:
    """Name values of an ONNX graph, and where the graphs inside it use them."""
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for field in (node.input, node.output):
            field[:] = [names.get(name, name) for name in field]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _rename(attribute.g, names)
