"""Our ViT against timm's and Hugging Face's on the same random weights (frozen by `make_vit.py`), and the names.

The gates are ten times our error here (README.md) and under the smallest real mistake: see `test_gate_catches`.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gates import FORWARD, FORWARD_MAX, GRADIENT, GRADIENT_TENSOR, relative

from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import vit_from_huggingface, vit_to_huggingface
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.timm import vit_from_timm, vit_to_timm
from visionfm_jax.models.backbones import vit
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.heads import Classifier

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
CASES = sorted(p.stem.removeprefix("vit_") for p in HERE.glob("vit_*.npz"))
TO = {"timm": vit_to_timm, "huggingface": vit_to_huggingface}


class Reference(NamedTuple):
    """One file: what the peer computed, and our model of the same shape and weights."""

    data: dict[str, np.ndarray]
    about: dict[str, Any]
    model: Classifier
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
        return logits, state["intermediates"]["norm"]["__call__"][-1]


def from_timm(state: dict[str, np.ndarray], config: ViTConfig, **changed: Any) -> dict:
    """With what a timm model of `config` says of itself."""
    facts = {"num_heads": vit.size_of(config).heads, "norm_eps": config.norm_eps, "act_layer": config.activation}
    pool = "token" if config.pool == "cls" else "avg"
    return vit_from_timm(state, config, **{**facts, "global_pool": pool, **changed})


def from_huggingface(state: dict[str, np.ndarray], config: ViTConfig, **changed: Any) -> dict:
    """Likewise, as the library's `config.json` has it."""
    activation = {"gelu_tanh": "gelu_pytorch_tanh"}.get(config.activation, config.activation)
    theirs = {
        "model_type": "vit", "num_attention_heads": vit.size_of(config).heads, "layer_norm_eps": config.norm_eps,
        "hidden_act": activation,
    }  # fmt: skip
    return vit_from_huggingface(state, config, {**theirs, **changed})


FROM = {"timm": from_timm, "huggingface": from_huggingface}
CLS, GAP = ViTConfig(size="P", pool="cls"), ViTConfig(size="P", pool="gap")


def load(name: str, monkeypatch: pytest.MonkeyPatch) -> Reference:
    with np.load(HERE / f"vit_{name}.npz") as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    size = vit.TransformerSize(about["width"], about["depth"], about["heads"], about["mlp"])
    monkeypatch.setitem(vit.SIZES, "parity", size)
    config = ViTConfig(
        size="parity", patch_size=about["patch_size"], image_size=about["image_size"], pool=about["pool"],
        norm_eps=about["eps"], activation=about["activation"],
    )  # fmt: skip
    reference = Reference(data, about, Classifier(vit.ViT(config), about["classes"]), {})
    return reference._replace(params=FROM[about["library"]](reference.group("param"), config))


def test_every_form_is_frozen() -> None:
    assert CASES == [
        "huggingface_cls", "huggingface_default_eps", "timm_cls", "timm_gap", "timm_gap_head80", "timm_tanh",
    ]  # fmt: skip


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

    ours = TO[reference.about["library"]](jax.jit(jax.grad(loss))(reference.params), reference.model.backbone.config)
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


MISTAKES = {"eps 1e-5": ("norm_eps", 1e-5), "eps 1e-12": ("norm_eps", 1e-12), "tanh GELU": ("activation", "gelu_tanh"),
            "quick GELU": ("activation", "quick_gelu")}  # fmt: skip


@pytest.mark.parametrize("name", ["timm_cls", "timm_gap"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_gate_catches(mistake: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load(name, monkeypatch)
    field, value = MISTAKES[mistake]
    config = dataclasses.replace(reference.model.backbone.config, **{field: value})
    reference = reference._replace(model=Classifier(vit.ViT(config), reference.about["classes"]))
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
    params = from_timm(state, CLS if pool == "cls" else GAP)
    back = vit_to_timm(params, CLS if pool == "cls" else GAP)
    assert set(back) == set(state)
    for key in state:
        np.testing.assert_array_equal(back[key], state[key])
    np.testing.assert_array_equal(params["blocks"]["mlp"]["fc1"]["kernel"][10], state["blocks.10.mlp.fc1.weight"].T)
    np.testing.assert_array_equal(params["embed"]["kernel"][5], state["patch_embed.proj.weight"][:, 2, 0, 1])  # h w c


def test_huggingface_round_trip_and_trunk() -> None:
    params = from_timm(counted(timm_shapes("cls")), CLS)
    state = vit_to_huggingface(params, CLS)
    key = "vit.encoder.layer.10.attention.attention.key.weight"
    np.testing.assert_array_equal(state[key], params["blocks"]["attn"]["qkv"]["kernel"][10, :, 4:8].T)
    config = dataclasses.replace(CLS, pos_resize="bicubic")  # the table here is of other images
    for path, leaf in flatten(from_huggingface(state, config)).items():
        np.testing.assert_array_equal(leaf, flatten(params)[path])
    trunk = {k.removeprefix("vit."): v for k, v in state.items() if k.startswith("vit.")}  # a ViTModel
    trunk |= {"pooler.dense.weight": np.zeros((4, 4)), "pooler.dense.bias": np.zeros(4)}
    assert set(from_huggingface(trunk, config)) == set(params) - {"head"}
    assert set(vit_to_huggingface(from_huggingface(trunk, config), CLS)) == {k for k in state if k.startswith("vit.")}


def test_trunk_without_head() -> None:
    state = counted(timm_shapes("gap"))
    del state["head.weight"], state["head.bias"]
    params = from_timm(state, GAP)
    assert "head" not in params
    assert set(vit_to_timm(params, GAP)) == set(state)


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
        ({f"extra.{i}": (1,) for i in range(10)}, r"unknown extra \(10\)\. Check"),
    ],
)
def test_bad_state(change: dict[str, tuple | None], says: str) -> None:
    shapes = {k: v for k, v in (timm_shapes("cls") | change).items() if v is not None}
    with pytest.raises(UserError, match=says) as error:
        from_timm(counted(shapes), CLS)
    assert "\n" not in str(error.value)


def test_bad_tree() -> None:
    params = from_timm(counted(timm_shapes("gap")), GAP)
    with pytest.raises(UserError, match=r"ViTConfig\.pool = 'gap', there cls"):
        vit_to_huggingface(params, GAP)
    del params["norm"]["scale"]
    with pytest.raises(UserError, match="no ViT tree: missing norm/scale"):
        vit_to_timm(params, GAP)


def test_state_of_another_library() -> None:
    with pytest.raises(UserError, match=r"no Hugging Face vit .*missing .*unknown blocks"):
        from_huggingface(counted(timm_shapes("cls")), CLS)


@pytest.mark.parametrize(
    ("pool", "changed", "says"),
    [
        # The names are those of global_pool="token": a mean of all tokens, taken for the class token, was off by 0.93.
        (
            "cls",
            {"global_pool": "avg"},
            r"is 'avg', which is ViTConfig.pool = 'norm_gap', but ViTConfig.pool makes",
        ),
        ("gap", {"global_pool": "max"}, r'global_pool="max" without a class token is not supported'),
        ("gap", {"global_pool": "token"}, r'global_pool="token" without a class token is not supported'),
        ("cls", {"norm_eps": 1e-5}, r"norm_eps is 1e-05, but ViTConfig.norm_eps makes it 1e-06"),
        ("cls", {"act_layer": "quick_gelu"}, r"act_layer is 'quick_gelu', but ViTConfig.activation makes it 'gelu'"),
        ("gap", {"num_heads": 4}, r"num_heads is 4, but ViTConfig.heads makes it 3"),
    ],
)
def test_what_names_do_not_tell_must_agree(pool: str, changed: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        from_timm(counted(timm_shapes(pool)), CLS if pool == "cls" else GAP, **changed)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("config", "changed", "says"),
    [
        (CLS, {"layer_norm_eps": 1e-12}, r"layer_norm_eps is 1e-12, but ViTConfig.norm_eps makes it 1e-06"),
        (CLS, {"hidden_act": "quick_gelu"}, r"hidden_act is 'quick_gelu', but"),
        (CLS, {"hidden_act": "relu"}, r"hidden_act is 'relu', but"),
        (CLS, {"num_attention_heads": 12}, r"num_attention_heads is 12, but"),
        (GAP, {}, r"pooling is 'cls', but ViTConfig.pool makes it 'gap'"),
    ],
)
def test_what_huggingface_says_must_agree(config: ViTConfig, changed: dict[str, Any], says: str) -> None:
    state = vit_to_huggingface(from_timm(counted(timm_shapes("cls")), CLS), CLS)
    with pytest.raises(UserError, match=says):
        from_huggingface(state, config, **changed)


def test_a_setting_that_is_missing_is_not_guessed() -> None:
    state = vit_to_huggingface(from_timm(counted(timm_shapes("cls")), CLS), CLS)
    with pytest.raises(UserError, match=r"lacks 'layer_norm_eps'; give all that config\.json"):
        vit_from_huggingface(state, CLS, {"model_type": "vit", "num_attention_heads": 3, "hidden_act": "gelu"})
