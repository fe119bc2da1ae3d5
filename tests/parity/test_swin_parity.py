"""Our SwinV2 against timm's and Hugging Face's on the same random weights (frozen by `make_swin.py`), and the names."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import FORWARD, check_forward, check_gradients, gradients_of_squares, relative, tensors

from visionfm_jax.errors import UserError
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.swin_v2 import (
    swin_v2_from_huggingface,
    swin_v2_from_timm,
    swin_v2_to_huggingface,
    swin_v2_to_timm,
)
from visionfm_jax.models import layers
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
CASES = sorted(p.stem.removeprefix("swin_") for p in HERE.glob("swin_*.npz"))
TO = {"timm": swin_v2_to_timm, "huggingface": swin_v2_to_huggingface}
ANY = SwinV2Config(size="P", image_size=32, window=4)


def from_timm(state: dict[str, np.ndarray], config: SwinV2Config = ANY, **changed: Any) -> dict:
    """With what a timm model of `config` says of itself."""
    facts = {
        "window_size": config.window, "pretrained_window_sizes": swin_v2.pretrained_windows(config),
        "norm_eps": 1e-5, "act_layer": "gelu",
    }  # fmt: skip
    return swin_v2_from_timm(state, config, **{**facts, **changed})


def from_huggingface(state: dict[str, np.ndarray], config: SwinV2Config = ANY, **changed: Any) -> dict:
    """Likewise, as the library's `config.json` has it."""
    theirs = {
        "window_size": config.window, "pretrained_window_sizes": swin_v2.pretrained_windows(config),
        "layer_norm_eps": 1e-5, "hidden_act": "gelu",
    }  # fmt: skip
    return swin_v2_from_huggingface(state, config, {**theirs, **changed})


FROM = {"timm": from_timm, "huggingface": from_huggingface}
OUTPUTS = ("stage0", "stage1", "stage2", "stage3", "pooled")


class Reference(NamedTuple):
    """One file: what the peer computed, and our model of the same shape and weights."""

    data: dict[str, np.ndarray]
    about: dict[str, Any]
    model: swin_v2.SwinV2
    params: dict

    def forward(self, params: dict) -> dict[str, jax.Array]:
        """By the names in `OUTPUTS`."""
        features = self.model.apply({"params": params}, self.data["images"].astype(np.float32))
        return dict(zip(OUTPUTS, (*features.maps, features.pooled), strict=True))


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Reference:
    with np.load(HERE / f"swin_{name}.npz") as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    size = swin_v2.SwinV2Size(about["width"], about["depths"], about["heads"])
    monkeypatch.setitem(swin_v2.SIZES, "parity", size)
    config = SwinV2Config(
        size="parity", patch_size=about["patch"], window=about["window"],
        pretrained_window=about["pretrained_window"], pretrained_image_size=about["pretrained_image"],
        image_size=tuple(about["image"]), roll_first=name.startswith("timm_padded"),
    )  # fmt: skip
    state = tensors(data["params"], about["shapes"])
    return Reference(data, about, swin_v2.SwinV2(config), FROM[about["library"]](state, config))


def in_names_of(library: str, params: dict) -> dict[str, np.ndarray]:
    """Our tree in the names of a file of the library; a `Swinv2Model` has no prefix."""
    return {name.removeprefix("swinv2."): value for name, value in TO[library](params).items()}


def test_every_form_is_frozen() -> None:
    assert CASES == [
        "huggingface_padded", "huggingface_padded7", "huggingface_pretrained", "huggingface_window4",
        "timm_padded", "timm_padded7", "timm_pretrained", "timm_window4", "timm_window7",
    ]  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    tree, outputs = gradients_of_squares(reference.forward, reference.params)
    assert set(outputs) == set(OUTPUTS) <= reference.data.keys()
    for key, ours in outputs.items():
        check_forward(ours, reference.data[key], key)
    gradients = in_names_of(reference.about["library"], tree)
    check_gradients(gradients, reference.data["gradients"], reference.about["shapes"])


@pytest.mark.parametrize("name", CASES)
def test_tree_is_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    image = jnp.zeros((1, *reference.data["images"].shape[1:]))
    own = jax.eval_shape(reference.model.init, jax.random.key(0), image)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(own).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten(reference.params).items()}


@pytest.mark.parametrize("name", CASES)
def test_round_trip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    back = in_names_of(reference.about["library"], reference.params)
    assert {k: list(v.shape) for k, v in back.items()} == reference.about["shapes"]
    ravelled = np.concatenate([back[k].ravel() for k in reference.about["shapes"]])
    np.testing.assert_array_equal(ravelled, reference.data["params"].astype(np.float32))
    for library in FROM:
        again = FROM[library](TO[library](reference.params))
        jax.tree.map(np.testing.assert_array_equal, again, reference.params)


def _tanh_gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def _natural_log(window: tuple[int, int], pretrained: tuple[int, int]) -> np.ndarray:
    offsets = [np.arange(1 - side, side, dtype=np.float32) for side in window]
    return np.stack(np.meshgrid(*[np.sign(o) * np.log1p(np.abs(o)) for o in offsets], indexing="ij"), -1)


MISTAKES: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "eps 1e-6": ("timm_window4", lambda patch: patch.setattr(swin_v2, "EPS", 1e-6)),
    "tanh GELU": ("timm_window4", lambda patch: patch.setattr(layers, "gelu", _tanh_gelu)),
    "no mask": ("timm_window4", lambda patch: patch.setattr(swin_v2, "shifted_window_mask", lambda windows: None)),
    "logarithms of pixels": ("timm_window7", lambda patch: patch.setattr(swin_v2, "log_coordinates", _natural_log)),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_gate_catches(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = MISTAKES[mistake]
    reference = load(name, monkeypatch)
    make(monkeypatch)
    outputs = jax.jit(reference.forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 2 * FORWARD


@pytest.mark.parametrize("name", ["huggingface_padded", "timm_padded"])
def test_gate_catches_the_other_order_of_rolling_and_padding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    config = dataclasses.replace(reference.model.config, roll_first=name.startswith("huggingface"))
    outputs = jax.jit(reference._replace(model=swin_v2.SwinV2(config)).forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 0.01


def test_gate_catches_forgotten_pretrained_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load("timm_pretrained", monkeypatch)
    config = SwinV2Config(size="parity", patch_size=4, window=8)
    outputs = jax.jit(reference._replace(model=swin_v2.SwinV2(config)).forward)(reference.params)
    assert relative(outputs["pooled"], reference.data["pooled"]) > 2 * FORWARD


# Names and layout alone.


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Of timm, 2, 4, 1 and 1 layers, widths 16 to 128."""
    return swin_v2_to_timm(load("timm_window4", monkeypatch).params)


def test_layers_are_grouped_as_the_loop_has_them(state: dict[str, np.ndarray]) -> None:
    stage = from_timm(state)["stage1"]["blocks"]
    for layer in range(4):
        own = stage[str(layer % 2)]["attn"]
        np.testing.assert_array_equal(
            own["out"]["kernel"][layer // 2], state[f"layers.1.blocks.{layer}.attn.proj.weight"].T
        )
        q, v = np.split(own["qkv"]["bias"][layer // 2], 2)
        np.testing.assert_array_equal(q, state[f"layers.1.blocks.{layer}.attn.q_bias"])
        np.testing.assert_array_equal(v, state[f"layers.1.blocks.{layer}.attn.v_bias"])


def test_what_follows_from_windows_and_classifiers_are_skipped(state: dict[str, np.ndarray]) -> None:
    params = from_timm(state)
    extra = {
        "layers.0.blocks.1.attn_mask": np.zeros((4, 16, 16)), "layers.0.blocks.1.attn.k_bias": np.zeros(16),
        "layers.0.blocks.0.attn.relative_coords_table": np.zeros((1, 7, 7, 2)),
        "layers.0.blocks.0.attn.relative_position_index": np.zeros((16, 16)),
        "head.fc.weight": np.zeros((10, 128)), "head.fc.bias": np.zeros(10),
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, from_timm(state | extra), params)
    theirs = swin_v2_to_huggingface(params)
    extra = {
        "swinv2.encoder.layers.0.blocks.0.attention.self.relative_coords_table": np.zeros((1, 7, 7, 2)),
        "classifier.weight": np.zeros((10, 128)), "classifier.bias": np.zeros(10),
    }  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, from_huggingface(theirs | extra), params)


def test_the_authors_files_merge_at_the_end_of_a_stage(state: dict[str, np.ndarray]) -> None:
    for stage in (1, 2, 3):
        for name in ("reduction.weight", "norm.weight", "norm.bias"):
            state[f"layers.{stage - 1}.downsample.{name}."] = state.pop(f"layers.{stage}.downsample.{name}")
    theirs = {name.removesuffix("."): value for name, value in state.items()} | {"head.weight": np.zeros((10, 128))}
    params = from_timm(theirs)
    assert params["merging1"]["reduction"]["kernel"].shape == (128, 64)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layers.1.blocks.3.mlp.fc1.bias": None}, r"timm SwinV2 stage 1 of 4 layers: missing layers\.1\.blocks\.3\."),
        ({"layers.2.blocks.0.norm3.weight": (64,)}, r"stage 2 of 1 layers: unknown layers\.2\.blocks\.0\.norm3\."),
        ({"norm.bias": None}, r"stage 3 of 1 layers: missing norm\.bias"),
        ({"layers.4.blocks.0.norm1.bias": (16,)}, r"unknown layers\.4\.blocks\.0\.norm1\.bias"),
        ({"layers.0.blocks.0.attn.logit_scale": (2,)}, r"logit_scale \(2,\) instead of \(2, 1, 1\)|\(N, 1, 1\)"),
        ({"layers.2.downsample.reduction.weight": (64, 64)}, r"reduction\.weight \(64, 64\) instead of \(64, 128\)"),
    ],
)  # fmt: skip
def test_bad_state(state: dict[str, np.ndarray], change: dict[str, tuple | None], says: str) -> None:
    changed = {k: v for k, v in (state | {k: s and np.zeros(s) for k, s in change.items()}).items() if v is not None}
    with pytest.raises(UserError, match=says) as error:
        from_timm(changed)
    assert "\n" not in str(error.value)


def test_stages_that_do_not_fit_together(state: dict[str, np.ndarray]) -> None:
    theirs = swin_v2_to_huggingface(from_timm(state))
    stage = {k: v for k, v in theirs.items() if ".layers.1.blocks.0." in k or ".layers.1.downsample." in k}
    theirs = {k: v for k, v in theirs.items() if ".layers.2." not in k}
    theirs |= {k.replace(".layers.1.", ".layers.2."): v for k, v in stage.items()}
    with pytest.raises(UserError, match=r"stages of widths \[16, 32, 32, 128\]"):
        from_huggingface(theirs)


PADDED = SwinV2Config(size="P", image_size=52, window=4)


@pytest.mark.parametrize(
    ("library", "config", "changed", "says"),
    [
        ("timm", PADDED, {}, r"rolls_before_padding is True, but SwinV2Config.roll_first makes it False"),
        ("huggingface", dataclasses.replace(PADDED, roll_first=True), {}, r"rolls_before_padding is False, but"),
        ("timm", ANY, {"window_size": 8}, r"window_size is 8, but SwinV2Config.window makes it 4"),
        ("timm", ANY, {"pretrained_window_sizes": (4, 4, 4, 2)}, r"sizes is \[4, 4, 4, 2\], but .* it \[0, 0, 0, 0\]"),
        ("timm", ANY, {"norm_eps": 1e-6}, r"norm_eps is 1e-06, but this project's SwinV2 makes it 1e-05"),
        ("timm", ANY, {"act_layer": "gelu_tanh"}, r"act_layer is 'gelu_tanh', but"),
        ("huggingface", ANY, {"hidden_act": "quick_gelu"}, r"hidden_act is 'quick_gelu', but"),
        ("huggingface", ANY, {"layer_norm_eps": 1e-12}, r"layer_norm_eps is 1e-12, but"),
    ],
)  # fmt: skip
def test_what_names_do_not_tell_must_agree(
    state: dict[str, np.ndarray], library: str, config: SwinV2Config, changed: dict[str, Any], says: str
) -> None:
    state = state if library == "timm" else swin_v2_to_huggingface(from_timm(state))
    with pytest.raises(UserError, match=says) as error:
        FROM[library](state, config, **changed)
    assert "\n" not in str(error.value)


def test_bad_tree(state: dict[str, np.ndarray]) -> None:
    params = from_timm(state)
    normed = params["stage1"]["blocks"] | {"1": params["stage1"]["blocks"]["1"] | {"norm": {"scale": np.ones((2, 32))}}}
    for to in TO.values():
        with pytest.raises(UserError, match="norm the main branch every few blocks"):
            to(params | {"stage1": {"blocks": normed}})
        with pytest.raises(UserError, match=r"no SwinV2 stage 0 tree: unknown merging3/kernel"):
            to(params | {"merging3": {"kernel": np.ones(2)}})
        with pytest.raises(UserError, match=r"no SwinV2 tree: missing stage3/blocks"):
            to({k: v for k, v in params.items() if k != "stage3"})
