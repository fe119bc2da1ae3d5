"""Our decoder against OpenCLIP's of CoCa, our masked images against Hugging Face's (frozen by `make_aurora.py`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import FORWARD, check_forward, check_gradients, gradients_of_squares, relative, tensors

from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.swin_v2 import swin_v2_from_huggingface, swin_v2_to_huggingface
from visionfm_jax.losses.captioning import caption_loss
from visionfm_jax.losses.masked import enlarge, pixel_loss
from visionfm_jax.models import aurora, decoder, layers
from visionfm_jax.models.aurora import Aurora, AuroraConfig
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.decoder import DecoderConfig

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent


class Reference(NamedTuple):
    """One file, and Aurora of the same shape; its other half is small and not looked at."""

    data: dict[str, np.ndarray]
    about: dict[str, Any]
    model: Aurora
    params: dict
    forward: Callable[[dict], dict[str, jax.Array]]


def read(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    with np.load(HERE / f"{name}.npz") as file:
        data = dict(file)
    return data, json.loads(str(data.pop("about")))


def run(model: Aurora, params: dict, method: str, *arguments: Any) -> Any:
    unused = {"scale": jnp.zeros(()), "mask_token": jnp.zeros(swin_v2.size_of(model.config.image).width)}
    return model.apply({"params": unused | params}, *arguments, method=method)


@pytest.fixture
def coca(monkeypatch: pytest.MonkeyPatch) -> Reference:
    data, about = read("coca")
    monkeypatch.setitem(
        decoder.SIZES,
        "parity",
        decoder.DecoderSize(about["width"], about["depths"], about["heads"], 4 * about["width"]),
    )
    text = DecoderConfig(size="parity", vocab_size=about["vocab"], context=about["context"])
    model, params = Aurora(AuroraConfig(image=SwinV2Config(size="P"), text=text)), {}
    for path, value in tensors(data["params"], about["shapes"]).items():
        at = params
        for key in path.split("/")[:-1]:
            at = at.setdefault(key, {})
        at[path.split("/")[-1]] = value

    def forward(params: dict) -> dict[str, jax.Array]:
        out, image = {}, params["image_tokens"]
        params = {name: params[name] for name in ("unimodal", "multimodal")}
        for name in ("causal", "bidirectional"):
            view = decoder.view_of(data["tokens"], text, causal=name == "causal")
            out[f"{name}/text"] = run(model, params, "encode_text", data["tokens"], view)
            out[f"{name}/logits"] = run(model, params, "decode_text", out[f"{name}/text"], view, image)
        return out | {"caption_loss": caption_loss(out["causal/logits"], data["tokens"], view.lengths)}

    return Reference(data, about, model, params, forward)


@pytest.fixture
def simmim(monkeypatch: pytest.MonkeyPatch) -> Reference:
    data, about = read("simmim")
    monkeypatch.setitem(swin_v2.SIZES, "parity", swin_v2.SwinV2Size(about["width"], about["depths"], about["heads"]))
    side, window = data["images"].shape[1], about["window"]
    image = SwinV2Config(size="parity", patch_size=about["patch"], image_size=side, window=window)
    theirs = {"window_size": window, "pretrained_window_sizes": [0] * 4, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    model = Aurora(AuroraConfig(image=image, text=DecoderConfig(size="P")))
    state = tensors(data["params"], about["shapes"])
    kernel, bias = state.pop("decoder.0.weight"), state.pop("decoder.0.bias")
    params = {
        "mask_token": state.pop("swinv2.embeddings.mask_token")[0, 0],
        "reconstruction": {"kernel": kernel[:, :, 0, 0].T, "bias": bias},
        "image": swin_v2_from_huggingface(state, image, theirs),
    }
    images, hidden = jnp.float32(data["images"]), data["hidden"]

    def forward(params: dict) -> dict[str, jax.Array]:
        features = run(model, params, "encode", images, None, enlarge(hidden, about["unit"] // about["patch"]))
        reconstructed = run(model, params, "reconstruct", features)
        # As many pixels of each image are hidden: Hugging Face's mean over all is that of the images' means.
        return {
            "reconstruction": reconstructed,
            "loss": pixel_loss(reconstructed, images, enlarge(hidden, about["unit"])).mean(),
        }

    return Reference(data, about, model, params, forward)


def huggingface_names(tree: dict) -> dict[str, np.ndarray]:
    reconstruction = tree["reconstruction"]
    return swin_v2_to_huggingface(tree["image"]) | {
        "swinv2.embeddings.mask_token": tree["mask_token"][None, None],
        "decoder.0.weight": reconstruction["kernel"].T[:, :, None, None], "decoder.0.bias": reconstruction["bias"],
    }  # fmt: skip


@pytest.mark.parametrize(("name", "names"), [("coca", flatten), ("simmim", huggingface_names)])
def test_forward_and_gradients(name: str, names: Callable, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue(name)
    tree, outputs = gradients_of_squares(reference.forward, reference.params)
    assert outputs.keys() == reference.data.keys() - {"params", "gradients", "tokens", "images", "hidden"}
    for key, ours in outputs.items():
        check_forward(ours, reference.data[key], key)
    check_gradients(names(tree), reference.data["gradients"], reference.about["shapes"])


@pytest.mark.parametrize("name", ["coca", "simmim"])
def test_tree_is_the_models_own(name: str, request: pytest.FixtureRequest) -> None:
    reference = request.getfixturevalue(name)
    image, tokens = jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, reference.model.config.text.context), jnp.int32)
    own = jax.eval_shape(reference.model.init, jax.random.key(0), image, tokens)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(own).items()}
    ours = {path: leaf.shape for path, leaf in flatten(reference.params).items() if path != "image_tokens"}
    assert ours == {path: shape for path, shape in shapes.items() if path.split("/")[0] in reference.params}


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _no_end(*args: Any, lengths: jax.Array | None = None, **kwargs: Any) -> jax.Array:
    return attention(*args, **kwargs)


def _pixels_first(x: jax.Array, pattern: str, **sides: int) -> jax.Array:
    return rearrange(x, pattern.replace("(c p q)", "(p q c)"), **sides)


attention, rearrange = layers.attention, aurora.rearrange

MISTAKES: dict[str, tuple[str, str, Callable[[pytest.MonkeyPatch], None]]] = {
    "eps 1e-6": ("coca", "causal/logits", lambda patch: patch.setattr(decoder, "EPS", 1e-6)),
    "tanh GELU": ("coca", "causal/logits", lambda patch: patch.setattr(layers, "gelu", _tanh_gelu)),
    "padding seen": ("coca", "bidirectional/logits", lambda patch: patch.setattr(layers, "attention", _no_end)),
    "colours last": ("simmim", "reconstruction", lambda patch: patch.setattr(aurora, "rearrange", _pixels_first)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_gate_catches(mistake: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    name, output, make = MISTAKES[mistake]
    reference = request.getfixturevalue(name)
    make(monkeypatch)
    outputs = jax.jit(reference.forward)(reference.params)
    assert relative(outputs[output], reference.data[output]) > 2 * FORWARD
