"""UPerNet and EoMT against Hugging Face transformers (frozen by `make_segmentation.py`)."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import linen as nn
from gates import check_forward, check_gradients, gradients_of_squares, relative, tensors

from visionfm_jax.losses.segmentation import pixel_cross_entropy
from visionfm_jax.models import segmenter
from visionfm_jax.models.segmenter import POOLED, UPerNet, resize

pytestmark = pytest.mark.usefixtures("quick_compiles")


@functools.cache
def frozen(name: str) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(Path(__file__).with_name(f"{name}.npz")) as file:
        data = dict(file)
    return data, json.loads(str(data.pop("about")))


class Affine(nn.Module):
    """A batch norm in evaluation, whose statistics are part of its scale and bias."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape)
        return x * scale + self.param("bias", nn.initializers.zeros, shape)


def kernel_of(weight: Any) -> Any:
    """A convolution's weight of theirs; of 1 x 1, a matrix."""
    return weight[:, :, 0, 0].T if weight.shape[2:] == (1, 1) else rearrange(weight, "o i h w -> h w i o")


def upernet_params(state: dict[str, Any]) -> dict:
    """Theirs under our names."""
    head = "decode_head"
    layers = {"bottleneck": f"{head}.bottleneck", "fusion": f"{head}.fpn_bottleneck"}
    layers |= {f"pool{side}": f"{head}.psp_modules.{i}.1" for i, side in enumerate(POOLED)}
    layers |= {f"lateral{i}": f"{head}.lateral_convs.{i}" for i in range(3)}
    layers |= {f"level{i}": f"{head}.fpn_convs.{i}" for i in range(3)}
    layers["auxiliary"] = "auxiliary_head.convs.0"
    params = {}
    for ours, theirs in layers.items():
        weight, bias, mean, var = (
            state[f"{theirs}.batch_norm.{n}"] for n in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight / jnp.sqrt(var + 1e-5)
        params[ours] = {"kernel": kernel_of(state[f"{theirs}.conv.weight"])}
        params[f"{ours}_norm"] = {"scale": scale, "bias": bias - mean * scale}
    for ours, theirs in (("classifier", head), ("auxiliary_classifier", "auxiliary_head")):
        weight, bias = (state[f"{theirs}.classifier.{n}"] for n in ("weight", "bias"))
        params[ours] = {"kernel": kernel_of(weight), "bias": bias}
    return params


def test_upernet():
    data, about = frozen("upernet")
    state = tensors(data["params"], about["params"])
    head = UPerNet(5, channels=16, auxiliary_channels=8, norm=lambda dtype, name: Affine(name=name))
    maps = [data[f"map{i}"].astype(np.float32) for i in range(4)]

    def forward(trained: dict) -> dict[str, jax.Array]:
        logits = head.apply({"params": upernet_params(state | trained)}, maps)
        return dict(zip(("logits", "auxiliary"), logits, strict=True))

    gradients, outputs = gradients_of_squares(forward, {k: state[k] for k in about["gradients"]})
    for name, ours in outputs.items():
        check_forward(ours, data[name], name)
    check_gradients(gradients, data["gradients"], about["gradients"])

    labels = data["labels"]
    sums = [pixel_cross_entropy(resize(outputs[n], labels.shape[1:]), labels)[0] for n in ("logits", "auxiliary")]
    loss = (sums[0] + 0.4 * sums[1]).sum() / (labels != 255).sum()
    assert float(loss) == pytest.approx(float(data["loss"]), rel=3e-6)


def test_gate_catches_other_bins_and_another_interpolation(monkeypatch):
    """Of pooling whose bins do not overlap, and of resizing to the nearest."""
    data, about = frozen("upernet")
    params = upernet_params(tensors(data["params"], about["params"]))
    head = UPerNet(5, channels=16, auxiliary_channels=8, norm=lambda dtype, name: Affine(name=name))
    maps = [data[f"map{i}"].astype(np.float32) for i in range(4)]

    def disjoint(length: int, side: int) -> np.ndarray:
        inside = np.arange(length) * side // length == np.arange(side)[:, None]
        return (inside / np.maximum(inside.sum(1, keepdims=True), 1)).astype(np.float32)

    def nearest(x: jax.Array, size: tuple[int, int]) -> jax.Array:
        return jax.image.resize(x, (len(x), *size, x.shape[-1]), "nearest")

    for name, other in (("_bins", disjoint), ("resize", nearest)):
        with monkeypatch.context() as patch:
            patch.setattr(segmenter, name, other)
            assert relative(head.apply({"params": params}, maps)[0], data["logits"]) > 1e-3, name
