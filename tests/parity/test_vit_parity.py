"""Our ViT against timm's and Hugging Face's on the same random weights (frozen by `make_vit.py`), and the names.

The gates are ten times our error here (README.md) and under the smallest real mistake: see `test_gate_catches`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from gates import FORWARD, FORWARD_MAX, GRADIENT, GRADIENT_TENSOR, relative

from visionfm_jax.config import ViTConfig
from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import vit_from_huggingface, vit_to_huggingface
from visionfm_jax.interop.timm import flatten, vit_from_timm, vit_to_timm
from visionfm_jax.models import layers, vit

HERE = Path(__file__).parent
CASES = sorted(p.stem.removeprefix("vit_") for p in HERE.glob("vit_*.npz"))
FROM = {"timm": vit_from_timm, "huggingface": vit_from_huggingface}
TO = {"timm": vit_to_timm, "huggingface": vit_to_huggingface}


class Reference(NamedTuple):
    """One file: what the peer computed, and our model of the same shape and weights."""

    data: dict[str, np.ndarray]
    about: dict[str, Any]
    model: vit.ViT
    params: dict

    def group(self, name: str) -> dict[str, np.ndarray]:
        """The arrays under "NAME/", in float32, by the peer's names."""
        return {
            k.removeprefix(f"{name}/"): v.astype(np.float32) for k, v in self.data.items() if k.startswith(f"{name}/")
        }

    def forward(self, params: dict) -> tuple[jax.Array, jax.Array]:
        """Logits (B, C), features (B, D)."""
        images = self.data["images"].astype(np.float32)
        logits, state = self.model.apply(
            {"params": params}, images, capture_intermediates=lambda module, _: module.name == "norm"
        )
        return logits, state["intermediates"]["norm"]["__call__"][0]


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Reference:
    with np.load(HERE / f"vit_{name}.npz") as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    size = vit.Size(about["width"], about["depth"], about["heads"], about["mlp"])
    monkeypatch.setitem(vit.SIZES, "parity", size)
    config = ViTConfig(
        size="parity", patch_size=about["patch_size"], image_size=about["image_size"], pool=about["pool"]
    )
    reference = Reference(data, about, vit.ViT(config, about["classes"]), {})
    return reference._replace(params=FROM[about["library"]](reference.group("param")))


def test_every_form_is_frozen() -> None:
    assert CASES == ["huggingface_cls", "timm_cls", "timm_gap", "timm_gap_head80"]


@pytest.mark.parametrize("name", CASES)
def test_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    logits, features = jax.jit(reference.forward)(reference.params)
    for key, ours in (("logits", logits), ("logits_fp64", logits), ("features", features)):
        theirs = reference.data[key]
        assert relative(ours, theirs) <= FORWARD, key
        assert np.abs(ours - theirs).max() <= FORWARD_MAX * np.abs(theirs).max(), key


@pytest.mark.parametrize("name", CASES)
def test_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)

    def loss(params: dict) -> jax.Array:
        log_p = jax.nn.log_softmax(reference.forward(params)[0])
        return -jnp.take_along_axis(log_p, reference.data["labels"][:, None], 1).mean()

    ours = TO[reference.about["library"]](jax.jit(jax.grad(loss))(reference.params))
    theirs = reference.group("grad")
    assert set(ours) == set(theirs)
    # Adding a constant to every key changes no softmax: the true gradient of a key bias is zero.
    for grads in (ours, theirs):
        for key in list(grads):
            if key.endswith("attn.qkv.bias"):
                q, k, v = np.split(grads.pop(key), 3)
                assert np.abs(k).max() < 1e-7
                grads[key] = np.concatenate([q, v])
            elif key.endswith("attention.key.bias"):
                assert np.abs(grads.pop(key)).max() < 1e-7
    worst = {key: relative(ours[key], theirs[key]) for key in theirs}
    assert max(worst.values()) <= GRADIENT_TENSOR, max(worst.items(), key=lambda kv: kv[1])
    together = [np.concatenate([grads[key].ravel() for key in theirs]) for grads in (ours, theirs)]
    assert relative(*together) <= GRADIENT


@pytest.mark.parametrize("name", CASES)
def test_tree_is_the_models_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    image = jnp.zeros((1, *reference.data["images"].shape[1:]))
    own = jax.eval_shape(reference.model.init, jax.random.key(0), image)["params"]
    shapes = {path: leaf.shape for path, leaf in flatten(own).items()}
    assert shapes == {path: leaf.shape for path, leaf in flatten(reference.params).items()}


def _tanh_gelu(x: jax.Array, approximate: bool) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


MISTAKES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "eps 1e-5": lambda patch: patch.setattr(layers, "LAYER_NORM_EPS", 1e-5),
    "eps 1e-12": lambda patch: patch.setattr(layers, "LAYER_NORM_EPS", 1e-12),
    "tanh GELU": lambda patch: patch.setattr(nn, "gelu", _tanh_gelu),
}


@pytest.mark.parametrize("name", ["timm_cls", "timm_gap"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_gate_catches(mistake: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    MISTAKES[mistake](monkeypatch)
    logits, _ = jax.jit(reference.forward)(reference.params)
    assert relative(logits, reference.data["logits"]) > 2 * FORWARD


# Names and layout alone: arrays of a small shape table, each element its own number.


def timm_shapes(pool: str, D: int = 4, M: int = 6, P: int = 2, T: int = 5, C: int = 3, L: int = 11) -> dict[str, tuple]:
    """A timm ViT's names; 11 layers, so that layer 10 would sort before layer 2."""
    norm = "norm" if pool == "cls" else "fc_norm"
    shapes: dict[str, tuple] = {
        "patch_embed.proj.weight": (D, 3, P, P), "patch_embed.proj.bias": (D,), "pos_embed": (1, T, D),
        f"{norm}.weight": (D,), f"{norm}.bias": (D,), "head.weight": (C, D), "head.bias": (C,),
    }  # fmt: skip
    if pool == "cls":
        shapes["cls_token"] = (1, 1, D)
    for i in range(L):
        for key, shape in {
            "norm1": (D,), "norm2": (D,), "attn.qkv": (3 * D, D), "attn.proj": (D, D), "mlp.fc1": (M, D),
            "mlp.fc2": (D, M),
        }.items():  # fmt: skip
            shapes |= {f"blocks.{i}.{key}.weight": shape, f"blocks.{i}.{key}.bias": shape[:1]}
    return shapes


def counted(shapes: dict[str, tuple]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(shape, np.float32) for k, shape in shapes.items()}


@pytest.mark.parametrize("pool", ["cls", "gap"])
def test_timm_round_trip(pool: str) -> None:
    state = counted(timm_shapes(pool))
    params = vit_from_timm(state)
    back = vit_to_timm(params)
    assert set(back) == set(state)
    for key in state:
        np.testing.assert_array_equal(back[key], state[key])
    np.testing.assert_array_equal(params["blocks"]["mlp"]["fc1"]["kernel"][10], state["blocks.10.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(params["embed"]["kernel"][5], state["patch_embed.proj.weight"][:, 2, 0, 1])  # h w c


def test_huggingface_round_trip_and_trunk() -> None:
    params = vit_from_timm(counted(timm_shapes("cls")))
    state = vit_to_huggingface(params)
    key = "vit.encoder.layer.10.attention.attention.key.weight"
    np.testing.assert_array_equal(state[key], params["blocks"]["attn"]["qkv"]["kernel"][10, :, 4:8].T)
    for path, leaf in flatten(vit_from_huggingface(state)).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path])
    trunk = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}  # a ViTModel
    trunk |= {"pooler.dense.weight": np.zeros((4, 4)), "pooler.dense.bias": np.zeros(4)}
    assert set(vit_from_huggingface(trunk)) == set(params) - {"head"}
    assert set(vit_to_huggingface(vit_from_huggingface(trunk))) == {k for k in state if k.startswith("vit.")}


def test_trunk_without_head() -> None:
    state = counted(timm_shapes("gap"))
    del state["head.weight"], state["head.bias"]
    params = vit_from_timm(state)
    assert "head" not in params
    assert set(vit_to_timm(params)) == set(state)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"blocks.3.mlp.fc1.bias": None}, r"of 11 layers: missing blocks\.3\.mlp\.fc1\.bias\."),
        ({"head.bias": None}, r"missing head\.bias"),
        ({"blocks.0.ls1.gamma": (4,)}, r"unknown blocks\.0\.ls1\.gamma"),
        ({"norm.weight": None, "fc_norm.weight": (4,)}, r"missing norm\.weight; unknown fc_norm\.weight"),
        ({"blocks.2.attn.proj.weight": (4, 5)}, r"blocks\.2\.attn\.proj\.weight \(4, 5\) instead of \(4, 4\)"),
        ({"pos_embed": (5, 4)}, r"pos_embed \(5, 4\) instead of \(1, T, 4\)"),
        ({"blocks.1.attn.qkv.bias": (8,)}, r"qkv\.bias \(8,\) instead of \(12,\)"),
        ({f"extra.{i}": (1,) for i in range(10)}, r"extra\.7 and 2 more\. Check"),
    ],
)
def test_bad_state(change: dict[str, tuple | None], says: str) -> None:
    shapes = {k: v for k, v in (timm_shapes("cls") | change).items() if v is not None}
    with pytest.raises(UserError, match=says) as error:
        vit_from_timm(counted(shapes))
    assert "\n" not in str(error.value)


def test_bad_tree() -> None:
    params = vit_from_timm(counted(timm_shapes("gap")))
    with pytest.raises(UserError, match="no mean pooling"):
        vit_to_huggingface(params)
    del params["norm"]["scale"]
    with pytest.raises(UserError, match="no ViT tree: missing norm/scale"):
        vit_to_timm(params)


def test_state_of_another_library() -> None:
    with pytest.raises(UserError, match=r"no Hugging Face ViT .*missing .*unknown vit\.blocks"):
        vit_from_huggingface(counted(timm_shapes("cls")))
