"""EoMT against Hugging Face transformers (frozen by `make_eomt.py`): predictions, gradients, losses."""

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
from gates import check_forward, check_gradients, gradients_of_squares, relative, tensors

from visionfm_jax.losses.masks import Truth, Weights, set_losses
from visionfm_jax.models import eomt
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.eomt import Eomt, Masked
from visionfm_jax.models.layers import no_gather

pytestmark = pytest.mark.usefixtures("quick_compiles")

MODEL = ViTConfig(
    width=16, depth=4, heads=2, mlp=32, patch_size=16, image_size=64, pool="cls", registers=2, pos_embed="patches",
    layer_scale=1.0,
)  # fmt: skip
NAMES = {
    "ln1": "norm1", "ln2": "norm2", "attn.out": "attention.out_proj", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip


@functools.cache
def frozen() -> tuple[dict[str, np.ndarray], dict]:
    with np.load(Path(__file__).with_name("eomt.npz")) as file:
        data = dict(file)
    return data, json.loads(str(data.pop("about")))


def layer(state: dict[str, Any], name: str) -> dict:
    """A norm, or a matrix."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return {"scale": weight, "bias": bias} if weight.ndim == 1 else {"kernel": weight.T, "bias": bias}


def block(state: dict[str, Any], i: int) -> dict:
    out: dict[str, Any] = {"ls1": state[f"layers.{i}.layer_scale1.lambda1"]}
    out["ls2"] = state[f"layers.{i}.layer_scale2.lambda1"]
    for ours, theirs in NAMES.items():
        *above, last = ours.split(".")
        (out.setdefault(above[0], {}) if above else out)[last] = layer(state, f"layers.{i}.{theirs}")
    parts = [layer(state, f"layers.{i}.attention.{n}_proj") for n in "qkv"]
    out["attn"]["qkv"] = {k: jnp.concatenate([p[k] for p in parts], -1) for k in ("kernel", "bias")}
    return out


def params_of(state: dict[str, Any]) -> dict:
    """Theirs under our names."""
    head = {f"mask_{i}": layer(state, f"mask_head.fc{i + 1}") for i in range(3)}
    head |= {"queries": state["query.weight"], "classes": layer(state, "class_predictor")}
    for i in range(2):
        name = f"upscale_block.block.{i}"
        weight, bias = state[f"{name}.conv1.weight"], state[f"{name}.conv1.bias"]
        head[f"up_{i}"] = {
            "up": {"kernel": rearrange(weight, "i o p q -> i (p q o)"), "bias": jnp.tile(bias, 4)},
            "depthwise": rearrange(state[f"{name}.conv2.weight"], "d 1 h w -> h w d"),
            "norm": layer(state, f"{name}.layernorm2d"),
        }
    patches = "embeddings.patch_embeddings.projection"
    return {
        "cls_token": state["embeddings.cls_token"][0, 0],
        "registers": state["embeddings.register_tokens"][0],
        "pos_embed": state["embeddings.position_embeddings.weight"],
        "embed": {
            "kernel": rearrange(state[f"{patches}.weight"], "d c p q -> (p q c) d"),
            "bias": state[f"{patches}.bias"],
        },
        "norm": layer(state, "layernorm"),
        "blocks": jax.tree.map(lambda *a: jnp.stack(a), *(block(state, i) for i in range(MODEL.depth))),
        "head": head,
    }


MASKED = Masked(jnp.ones(2), jax.random.split(jax.random.key(0), 2))


def predicted(state: dict[str, Any], masked: Masked | None = MASKED) -> dict[str, jax.Array]:
    """In their order of dims."""
    data, _ = frozen()
    images = rearrange(data["images"].astype(np.float32), "b c h w -> b h w c")
    model = Eomt(MODEL, jnp.float32, no_gather, 5, 7, 2)
    out = model.apply({"params": params_of(state)}, images, None, masked)
    return {"logits": out.logits, "masks": rearrange(out.masks, "n b h w q -> n b q h w")}


def test_predictions_and_gradients_with_masked_attention():
    data, about = frozen()
    state = tensors(data["params"], about["params"])
    assert 0.2 < about["above_0"] < 0.8
    gradients, outputs = gradients_of_squares(lambda own: predicted(state | own), state)
    for name, ours in outputs.items():
        check_forward(ours, data[name], name)
    for name in [name for name in gradients if name.endswith("k_proj.bias")]:  # changes no softmax
        assert np.abs(gradients.pop(name)).max() < 1e-5, name
    check_gradients(gradients, data["gradients"], about["gradients"])


def test_predictions_without_masked_attention():
    data, about = frozen()
    state = tensors(data["params"], about["params"])
    for name, ours in jax.jit(lambda: predicted(state, None))().items():
        check_forward(ours[0], data[f"alone/{name}"], name)
        assert relative(data[name][-1], data[f"alone/{name}"]) > 1e-2  # masks matter


def test_gate_catches_another_upsampling(monkeypatch):
    """Of attention to where a mask's nearest places, not the mean of the inner four, are above 0."""
    data, about = frozen()
    state = tensors(data["params"], about["params"])
    monkeypatch.setattr(eomt, "resize", lambda x, size: x[:, ::4, ::4])
    assert relative(predicted(state)["masks"][-1], data["masks"][-1]) > 1e-3


def test_losses_and_their_gradients():
    """Ours take all places in one pass; each image by itself, the whole batch's numbers of masks and queries after."""
    data, _ = frozen()
    pixels = rearrange(data["truth"].astype(np.float32), "b m h w -> b m (h w)")
    present = np.arange(4) < data["objects"][:, None]
    truth = Truth(pixels, np.ones_like(pixels[:, 0]), data["labels"], present)
    weights, found, queries = Weights(2.0, 5.0, 5.0, 0.1), data["objects"].sum(), 2 * 7

    def loss(logits: jax.Array, masks: jax.Array) -> jax.Array:
        masks = rearrange(masks, "n b q h w -> n b (h w) q")
        of_image = jax.vmap(lambda *one: set_losses(*one, weights))
        parts = jax.vmap(of_image, (0, 0, None))(logits, masks, truth)
        classes = parts["class"] / (found + 0.1 * (queries - found))
        return (2 * classes + 5 * (parts["mask"] + parts["dice"]) / found).sum()

    ours, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(data["logits"], data["masks"])
    assert float(ours) == pytest.approx(float(data["loss"]), rel=3e-6)
    for name, gradient in zip(("logits", "masks"), gradients, strict=True):
        assert relative(gradient, data[f"loss/{name}"]) < 1e-5, name
