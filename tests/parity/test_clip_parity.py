"""Our text tower and contrastive losses against OpenCLIP's (frozen by `make_clip.py`), and the names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import FORWARD, GRADIENT, check_forward, check_gradients, gradients_of_squares, relative, tensors
from jax.sharding import PartitionSpec as P

from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.open_clip import text_from_open_clip, text_to_open_clip
from visionfm_jax.losses import contrastive
from visionfm_jax.losses.contrastive import Targets, clip_loss, sigmoid_loss
from visionfm_jax.models import clip, layers, text
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.layers import l2_normalize
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.mesh import BATCH, all_rows, first_row, make_mesh

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
CASES = sorted(p.stem.removeprefix("text_") for p in HERE.glob("text_*.npz"))


def from_open_clip(state: dict[str, np.ndarray], config: TextConfig, **changed: Any) -> dict:
    """With the configuration that OpenCLIP has of such a model."""
    theirs = {"heads": text.size_of(config).heads, "width": text.size_of(config).width}
    if config.end_token < config.vocab_size - 1:
        theirs |= {"pool_type": "eos", "eos_id": config.end_token}
    quick = {"quick_gelu": changed.pop("quick_gelu")} if "quick_gelu" in changed else {}
    return text_from_open_clip(state, config, {"embed_dim": 48, "text_cfg": {**theirs, **changed}, **quick})


class Reference(NamedTuple):
    """One tower: what OpenCLIP computed, and our model of the same shape and weights."""

    data: dict[str, np.ndarray]
    about: dict[str, Any]
    model: clip.Clip
    params: dict  # the text part

    def forward(self, params: dict) -> dict[str, jax.Array]:
        """The normed end token and its embedding."""
        width = 8 * swin_v2.SIZES["P"].width
        rest = {"image_projection": jnp.zeros((width, self.about["embed"])), "scale": jnp.zeros(())}
        return self.model.apply({"params": rest | params}, self.data["tokens"], method=_both)


def _both(model: clip.Clip, tokens: jax.Array) -> dict[str, jax.Array]:
    return {"pooled": model.text(tokens), "embedding": model.embed_texts(tokens)}


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Reference:
    with np.load(HERE / f"text_{name}.npz") as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    monkeypatch.setitem(
        text.SIZES, "parity", text.TransformerSize(about["width"], about["depth"], about["heads"], 4 * about["width"])
    )
    config = ClipConfig(
        image=SwinV2Config(size="P"), embed_dim=about["embed"],
        text=TextConfig(
            size="parity", vocab_size=about["vocab"], context=about["context"], end_token=about["end"],
        ),
    )  # fmt: skip
    params = from_open_clip(tensors(data["params"], about["shapes"]), config.text)
    return Reference(data, about, clip.Clip(config), params)


def test_every_form_is_frozen() -> None:
    assert CASES == ["context77", "head64"]


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    tree, outputs = gradients_of_squares(reference.forward, reference.params)
    assert 0 < len(outputs.keys() & reference.data.keys()) == len(outputs)
    for key, ours in outputs.items():
        check_forward(ours, reference.data[key], key)
    check_gradients(text_to_open_clip(tree), reference.data["gradients"], reference.about["shapes"])


@pytest.mark.parametrize("name", CASES)
def test_tree_is_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    image = jnp.zeros((1, 64, 64, 3))
    own = jax.eval_shape(reference.model.init, jax.random.key(0), image, reference.data["tokens"])["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(own).items() if path.startswith("text")}
    assert shapes == {path: leaf.shape for path, leaf in flatten(reference.params).items()}


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _quick_gelu(x: jax.Array) -> jax.Array:
    return x * jax.nn.sigmoid(1.702 * x)


def _no_mask(*args: Any, causal: bool, **kwargs: Any) -> jax.Array:
    return attention(*args, **kwargs)


attention = layers.attention

MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "tanh GELU": lambda patch: patch.setattr(layers, "gelu", _tanh_gelu),
    "OpenAI's GELU": lambda patch: patch.setattr(layers, "gelu", _quick_gelu),
    "no mask": lambda patch: patch.setattr(layers, "attention", _no_mask),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_gate_catches(mistake: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    MISTAKES[mistake](monkeypatch)
    outputs = jax.jit(reference.forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 2 * FORWARD


def test_gate_catches_another_epsilon(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("head64", monkeypatch)
    reference.model.config.text.norm_eps = 1e-6
    outputs = jax.jit(reference.forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 2 * FORWARD


def test_gate_catches_the_largest_id_taken_for_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("head64", monkeypatch)
    config = reference.model.config
    config.text.end_token = int(reference.data["tokens"].max())
    outputs = jax.jit(reference.forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 0.1


# The losses, rows spread over devices.


class Losses(NamedTuple):
    """What OpenCLIP makes of the global batch on one device."""

    values: dict[str, np.ndarray]  # images, texts (G, D), scale, bias
    loss: np.ndarray
    gradients: dict[str, np.ndarray]


def frozen(name: str) -> Losses:
    with np.load(HERE / "clip_losses.npz") as file:
        data = dict(file)
    keys = ["images", "texts", "scale", *(["bias"] if f"{name}/bias" in data else [])]
    values = {k: np.float32(data[k] if k in data else data[f"{name}/{k}"]) for k in keys}
    return Losses(values, data[f"{name}/loss"], {k: data[f"{name}/gradient/{k}"] for k in keys})


def softmax_of_rows(images: jax.Array, texts: jax.Array, scale: jax.Array) -> jax.Array:
    return contrastive.clip_loss(images, texts, all_rows(images), all_rows(texts), scale, own_rows(images))


def sigmoid_of_rows(images: jax.Array, texts: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
    return sigmoid_loss(images, all_rows(texts), scale, bias, own_rows(images))


def own_rows(images: jax.Array) -> Targets:
    return Targets(first_row(len(images)) + jnp.arange(len(images)))


OF_ROWS = {"softmax": softmax_of_rows, "sigmoid": sigmoid_of_rows}


def over_devices(name: str, devices: int, replicas: int) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The mean over all rows, and its gradients."""

    def local(values: dict) -> jax.Array:
        scalars = [jnp.exp(values["scale"]), *([values["bias"]] if "bias" in values else [])]
        return OF_ROWS[name](l2_normalize(values["images"]), l2_normalize(values["texts"]), *scalars)

    values = frozen(name).values
    specs = {k: BATCH if v.ndim else P() for k, v in values.items()}
    mesh = make_mesh(replicas, jax.devices()[:devices])
    rows = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=BATCH, check_vma=False)
    return jax.jit(jax.value_and_grad(lambda v: rows(v).mean()))(values)


@pytest.mark.parametrize(("devices", "replicas"), [(1, 1), (4, 1), (8, 2)])
@pytest.mark.parametrize("name", OF_ROWS)
def test_losses(name: str, devices: int, replicas: int) -> None:
    loss, gradients = over_devices(name, devices, replicas)
    theirs = frozen(name)
    check_forward(loss, theirs.loss, "loss")
    for key, gradient in theirs.gradients.items():
        assert relative(gradients[key], gradient) <= GRADIENT, key


def _own_texts_only(images, texts, all_images, all_texts, scale, targets):
    return clip_loss(images, texts, images, texts, scale, Targets(jnp.arange(len(images))))


def _one_direction(images, texts, all_images, all_texts, scale, targets):
    return clip_loss(images, images, all_texts, all_texts, scale, targets)


@pytest.mark.parametrize("mistake", [_own_texts_only, _one_direction])
def test_gate_catches_in_losses(mistake: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contrastive, "clip_loss", mistake)
    loss, _ = over_devices("softmax", 4, 1)
    assert relative(loss, frozen("softmax").loss) > 2 * FORWARD


# Names and layout alone.

ANY = TextConfig(size="B")


@pytest.fixture
def params(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Two layers, width 128, with what the losses train."""
    return load("context77", monkeypatch).params | {"scale": np.float32(2.5), "bias": np.float32(-9.0)}


def test_round_trip(params: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("context77", monkeypatch)
    state = text_to_open_clip(reference.params)
    frozen_state = tensors(reference.data["params"], reference.about["shapes"])
    assert set(state) == set(frozen_state)
    for key, value in frozen_state.items():
        np.testing.assert_array_equal(state[key], value)
    jax.tree.map(np.testing.assert_array_equal, from_open_clip(text_to_open_clip(params), ANY), params)
    key = text_to_open_clip(params)["transformer.resblocks.1.attn.in_proj_weight"][128:256]
    np.testing.assert_array_equal(key, params["text"]["blocks"]["attn"]["qkv"]["kernel"][1, :, 128:256].T)


def test_whole_models_of_both_namings(params: dict) -> None:
    state = text_to_open_clip(params | {"image": {"stage0": np.zeros(3)}, "image_projection": np.zeros((3, 48))})
    assert {"logit_scale", "logit_bias"} < set(state)
    whole = state | {"visual.proj": np.zeros((3, 48)), "attn_mask": np.zeros((77, 77))}
    jax.tree.map(np.testing.assert_array_equal, from_open_clip(whole, ANY), params)
    custom = {k if k.startswith(("logit", "visual")) else f"text.{k}": v for k, v in whole.items()}
    jax.tree.map(np.testing.assert_array_equal, from_open_clip(custom, ANY), params)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"transformer.resblocks.0.ln_1.bias": None}, r"OpenCLIP text tower of 2 layers: missing transformer\.resb"),
        ({"transformer.resblocks.0.ls_1.gamma": (128,)}, r"unknown transformer\.resblocks\.0\.ls_1\.gamma"),
        ({"text_projection": None, "text_projection.weight": (48, 128)}, r"missing text_projection; unknown text_pro"),
        ({"positional_embedding": (77, 64)}, r"positional_embedding \(77, 64\) instead of \(77, 128\)"),
        ({"transformer.resblocks.1.attn.in_proj_bias": (128,)}, r"in_proj_bias \(128,\) instead of \(384,\)"),
        ({"logit_scale": (1,)}, r"logit_scale \(1,\) instead of \(\)"),
        ({"cls_emb": (128,)}, r"unknown cls_emb"),
    ],
)
def test_bad_state(params: dict, change: dict[str, tuple | None], says: str) -> None:
    state = text_to_open_clip(params) | {k: s and np.zeros(s) for k, s in change.items()}
    with pytest.raises(UserError, match=says) as error:
        from_open_clip({k: v for k, v in state.items() if v is not None}, ANY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"quick_gelu": True}, r"quick_gelu is 'quick_gelu', but TextConfig\.activation makes it 'gelu'"),
        ({"heads": 12}, r"heads is 12, but TextConfig\.heads makes it 8"),
        ({"pool_type": "last"}, r"pool_type is 'last', but"),
        ({"pool_type": "eos", "eos_id": 2}, r"end_token is 2, but TextConfig\.end_token makes it 49407"),
        (
            {"no_causal_mask": True, "final_ln_after_pool": True},
            r"has final_ln_after_pool, no_causal_mask in its text_cfg",
        ),
    ],
)
def test_what_names_do_not_tell_must_agree(params: dict, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        from_open_clip(text_to_open_clip(params), ANY, **changed)
    assert "\n" not in str(error.value)


def test_bad_tree(params: dict) -> None:
    with pytest.raises(UserError, match="no CLIP text tree: missing text/blocks/attn/out/bias"):
        text_to_open_clip({"image": {}, "scale": np.float32(0)})
    with pytest.raises(UserError, match="unknown head"):
        text_to_open_clip(params | {"head": np.zeros(3)})
