"""Our models of two towers against transformers' CLIP and SigLIP (frozen by `make_towers.py`)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from gates import GRADIENT, GRADIENT_TENSOR, check_forward, relative, sample, tensors

from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface_clip import clip_from_huggingface, clip_to_huggingface
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import Clip, ClipConfig
from visionfm_jax.models.text import TextConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
SHAPE = {"width": 16, "depth": 2, "heads": 2, "mlp": 24}
IMAGE, TEXT = {**SHAPE, "patch_size": 4, "image_size": 16}, {**SHAPE, "vocab_size": 40, "context": 8, "end_token": 39}
CONFIGS = {
    "clip": ClipConfig(
        image=ViTConfig(**IMAGE, pool="cls", pre_norm=True, patch_bias=False, norm_eps=1e-5, activation="quick_gelu"),
        text=TextConfig(**TEXT, activation="quick_gelu"),
        embed_dim=12,
    ),
    "siglip": ClipConfig(
        image=ViTConfig(**IMAGE, pool="map", activation="gelu_tanh"),
        text=TextConfig(**TEXT, activation="gelu_tanh", causal=False, pool="last", norm_eps=1e-6),
        embed_dim=16,
        image_projection=False,
        text_bias=True,
    ),
}


class Reference(NamedTuple):
    data: dict[str, np.ndarray]
    asked: dict[str, Any]
    state: dict[str, np.ndarray]
    config: ClipConfig


def load(name: str) -> Reference:
    with np.load(HERE / f"towers_{name}.npz") as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    return Reference(data, about["asked"], tensors(data.pop("params"), about["shapes"]), CONFIGS[name])


@pytest.mark.parametrize("name", CONFIGS)
def test_embeddings_and_gradients(name: str) -> None:
    reference = load(name)
    data, config = reference.data, reference.config
    params = clip_from_huggingface(reference.state, config, reference.asked)
    model = Clip(config, sigmoid=name == "siglip")
    images, cotangents = data["images"].astype(np.float32), data["cotangents"].astype(np.float32)
    own = jax.eval_shape(model.init, jax.random.key(0), images, data["tokens"])["params"]
    assert {k: v.shape for k, v in flatten(own).items()} == {k: v.shape for k, v in flatten(params).items()}

    def product(params: dict) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        out = model.apply({"params": params}, images, data["tokens"])
        return (out.image * cotangents[0]).sum() + (out.text * cotangents[1]).sum(), (out.image, out.text)

    gradients, (image, text) = jax.jit(jax.grad(product, has_aux=True))(params)
    check_forward(np.asarray(image), data["image"], "image")
    check_forward(np.asarray(text), data["text"], "text")
    exported = clip_to_huggingface(jax.tree.map(np.asarray, gradients), config, name)
    ours = {k: sample(exported[k]) for k in reference.state}
    theirs = tensors(data["gradients"], {k: v.shape for k, v in ours.items()})
    for key in [k for k in theirs if k.endswith("k_proj.bias")]:  # changes no softmax
        assert max(np.abs(ours.pop(key)).max(), np.abs(theirs.pop(key)).max()) < 1e-5
    for key in [k for k in theirs if "head.attention.in_proj_bias" in k]:
        for grads in (ours, theirs):
            grads[key] = np.delete(grads[key], np.s_[16:32])
    worst = {k: relative(ours[k], theirs[k]) for k in theirs if theirs[k].any()}
    assert max(worst.values()) <= GRADIENT_TENSOR, max(worst.items(), key=lambda kv: kv[1])
    together = [np.concatenate([g[k].ravel() for k in theirs]) for g in (ours, theirs)]
    assert relative(*together) <= GRADIENT


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str) -> None:
    reference = load(name)
    params = clip_from_huggingface(reference.state, reference.config, reference.asked)
    again = clip_to_huggingface(params, reference.config, name)
    assert set(again) == set(reference.state)
    for key, value in reference.state.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)


@pytest.mark.parametrize(
    ("name", "part", "changed", "says"),
    [
        (
            "clip",
            "text",
            {"activation": "gelu"},
            "text.activation is 'quick_gelu', but ClipConfig.text.activation",
        ),
        ("clip", "text", {"causal": False}, "text.causal is True"),
        ("clip", "text", {"end_token": 5}, "text.end_token is 39"),
        ("siglip", "text", {"pool": "end"}, "text.pool is 'last'"),
        ("siglip", "text", {"heads": 4}, "text.heads is 2"),
        ("siglip", "", {"text_bias": False}, "text_bias is True"),
    ],
)
def test_what_a_configuration_would_compute_otherwise_is_refused(name, part, changed, says) -> None:
    reference = load(name)
    config = reference.config
    if part:
        config = dataclasses.replace(config, **{part: dataclasses.replace(getattr(config, part), **changed)})
    else:
        config = dataclasses.replace(config, **changed)
    with pytest.raises(UserError, match=says):
        clip_from_huggingface(reference.state, config, reference.asked)
