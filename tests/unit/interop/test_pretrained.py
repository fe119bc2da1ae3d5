"""Whose names a file has, what beside them is asked for, and what of the file is not taken."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from visionfm_jax.errors import UserError
from visionfm_jax.interop.huggingface import vit_to_huggingface
from visionfm_jax.interop.huggingface_clip import clip_to_huggingface
from visionfm_jax.interop.leaves import flatten, grouped, is_named
from visionfm_jax.interop.open_clip import text_to_open_clip, visual_to_open_clip
from visionfm_jax.interop.pretrained import Imported, import_weights, timm_architectures
from visionfm_jax.interop.swin_v2 import swin_v2_to_timm
from visionfm_jax.interop.timm import vit_to_timm
from visionfm_jax.models.backbones.swin_v2 import SwinV2, SwinV2Config
from visionfm_jax.models.backbones.vit import ViT, ViTConfig
from visionfm_jax.models.clip import Clip, ClipConfig
from visionfm_jax.models.heads import Classifier
from visionfm_jax.models.text import TextConfig

VIT = ViTConfig(size="Ti", width=24, depth=2, heads=3, mlp=32, patch_size=4, image_size=16, pool="cls")
TINY = {"architecture": "vit_tiny_patch16_224", "global_pool": "token"}


def tree(config: Any, classes: int = 0) -> dict:
    """Parameters of zeros."""
    model = (SwinV2 if isinstance(config, SwinV2Config) else ViT)(config)
    model = Classifier(model, classes) if classes else model
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), shapes)


def taken(state: dict, about: Any = TINY, towers: Any = None, into: str = "", skip: tuple = ()) -> Imported:
    return import_weights(state, about, towers or {"": VIT}, into, skip)


def refused(says: str, *args: Any, **more: Any) -> None:
    with pytest.raises(UserError, match=says) as error:
        taken(*args, **more)
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A ViT of five classes in timm's names."""
    return vit_to_timm(tree(VIT, 5), VIT)


def test_timm_by_its_architecture(state):
    found = taken(state)
    assert found.what == "timm vit_tiny_patch16_224"
    assert set(found.arrays) == set(flatten(tree(VIT, 5)))
    assert set(taken(state, "vit_tiny_patch16_224").arrays) == set(found.arrays)
    assert taken(state, "model").what == "timm names"
    into = taken(state, towers={"image": VIT, "text": TextConfig()}, into="image")
    assert set(into.arrays) == {f"image/{path}" for path in found.arrays}


def test_a_class_derived_from_a_network_gets_its_weights(state):
    class Mine(ViTConfig):
        pass

    assert set(taken(state, towers={"": Mine(**vars(VIT))}).arrays) == set(flatten(tree(VIT, 5)))


def test_what_config_json_changes_of_an_architecture(state):
    refused(r"global_pool is 'map', but", state, TINY | {"global_pool": "map"})
    refused(r"act_layer is 'quick_gelu'", state, TINY | {"model_args": {"act_layer": "quick_gelu"}})
    refused(r"the model_args norm_layer of config\.json are not understood", state,
            TINY | {"model_args": {"norm_layer": "rms", "img_size": 32}})  # fmt: skip
    refused(r"architecture 'vit_tiny_patch99' is none of the 1\d\d known", state, {"architecture": "vit_tiny_patch99"})
    refused(r"architecture = \['x'\] is not a valid value", state, {"architecture": ["x"]})
    refused("num_heads = True is not a valid value", state, TINY | {"model_args": {"num_heads": True}})
    refused(r"num_heads is 12, but ViTConfig\.heads makes it 3", state, "vit_base_patch16_224")
    refused(r"timm's swinv2_tiny_window8_256 is no ViT", state, "swinv2_tiny_window8_256")


def test_the_table_of_architectures():
    known = timm_architectures()
    assert known["vit_large_patch14_clip_quickgelu_224"] == {
        "num_heads": 16, "global_pool": "token", "norm_eps": 1e-5, "act_layer": "quick_gelu"
    }  # fmt: skip
    assert known["vit_base_patch16_siglip_224"]["act_layer"] == "gelu"
    assert known["vit_giant_patch14_reg4_dinov2"] == {
        "num_heads": 24, "global_pool": "token", "norm_eps": 1e-6, "act_layer": "swiglu", "no_embed_class": True
    }  # fmt: skip
    assert known["vit_small_patch16_dinov3"]["rope_temperature"] == 100.0
    assert known["swinv2_base_window12to16_192to256"]["pretrained_window_sizes"] == [12, 12, 12, 6]
    assert "vit_base_patch16_rpn_224" not in known  # norms after the branches, under the same names


def test_the_sides_of_the_images_that_a_file_is_for(state):
    assert taken(state).grids == taken(state, "model").grids == {}
    for more in ({"model_args": {"img_size": [16, 32]}}, {"pretrained_cfg": {"input_size": [3, 16, 32]}}):
        assert taken(state, TINY | more).grids == {"pos_embed": (4, 8)}
        assert taken(state, TINY | more, {"image": VIT}, "image").grids == {"image/pos_embed": (4, 8)}
    for wrong in (None, {"input_size": 3}, {"input_size": [3, "a", 4]}, {"input_size": [3, -16, -32]}):
        assert taken(state, TINY | {"pretrained_cfg": wrong}).grids == {}


def test_names_that_are_skipped_in_either_naming(state):
    for skip in (("head",), ("head.weight", "head.bias"), ("head/kernel", "head/bias")):
        found = taken(state, skip=skip)
        assert set(found.arrays) == set(flatten(tree(VIT)))
    assert taken(state, skip=("head",)).left == {"listed in checkpoint.skip": ["head.weight", "head.bias"]}
    assert not any("norm/" in path for path in taken(state, skip=("norm",)).arrays)
    assert set(taken(state | {"extra.a": np.zeros(3)}, skip=("extra",)).arrays) == set(taken(state).arrays)
    refused(r"unknown extra\.a", state | {"extra.a": np.zeros(3)})
    refused(r"missing norm\.weight", {k: v for k, v in state.items() if k != "norm.weight"})


def test_numbers_of_layers_that_cannot_be_and_quantised_weights_are_refused(state):
    for name in ("blocks.3000000000.x", "blocks.123456789.x", f"blocks.{'1' * 5000}.x"):
        refused(r"of 2 layers: unknown blocks\.", state | {name: np.zeros(3, np.float32)})
    about = {"model_type": "vit", "num_attention_heads": 10**400}
    refused(r"num_attention_heads = 1000.* is not a valid value", vit_to_huggingface(tree(VIT), VIT), about)
    refused(r"norm\.weight is not floating", state | {"norm.weight": np.zeros(24, np.int8)})


def test_names_with_and_without_their_prefix_are_refused():
    about = {"model_type": "vit", "hidden_act": "gelu", "layer_norm_eps": 1e-6, "num_attention_heads": 3}
    weights = vit_to_huggingface(tree(VIT), VIT)
    both = {name.removeprefix("vit."): value for name, value in weights.items()} | weights
    assert len(both) > len(weights)
    refused(r"with and without 'vit\.'; set", both, about)


def test_another_pooling_on_purpose(state):
    mean = ViTConfig(**{**vars(VIT), "pool": "gap", "class_token": True})
    says = r"global_pool is 'token', which is ViTConfig.pool = 'cls', but ViTConfig.pool makes it 'gap'"
    refused(says, state, towers={"": mean})
    assert set(taken(state, towers={"": mean}, skip=("pool",)).arrays) == set(flatten(tree(mean, 5)))
    probe = ViTConfig(**{**vars(VIT), "pool": "map"})
    with_probe = vit_to_timm(tree(probe), probe)
    about = TINY | {"global_pool": "map"}
    mean = ViTConfig(**{**vars(VIT), "pool": "gap"})
    left = flatten(tree(probe)).keys() - taken(with_probe, about, {"": mean}, skip=("pool",)).arrays.keys()
    assert {path.partition("/")[0] for path in left} == {"pool"}


@pytest.mark.parametrize(
    ("name", "by", "named"),
    [
        ("blocks.0.mlp", "blocks", True), ("blocks/mlp", "blocks.mlp", True), ("blocks2.a", "blocks", False),
        ("head", "head.", True), ("a.head", "head", False), ("blocks.10.ls1.gamma", "blocks.*.ls1", True),
        ("blocks.1.ls1", "blocks.*.ls1.gamma", False), ("blocks.1.ls2", "blocks.*.ls1", False), ("a", "", False),
    ],
)  # fmt: skip
def test_whole_words_are_named(name, by, named):
    assert is_named(name, [by]) == named


def test_many_names_are_grouped_by_the_prefixes_that_skip_takes():
    blocks = [f"blocks.{i}.{name}.{leaf}" for i in range(12) for name in ("ln1", "mlp") for leaf in ("a", "b")]
    assert grouped(blocks[::2]) == "blocks.*.ln1.a (12), blocks.*.mlp.a (12)"
    more = [*blocks, "cls", "norm.a", "norm.b", *(f"head.{i}" for i in "abcd")]
    assert grouped(more) == "blocks (48), cls, head.a, head.b, head.c, head.d, norm.a, norm.b"
    for names in (blocks, more):
        prefixes = [prefix.partition(" ")[0] for prefix in grouped(names).split(", ")]
        assert all(is_named(name, prefixes) for name in names)
        assert all(any(is_named(name, [prefix]) for name in names) for prefix in prefixes)
    assert grouped(["b.1", "a"]) == "a, b.1"
    assert grouped(f"x{i}" for i in range(99)).endswith(" and 75 more")


def test_a_backbone_of_a_larger_huggingface_model():
    about = {"vision_config": {"model_type": "siglip_vision_model", "num_attention_heads": 3, "layer_norm_eps": 1e-6,
                               "hidden_act": "gelu_pytorch_tanh"}, "model_type": "siglip"}  # fmt: skip
    config = ViTConfig(**{**vars(VIT), "pool": "map", "activation": "gelu_tanh"})
    state = vit_to_huggingface(tree(config), config, "siglip_vision_model")
    found = taken(state | {"text_model.x": np.zeros(2), "logit_scale": np.zeros(1)}, about, {"": config})
    assert found.what == "Hugging Face siglip"
    assert found.left == {"no part of the features": ["text_model.x", "logit_scale"]}
    refused("vision_config = 3 is not a valid value", state, about | {"vision_config": 3}, {"": config})
    refused("model_type = 'bert' is none", state, {"model_type": "bert"}, {"": config})
    refused("lacks 'hidden_act'", state, {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-6})


def test_swin_v2_with_other_windows(state):
    there = SwinV2Config(size="P", image_size=64, window=8)
    head = {"head.fc.weight": np.zeros((5, 256)), "head.fc.bias": np.zeros(5)}
    swin = swin_v2_to_timm(tree(there)) | head | {"layers.0.blocks.0.attn.k_bias": np.zeros(32)}
    about = {"architecture": "swinv2_tiny_window8_256", "model_args": {"img_size": 64}}
    here = SwinV2Config(size="P", image_size=128, window=16, pretrained_window=8, pretrained_image_size=64)
    for config in (there, here):
        found = taken(swin, about, {"image": config, "text": TextConfig()}, "image")
        assert set(found.arrays) == {f"image/{path}" for path in flatten(tree(config, 5))}
        assert found.left == {"no part of the network": ["layers.0.blocks.0.attn.k_bias"]}
    plain = SwinV2Config(size="P", image_size=128, window=16)
    says = r"pretrained_window_sizes is \[8, 8, 4, 2\], but .*window, or for other windows than its 8 at 64 px .*"
    refused(says + r"makes it \[16, 16, 8, 4\]", swin, about, {"": plain})


def test_towers_of_open_clip():
    config = ViTConfig(**{**vars(VIT), "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5})
    params = tree(config) | {"projection": np.zeros((24, 8), np.float32)}
    theirs = {"vision_cfg": {"width": 24, "head_width": 8}, "text_cfg": {}}
    state = visual_to_open_clip(params, config) | {"logit_scale": np.zeros(()), "ln_final.bias": np.zeros(3)}
    found = taken(state, {"model_cfg": theirs}, {"image": config, "text": TextConfig()}, "image")
    assert set(found.arrays) == {f"image/{path}" for path in flatten(tree(config))}
    assert found.left == {"of the joint space": ["visual.proj"], "of the other tower": ["logit_scale", "ln_final.bias"]}
    timm = {**theirs, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}}
    trunk = {f"visual.trunk.{k}": v for k, v in vit_to_timm(tree(VIT), VIT).items()}
    assert set(taken(trunk | {"visual.head.proj.weight": np.zeros(3)}, {"model_cfg": timm}).arrays) == set(
        flatten(tree(VIT))
    )
    refused("has block_type in its vision_cfg", state, {"model_cfg": {**theirs, "vision_cfg": {"block_type": "x"}}},
            {"": config})  # fmt: skip
    refused("no vision_cfg and text_cfg", state, {"model_cfg": {}}, {"": config})


def test_struck_files_are_read_or_refused(capsys):
    """The small form of `tools/attack/weights_files.py`."""
    program = runpy.run_path(str(Path(__file__).parents[3] / "tools" / "attack" / "weights_files.py"))
    assert program["main"](["--count=200", "--seed=1"]) == 0, capsys.readouterr().out


def test_what_is_ambiguous_is_asked_for(state):
    refused("set config.checkpoint.weights_config", state, {"name": "x"})
    refused("cannot be told from names such as a", {"a": np.zeros(3)}, "model")
    towers = {"": ClipConfig(image=VIT), "image": VIT, "text": TextConfig()}
    refused(r"weights_into = '': timm weights are read for networks of ViTConfig, SwinV2Config, and this is a "
            r"ClipConfig; set it to 'image'", state, towers=towers)  # fmt: skip
    refused("and this is a TextConfig; set it to 'image'", state, towers=towers, into="text")
    refused("and this is no part; set it to 'image'", state, towers=towers, into="images")


def test_both_towers_of_huggingface_and_of_open_clip():
    shape = {"width": 24, "depth": 2, "heads": 3, "mlp": 32}
    vit = ViTConfig(**{**vars(VIT), "pre_norm": True, "patch_bias": False, "norm_eps": 1e-5})
    text = TextConfig(**shape, vocab_size=40, context=8, end_token=39)
    model = ClipConfig(image=vit, text=text, embed_dim=16)
    towers = {"": model, "image": vit, "text": text}
    own = jax.eval_shape(Clip(model).init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 8), int))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), own["params"])
    tower = {"num_attention_heads": 3, "layer_norm_eps": 1e-5, "hidden_act": "gelu"}
    about = {"model_type": "clip", "vision_config": tower | {"model_type": "clip_vision_model"},
             "text_config": tower | {"eos_token_id": 39, "vocab_size": 40}}  # fmt: skip
    state = clip_to_huggingface(params, model, "clip")
    assert set(taken(state, about, towers).arrays) == set(flatten(params))
    assert not any(path.startswith("text/norm") for path in taken(state, about, towers, skip=("text.norm",)).arrays)
    refused("has no text_config and vision_config", state, {"model_type": "clip"}, towers)
    cfg = {"embed_dim": 16, "vision_cfg": {"width": 24, "head_width": 8}, "text_cfg": {"heads": 3, "width": 24}}
    projection = {"projection": params["image_projection"]}
    state = visual_to_open_clip(params["image"] | projection, vit) | text_to_open_clip(params)
    found = taken(state, {"model_cfg": cfg}, towers)
    assert set(found.arrays) == set(flatten(params))
    assert not found.left
    alone = taken(state, {"model_cfg": cfg}, towers, into="text")
    assert set(alone.arrays) == {path for path in flatten(params) if path.startswith("text/")}
