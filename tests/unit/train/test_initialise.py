"""Weights from elsewhere: what is taken, resampled, replaced or refused, and what the model then computes."""

from __future__ import annotations

import json
import shutil
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from einops import rearrange
from safetensors.numpy import load_file, save_file

from visionfm_jax.config import AugmentConfig, CheckpointConfig, Config, OptimConfig, load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.timm import vit_to_timm
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViT
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.heads import Classifier
from visionfm_jax.models.positions import resize_table
from visionfm_jax.models.text import TextConfig
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.train.checkpoint import Checkpoints
from visionfm_jax.train.initialise import find_weights, match, placed, starting_state, table_grids, weights_to_evaluate
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parents[3]
TINY = ("model.width=48", "model.depth=2", "model.heads=3", "model.mlp=64", "optim.ema=0.9", "model.remat=none")


def config_of(*settings: str) -> Config:
    """The quick start's, of a tiny network on images of 28 pixels."""
    config, _ = load.from_arguments(
        [f"--config={ROOT}/configs/quickstart.py", *(f"--config.{s}" for s in (*TINY, *settings))]
    )
    config.validate()
    return config


def trainer_of(*settings: str) -> Trainer:
    return Trainer(config_of(*settings), make_mesh())


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A folder as timm's hub has it, and our tree of its weights: random in every tensor, ten classes."""
    config, rng = config_of(), np.random.default_rng(0)
    shapes = jax.eval_shape(Classifier(ViT(config.model), 10).init, jax.random.key(0), np.zeros((1, 28, 28, 3)))[
        "params"
    ]
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)
    folder = tmp_path_factory.mktemp("weights")
    save_file(vit_to_timm(params, config.model), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_tiny_patch16_224", "global_pool": "token"}))
    return folder, params


@pytest.fixture(scope="module")
def other() -> Trainer:
    """Of other classes, image and patch sizes; its weights are set by each test."""
    return trainer_of("task.num_classes=7", "model.image_size=56", "model.patch_size=8")


def test_a_run_says_which_patches_its_position_tables_are_for():
    image = {"kind": "ViTConfig", "image_size": [28, 56], "pos_image_size": 0, "patch_size": 7}
    assert table_grids({"kind": "ClipConfig", "image": image, "text": {"size": "B"}}) == {"image/pos_embed": (4, 8)}
    assert table_grids({**image, "pos_image_size": 42}) == {"pos_embed": (6, 6)}
    for damaged in (None, {"image_size": 28}, {**image, "image_size": "28"}, {**image, "patch_size": 0}):
        assert table_grids(damaged) == {}


def on(trainer: Trainer, **settings: Any) -> Trainer:
    """`trainer` with other settings of `config.checkpoint`."""
    trainer.config.checkpoint = CheckpointConfig(**settings)
    return trainer


def no_run(folder: Path) -> Any:
    return types.SimpleNamespace(latest=lambda: None, folder=folder)


def test_a_file_is_placed_as_zero_stores_it(source):
    folder, params = source
    trainer = trainer_of(f"checkpoint.weights={folder}")
    start = starting_state(trainer, no_run(folder))
    for path, leaf in flatten(params).items():
        for tree in (start.state.params, start.state.ema):
            np.testing.assert_array_equal(flatten(tree)[path], leaf)
    jax.tree.map(lambda leaf, to: leaf.sharding == to or pytest.fail("elsewhere"), start.state, trainer.shardings)
    kernel = start.state.params["blocks"]["mlp"]["fc1"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    assert (int(start.state.step), start.record) == (0, {})
    lines = start.origin.splitlines()
    assert lines[0] == f"the weights of {folder}/model.safetensors"
    assert lines[1].strip().startswith("timm vit_tiny_patch16_224, 32 tensors, sha256 model.safetensors ")
    assert [line.strip() for line in lines[2:]] == ["20 arrays loaded"]
    assert start.weights["sha256"].keys() == {"model.safetensors"}
    found = weights_to_evaluate(trainer)
    np.testing.assert_array_equal(found.params["norm"]["scale"], params["norm"]["scale"])


def test_features_are_the_sources_at_another_resolution_with_other_classes(source, other):
    """Interpolated once, as the network interpolates its table at each pass, which is timm's (`tests/parity`)."""
    folder, params = source
    trainer = on(trainer_of("task.num_classes=7", "model.image_size=56"), weights=str(folder))
    fresh = trainer.init()
    found = find_weights(trainer)
    params_here = jax.device_get(placed(trainer, found, fresh.params))
    images = np.random.default_rng(1).normal(size=(2, 56, 56, 3)).astype(np.float32)
    config = config_of().model
    config.pos_image_size, config.image_size = 28, 56
    theirs = ViT(config).apply({"params": {k: v for k, v in params.items() if k != "head"}}, images).pooled
    network = {k: v for k, v in params_here.items() if k != "head"}
    ours = ViT(trainer.config.model).apply({"params": network}, images).pooled
    assert np.linalg.norm(ours - theirs) <= 3e-6 * np.linalg.norm(theirs)
    np.testing.assert_array_equal(params_here["head"]["kernel"], fresh.params["head"]["kernel"])
    said = [line.strip() for line in found.origin.splitlines()]
    assert said[2:] == [
        "18 arrays loaded",
        "resampled: pos_embed, 4 x 4 to 8 x 8 positions (bicubic_antialias)",
        "newly initialised: head.bias, head.kernel (10 classes there, 7 here)",
    ]
    kept = found.about
    assert (kept["loaded"], list(kept["resampled"])) == (18, ["pos_embed"])
    assert kept["newly_initialised"] == {"10 classes there, 7 here": ["head/bias", "head/kernel"]}


def test_another_patch_size_too(source, other):
    folder = source[0]
    assert find_weights(on(other, weights=str(folder))).about["resampled"] == {
        "embed/kernel": "patches of 7 to 8 pixels (pseudo-inverse)",
        "pos_embed": "4 x 4 to 7 x 7 positions (bicubic_antialias)",
    }
    with pytest.raises(ConfigError, match=r"leave head\.bias, head\.kernel untrained"):
        weights_to_evaluate(on(other, weights=str(folder)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"weights_config": "vit_base_patch16_224"}, r"num_heads is 12, but config\.model\.heads makes it 3"),
        ({"weights_config": "/no/config.json"}, r"weights_config = '/no/config\.json': is neither a file nor"),
        (
            {"weights_from": "backbone"},
            r"weights_from = 'backbone': no name in .* has this prefix; there are blocks, cls_token",
        ),
        ({"weights_into": "image"}, r"weights_into = 'image': timm weights are .* and this is no part; set it to ''"),
        ({"skip": ("pos_embed", "norm")}, None),
    ],
)
def test_fields(source, other, settings, says):
    trainer = on(other, weights=str(source[0] / "model.safetensors"), **settings)
    if says is None:
        origin = find_weights(trainer).origin
        assert "newly initialised: norm.bias, norm.scale, pos_embed (listed in checkpoint.skip)" in origin
        assert "not loaded: norm.bias, norm.weight, pos_embed (listed in checkpoint.skip)" in origin
        return
    with pytest.raises(ConfigError, match=says) as error:
        find_weights(trainer)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("config.json", {"architecture": "vit_tiny_patch16_224", "global_pool": "token",
                         "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}),
        ("preprocessor_config.json", {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}),
    ],
)  # fmt: skip
def test_pixels_normalised_otherwise_are_refused(source, other, tmp_path, name, said):
    folder = Path(shutil.copytree(source[0], tmp_path / "weights"))
    (folder / name).write_text(json.dumps(said))
    with pytest.raises(
        ConfigError, match=r"augment\.mean = .* was trained with \(0\.5, .* set .*std=\(0\.5, 0\.5, 0\.5\)"
    ):
        find_weights(on(other, weights=str(folder)))
    before = other.config.data.augment
    other.config.data.augment = AugmentConfig(mean=(0.5,) * 3, std=(0.5,) * 3)
    try:
        assert find_weights(on(other, weights=str(folder))).fit.taken
    finally:
        other.config.data.augment = before


def test_all_that_is_wrong_is_said_at_once(source, tmp_path):
    """Settings, pixels, and what would still not fit if the settings were those of the weights."""
    tensors = load_file(source[0] / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "global_pool": "token",
             "pretrained_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(about))
    settings = ("model.pool=gap", "model.norm_eps=1e-5", "model.mlp=32", f"checkpoint.weights={tmp_path}")
    with pytest.raises(ConfigError) as error:
        find_weights(trainer_of(*settings))
    facts, pixels, rest = str(error.value).splitlines()
    assert "global_pool is 'token', which is config.model.pool = 'cls', but config.model.pool makes it 'gap'" in facts
    assert "norm_eps is 1e-06, but config.model.norm_eps makes it 1e-05" in facts
    assert "set config.data.augment.mean=(0.5, 0.5, 0.5)" in pixels
    assert "other shapes: blocks.mlp.fc1.bias (2, 64) there, (2, 32) here, " in rest
    assert "only" not in rest  # the class token, which `pool` brings with it
    save_file(tensors | {f"blocks.{i}.ls{k}.gamma": np.ones(48, np.float32) for i in (0, 1) for k in range(1, 6)},
              tmp_path / "model.safetensors")  # fmt: skip
    with pytest.raises(ConfigError) as error:
        find_weights(trainer_of(*settings))
    assert len(str(error.value).splitlines()) == 3
    assert "unknown blocks.*.ls1.gamma (2), blocks.*.ls2.gamma (2), " in str(error.value)
    skip = 'checkpoint.skip=("blocks.*.ls1","blocks.*.ls2","blocks.*.ls3","blocks.*.ls4","blocks.*.ls5","head")'
    fits = ("model.mlp=64", "data.augment.mean=(.5,.5,.5)", "data.augment.std=(.5,.5,.5)", skip)
    assert len(find_weights(trainer_of(f"checkpoint.weights={tmp_path}", *fits)).fit.left["listed in checkpoint.skip"])


def test_names_of_tensors_do_not_reach_the_terminal_as_they_are(source, other, tmp_path):
    tensors = load_file(source[0] / "model.safetensors") | {"extra.\x1b[2J\nfalse": np.zeros(3, np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(source[0] / "config.json", tmp_path)
    origin = find_weights(on(other, weights=str(tmp_path), skip=("extra",))).origin
    assert r"not loaded: extra.\x1b[2J\nfalse (listed" in origin


def test_a_file_alone_asks_for_what_names_do_not_tell(source, other, tmp_path):
    file = tmp_path / "weights.safetensors"
    file.write_bytes((source[0] / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=r"has no config\.json next to it, and names do not determine heads"):
        find_weights(on(other, weights=str(file)))
    for given in ("model", "vit_tiny_patch16_224", str(source[0] / "config.json")):
        assert find_weights(on(other, weights=str(file), weights_config=given)).fit.taken
    with pytest.raises(ConfigError, match="there is no such folder or file"):
        find_weights(on(other, weights=str(tmp_path / "mistyped")))


def test_names_too_long_for_the_file_system(source, other, tmp_path):
    name, says = str(tmp_path / ("x" * 256)), r"^config\.checkpoint\.{} cannot be read: .*too long"
    with pytest.raises(DataError, match=says.format("weights")):
        find_weights(on(other, weights=name))
    with pytest.raises(DataError, match=says.format("weights_config")):
        find_weights(on(other, weights=str(source[0]), weights_config=name))
    with pytest.raises(DataError, match=says.format("resume")):
        starting_state(on(other, resume=name), no_run(tmp_path))


def test_a_head_is_taken_whole_or_not_at_all(other):
    """Of as many classes, and of other features: another pooling, say."""
    there = {path: leaf.shape for path, leaf in flatten(other.shapes.params).items()}
    fit = match({**there, "head/kernel": (96, 7)}, there, other.config, {}, "w")
    assert fit.afresh == {"the head there is of other features": ["head/bias", "head/kernel"]}
    assert "head/bias" in match(there, there, other.config, {}, "w").taken


def test_a_head_of_other_queries_has_no_other_classes(other):
    there = {"norm/scale": (96,), "head/queries": (9, 96)}
    with pytest.raises(ConfigError, match=r"other shapes: head.queries \(9, 96\) there, \(4, 96\) here; .*skip"):
        match(there, {**there, "head/queries": (4, 96)}, other.config, {}, "w")


def test_a_run_of_another_resolution_and_other_classes(source, other, tmp_path):
    """Weights of a run fit as those of a file; a part of them, below a name of theirs, into a part of ours."""
    params = source[1]
    state = TrainState(step=np.int32(3), params={"net": params, "extra": np.ones(3)}, opt_state=(), ema=None)
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(3, jax.device_put(state), {})
    with pytest.raises(ConfigError, match=r"do not fit the model: only here: .*; only there: .*extra"):
        find_weights(on(other, weights=str(tmp_path)))
    found = find_weights(on(other, weights=str(tmp_path), weights_from="net"))
    assert found.step == 3
    assert set(found.about["resampled"]) == {"embed/kernel", "pos_embed"}
    assert found.fit.left == {"not of checkpoint.weights_from": ["extra"]}
    assert found.fit.afresh == {"10 classes there, 7 here": ["head/bias", "head/kernel"]}
    here = placed(other, found, other.init().params)
    np.testing.assert_array_equal(here["norm"]["scale"], params["norm"]["scale"])
    jax.tree.map(lambda leaf, to: leaf.sharding == to or pytest.fail("elsewhere"), here, other.shardings.params)


def enlarged(images: np.ndarray, old: int, new: int) -> np.ndarray:
    """Images (B, H, W, 3) with each patch resized by itself, as `resize_patches` takes them to be."""
    patches = rearrange(images, "b (h p) (w q) c -> (b h w) p q c", p=old, q=old)
    patches = jax.vmap(lambda patch: resize_table(patch, (new, new), "bicubic_antialias"))(patches)
    h, w = images.shape[1] // old, images.shape[2] // old
    return np.asarray(rearrange(patches, "(b h w) p q c -> b (h p) (w q) c", h=h, w=w))


@pytest.mark.parametrize("kind", ["run", "file"])
def test_a_network_of_patch_14_becomes_one_of_patch_16_that_sees_the_same(tmp_path, kind):
    """Images of 4 x 6 patches, which no table of 24 rows tells; features are equal on enlarged patches."""
    config, rng = config_of("model.patch_size=14", "model.image_size=(56,84)"), np.random.default_rng(0)
    trainer = Trainer(config, make_mesh())
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), trainer.shapes.params)
    if kind == "run":
        state = TrainState(step=np.int32(3), params=params, opt_state=(), ema=params)
        with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
            checkpoints.save(3, jax.device_put(state), {})
        (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    else:
        save_file(vit_to_timm(params, config.model), tmp_path / "model.safetensors")
        about = {"architecture": "vit_tiny_patch16_224", "global_pool": "token", "model_args": {"img_size": [56, 84]}}
        (tmp_path / "config.json").write_text(json.dumps(about))
    source = f"checkpoint.weights={tmp_path}"
    here = trainer_of("model.patch_size=16", "model.image_size=(64,96)", "task.num_classes=7", source)
    found = find_weights(here)
    said = found.origin
    assert found.about["resampled"] == {"embed/kernel": "patches of 14 to 16 pixels (pseudo-inverse)"}
    assert "resampled: embed.kernel, patches of 14 to 16 pixels (pseudo-inverse)" in said
    assert "newly initialised: head.bias, head.kernel (10 classes there, 7 here)" in said
    assert ("other there: model.patch_size: 14 -> 16" in said) == (kind == "run")
    placed_here = jax.device_get(placed(here, found, here.init().params))
    images = rng.normal(size=(2, 56, 84, 3)).astype(np.float32)
    theirs, ours = (
        ViT(c.model).apply({"params": {k: v for k, v in p.items() if k != "head"}}, x).pooled
        for c, p, x in ((config, params, images), (here.config, placed_here, enlarged(images, 14, 16)))
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    larger = trainer_of("model.patch_size=16", "model.image_size=(128,96)", source)
    assert find_weights(larger).about["resampled"] == {
        "embed/kernel": "patches of 14 to 16 pixels (pseudo-inverse)",
        "pos_embed": "4 x 6 to 8 x 6 positions (bicubic_antialias)",
    }


def test_pre_training_goes_on_from_a_backbone_whose_objective_left_no_heads(source):
    words = [
        f"--config={ROOT}/configs/vit_huge_dino.py:tiny",
        "--config.model.registers=0",
        "--config.model.layer_scale=0",
    ]
    words += [f"--config.{setting}" for setting in TINY if setting.startswith("model.")]
    words.append(f"--config.checkpoint.weights={source[0]}")
    missing = r"only here: image_head \(7\), mask_token, patch_head \(7\); .* list in config\.checkpoint\.skip"
    with pytest.raises(ConfigError, match=missing):
        find_weights(Trainer(load.from_arguments(words)[0], make_mesh()))
    words.append("--config.checkpoint.skip=image_head,patch_head,mask_token")
    fit = find_weights(Trainer(load.from_arguments(words)[0], make_mesh())).fit
    assert set(fit.resampled) == {"embed/kernel"}  # patches of 7 pixels there, of 8 here
    assert {*fit.taken, *fit.resampled} == {path for path in flatten(source[1]) if not path.startswith("head/")}
    assert fit.left == {"the model has no head": ["head.kernel", "head.bias"]}


def shapes(**more: Any) -> dict[str, tuple[int, ...]]:
    return {"image/embed/kernel": (48, 8), "image/norm/scale": (8,), "text/pos_embed": (12, 6), "scale": (), **more}


@pytest.mark.parametrize(
    ("changed", "settings", "says"),
    [
        ({"image/norm/scale": None}, {}, r"only here: image\.norm\.scale; set the fields"),
        ({"image/more": (3,)}, {}, r"only there: image\.more; set"),
        ({"image/norm/scale": (9,)}, {}, r"other shapes: image\.norm\.scale \(9,\) there, \(8,\) here"),
        ({"image/embed/kernel": (50, 8)}, {}, r"other shapes: image\.embed\.kernel"),
        ({"text/pos_embed": (5, 6)}, {}, r"other shapes: text\.pos_embed \(5, 6\) there"),
        ({"text/pos_embed": (77, 6)}, {}, None),
        ({"image/embed/kernel": (108, 8)}, {}, None),
        ({"image/norm/scale": None}, {"skip": ("image.norm",)}, None),
        ({"image/more": (3,)}, {"skip": ("image/more",)}, None),
        ({"image/head/kernel": (8, 5)}, {}, None),
        ({"text/pos_embed": None, "scale": None}, {"weights_into": "image"}, None),
        ({"text/pos_embed": None, "scale": None, "image/norm/scale": None},
         {"weights_into": "image", "skip": ("norm",)}, None),
        (dict.fromkeys(shapes()), {"skip": tuple(shapes())}, "nothing is loaded"),
    ],
)  # fmt: skip
def test_all_that_does_not_fit_is_refused_unless_listed(changed, settings, says):
    image = SwinV2Config(size="P", patch_size=4)
    config = Config(
        name="a", model=ClipConfig(image=image, text=TextConfig()), task=ContrastiveConfig(), optim=OptimConfig(),
        checkpoint=CheckpointConfig(weights="w", **settings),
    )  # fmt: skip
    there = {path: shape for path, shape in shapes(**changed).items() if shape is not None}
    if says is None:
        fit = match(there, shapes(), config, {}, "w")
        afresh = [path for paths in fit.afresh.values() for path in paths]
        assert {*fit.taken, *fit.resampled, *afresh} == set(shapes())
        return
    with pytest.raises(ConfigError, match=says) as error:
        match(there, shapes(), config, {}, "w")
    assert "\n" not in str(error.value)
