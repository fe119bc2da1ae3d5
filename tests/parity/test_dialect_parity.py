"""Our ViT against timm's and transformers' in each dialect of public weights (frozen by `make_dialects.py`).

At the resolution of the position table and at another one, which is not square.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from gates import GRADIENT, GRADIENT_TENSOR, check_forward, relative, sample, tensors
from safetensors.numpy import save_file

import visionfm_jax
from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import vit_from_huggingface, vit_to_huggingface
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.open_clip import visual_from_open_clip, visual_to_open_clip
from visionfm_jax.interop.timm import vit_from_timm, vit_to_timm
from visionfm_jax.models.backbones.vit import ViT, ViTConfig
from visionfm_jax.models.heads import Classifier

pytestmark = pytest.mark.usefixtures("quick_compiles")

HERE = Path(__file__).parent
NAMES = {p.stem.removeprefix("dialect_"): p for p in sorted(HERE.glob("dialect_*.npz"))}
# Of the peer's names, what has no place in our tree.
NOT_OURS = ("pooler.", "mask_token")
# Where what is added to every key is, of which every element is frozen: the end of a name, and the part of how many.
KEYS = {
    ".qkv.bias": (1, 3), "in_proj_bias": (1, 3), ".kv.bias": (0, 2), "key.bias": (0, 1), "k_proj.bias": (0, 1),
    "k_norm.bias": (0, 1),
}  # fmt: skip


class Reference(NamedTuple):
    """One file: what the peer computed, and our configuration of the same network."""

    data: dict[str, np.ndarray]
    library: str
    config: ViTConfig
    asked: dict[str, Any]
    state: dict[str, np.ndarray]  # by the peer's names

    def imported(self, **changed: Any) -> dict:
        """Our tree of the peer's weights, under the configuration with some fields changed."""
        config = ViTConfig(**{**vars(self.config), **changed})
        if self.library == "timm":
            return vit_from_timm(self.state, config, **self.asked)
        if self.library == "openclip":
            return visual_from_open_clip(self.state, config, self.asked)
        return vit_from_huggingface(self.state, config, self.asked)

    def exported(self, params: dict) -> dict[str, np.ndarray]:
        """The peer's state, as transformers' models without classifier name it."""
        if self.library == "timm":
            return vit_to_timm(params, self.config)
        if self.library == "openclip":
            return visual_to_open_clip(params, self.config)
        state = vit_to_huggingface(params, self.config, self.asked["model_type"])
        return {k if k in self.state else k.partition(".")[2]: v for k, v in state.items()}


@functools.cache
def load(name: str) -> Reference:
    with np.load(NAMES[name]) as file:
        data = dict(file)
    about = json.loads(str(data.pop("about")))
    state = tensors(data.pop("params"), about["shapes"])
    return Reference(data, about["library"], ViTConfig(size="P", **about["config"]), about["asked"], state)


def test_every_dialect_is_frozen() -> None:
    assert list(NAMES) == [
        "huggingface_augreg", "huggingface_clip", "huggingface_dinov2", "huggingface_dinov2_registers",
        "huggingface_dinov2_swiglu", "huggingface_dinov3", "huggingface_dinov3_swiglu", "huggingface_siglip",
        "huggingface_siglip2", "openclip_quickgelu", "timm_augreg", "timm_clip", "timm_deit3", "timm_dinov2",
        "timm_dinov2_registers", "timm_dinov3", "timm_dinov3_qkvb", "timm_qk_norm", "timm_siglip",
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_at_two_resolutions(name: str) -> None:
    reference = load(name)
    params, data = reference.imported(), reference.data
    classes = params["head"]["bias"].size if "head" in params else 0
    backbone = ViT(reference.config)
    model = Classifier(backbone, classes) if classes else backbone
    images = [data[f"images{i}"].astype(np.float32) for i in (0, 1)]
    own = jax.eval_shape(model.init, jax.random.key(0), images[0])["params"]
    assert {k: v.shape for k, v in flatten(own).items()} == {
        k: v.shape for k, v in flatten(params).items() if k != "projection"
    }

    def product(params: dict, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        network = {k: v for k, v in params.items() if k != "projection"}  # of OpenCLIP's towers, to the joint space
        out = model.apply({"params": network}, images)
        out = out if classes else out.pooled
        out = out @ params["projection"] if "projection" in params else out
        return (out * data["cotangent"].astype(np.float32)).sum(), out

    for i in (0, 1):
        gradients, outputs = jax.jit(jax.grad(product, has_aux=True))(params, images[i])
        check_forward(outputs, data[f"outputs{i}"], f"images{i}")
        sizes = {k: sample(v).shape for k, v in reference.state.items()}
        theirs = {k: v for k, v in tensors(data["gradients"][i], sizes).items() if not any(n in k for n in NOT_OURS)}
        check_gradients({k: sample(v) for k, v in reference.exported(gradients).items()}, theirs)


def check_gradients(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> None:
    """The gates. Adding a constant to every key changes no softmax: there the true gradient is zero."""
    assert set(ours) == set(theirs)
    for grads in (ours, theirs):
        for key, gradient in grads.items():
            for end, (part, of) in KEYS.items():
                if key.endswith(end):
                    bias = np.split(gradient, of)[part]
                    assert np.abs(bias).max() < 1e-5, key
                    bias[:] = 0
    worst = {key: relative(ours[key], theirs[key]) for key in theirs if theirs[key].any()}
    assert max(worst.values()) <= GRADIENT_TENSOR, max(worst.items(), key=lambda kv: kv[1])
    together = [np.concatenate([grads[key].ravel() for key in theirs]) for grads in (ours, theirs)]
    assert relative(*together) <= GRADIENT


def test_image_tower_of_a_model_of_two() -> None:
    reference = load("huggingface_clip")
    state = {f"vision_model.{k}": v for k, v in reference.state.items()}
    state |= {"text_model.final_layer_norm.bias": np.zeros(4), "logit_scale": np.zeros(()),
              "visual_projection.weight": np.zeros((8, 16)), "text_projection.weight": np.zeros((8, 4)),
              "vision_model.embeddings.position_ids": np.zeros((1, 17))}  # fmt: skip
    whole = vit_from_huggingface(state, reference.config, {"model_type": "clip", "vision_config": reference.asked})
    for path, leaf in flatten(reference.imported()).items():
        np.testing.assert_array_equal(leaf, flatten(whole)[path])


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("timm_deit3", {"pos_embed": "class"}, r"pos_embed is 'patches', but ViTConfig.pos_embed makes it 'class'"),
        ("timm_deit3", {"layer_scale": 0.0}, r"unknown blocks\.0\.ls1\.gamma"),
        ("timm_dinov2_registers", {"registers": 0}, r"unknown reg_token"),
        ("timm_dinov2", {"activation": "gelu"}, r"act_layer is 'swiglu', but ViTConfig.activation makes it 'gelu'"),
        ("timm_clip", {"patch_bias": True}, r"ViTConfig\.patch_bias = True, there not set"),
        ("timm_dinov3", {"rope_theta": 10.0}, r"rope_temperature is 100\.0, but ViTConfig.rope_theta makes it 10\.0"),
        ("timm_dinov3_qkvb", {"qkv_bias": "none"}, r"unknown blocks\.0\.attn\.q_bias"),
        ("timm_qk_norm", {"qk_norm": False}, r"unknown blocks\.0\.attn\.k_norm"),
        ("timm_augreg", {"image_size": 24, "pos_resize": "bicubic"}, r"resizing is 'bicubic_antialias', but"),
        ("openclip_quickgelu", {"activation": "gelu"}, r"quick_gelu is 'quick_gelu', but ViTConfig.activation makes"),
        ("openclip_quickgelu", {"heads": 4}, r"head_width is 8, but ViTConfig.width / ViTConfig.heads makes it 4"),
        ("timm_siglip", {"pool": "gap"}, r"global_pool is 'map', but ViTConfig.pool makes it 'gap'"),
        ("huggingface_dinov2", {"pool": "cls"}, r"pooling is 'cls_gap', but ViTConfig.pool makes it 'cls'"),
        ("huggingface_dinov2", {"layer_scale": 0.0}, r"ViTConfig\.layer_scale = 0\.0, there set"),
        ("huggingface_dinov3", {"rope_theta": 50.0}, r"rope_theta is 100\.0, but ViTConfig.rope_theta makes it 50\.0"),
        ("huggingface_dinov3", {"activation": "swiglu"}, r"hidden_act is 'gelu', but"),
        ("huggingface_dinov3", {"registers": 0}, r"unknown embeddings\.register_tokens"),
        (
            "huggingface_siglip2",
            {"pos_image_size": 32, "pos_resize": "bicubic"},
            r"resizing is 'bilinear_antialias', but ViTConfig.pos_resize makes it 'bicubic'",
        ),
    ],
)
def test_what_a_configuration_would_compute_otherwise_is_refused(name: str, changed: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        load(name).imported(**changed)
    assert "\n" not in str(error.value)


def test_a_network_of_another_kind_is_refused() -> None:
    reference = load("huggingface_siglip")
    with pytest.raises(UserError, match=r"ViTConfig\.pool = 'map', there cls; .*ViTConfig\.qkv"):
        vit_to_huggingface(reference.imported(), ViTConfig(**{**vars(reference.config), "qkv_bias": "no_key"}), "vit")
    with pytest.raises(UserError, match=r"model_type = 'beit' is none of the ViTs known here: vit, dinov2, "):
        vit_from_huggingface({}, reference.config, {**reference.asked, "model_type": "beit"})


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("huggingface")])
def test_loaded_from_its_folder_alone(name: str, tmp_path: Path) -> None:
    """`visionfm_jax.load` finds the network by the peer's own names and `config.json`."""
    reference = load(name)
    images = reference.data["images0"].astype(np.float32)
    height, width = images.shape[1:3]
    said = {
        "size": {"height": height, "width": width}, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "do_normalize": True,
    }  # fmt: skip
    save_file(reference.state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(reference.asked))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    model = visionfm_jax.load(tmp_path, devices=jax.devices()[:1])
    network, params = model.backbone
    outputs = network.apply({"params": {k: v for k, v in params.items() if k != "head"}}, images).pooled
    if "head" in params:
        outputs = outputs @ params["head"]["kernel"] + params["head"]["bias"]
    check_forward(outputs, reference.data["outputs0"], "images0")
