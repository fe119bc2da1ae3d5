"""Fine-tuning: one command, from a folder in timm's names to other classes and images of another size."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from runs import run, state
from safetensors.numpy import save_file

from visionfm_jax.interop.resample import resize_patches, resize_positions
from visionfm_jax.interop.timm import vit_to_timm
from visionfm_jax.models.backbones.vit import ViT, ViTConfig
from visionfm_jax.models.heads import Classifier

WIDTH, HEADS = 48, 3  # of timm's vit_tiny are the heads


def timm_folder(folder: Path) -> dict:
    """As `hf download` leaves it, of a small network with a thousand classes; returns our tree of its weights."""
    config = ViTConfig(width=WIDTH, depth=2, heads=HEADS, mlp=96, patch_size=8, image_size=32, pool="cls")
    shapes = jax.eval_shape(Classifier(ViT(config), 1000).init, jax.random.key(0), np.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    folder.mkdir()
    save_file(vit_to_timm(params, config), folder / "model.safetensors")
    about = {"architecture": "vit_tiny_patch16_224", "num_classes": 1000, "global_pool": "token"}
    (folder / "config.json").write_text(json.dumps(about | {"pretrained_cfg": {"input_size": [3, 32, 32]}}))
    return params


def test_from_a_timm_folder_to_other_classes_and_a_larger_image(tmp_path):
    params = timm_folder(tmp_path / "weights")
    arguments = [
        f"--config.checkpoint.weights={tmp_path}/weights", f"--config.model.width={WIDTH}", "--config.model.depth=2",
        f"--config.model.heads={HEADS}", "--config.model.mlp=96", "--config.model.patch_size=8",
        "--config.model.image_size=48", "--config.model.pool=cls", "--config.optim.layer_decay=0.75",
        "--config.optim.warmup_steps=2", "--config.train.steps=3", "--config.checkpoint.every_steps=1",
    ]  # fmt: skip
    out, _ = run(tmp_path / "run", *arguments)
    for said in (
        f"starts from      the weights of {tmp_path}/weights/model.safetensors",
        "timm vit_tiny_patch16_224, 32 tensors, sha256 model.safetensors ",
        "resampled: pos_embed, 4 x 4 to 6 x 6 positions (bicubic_antialias)",
        "newly initialised: head.bias, head.kernel (1000 classes there, 9 here)",
    ):
        assert said in out
    kept = json.loads((tmp_path / "run/weights.json").read_text())
    assert len(kept["sha256"]["model.safetensors"]) == 64
    first = state(tmp_path / "run", 1)  # the learning rate of a warm-up's first step is 0
    expected = {**params, "pos_embed": resize_positions(params["pos_embed"], (4, 4), (6, 6), "bicubic_antialias")}
    del expected["head"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(expected):
        for part in ("params", "ema"):
            np.testing.assert_allclose(first[f"['{part}']{jax.tree_util.keystr(path)}"], leaf, rtol=1e-6, atol=1e-6)
    last = state(tmp_path / "run", 3)
    assert np.abs(last["['params']['head']['kernel']"]).max() > 0
    assert not np.array_equal(last["['params']['cls_token']"], params["cls_token"])
    # And from that run to patches of another size: on images as many times larger, positions stay.
    arguments += [
        f"--config.checkpoint.weights={tmp_path}/run", "--config.model.patch_size=12", "--config.model.image_size=72",
    ]  # fmt: skip
    out, _ = run(tmp_path / "other", *arguments)
    for said in (
        f"starts from      the weights of {tmp_path}/run\n",
        "other there: model.patch_size: 8 -> 12",
        "20 arrays loaded\n",
        "resampled: embed.kernel, patches of 8 to 12 pixels (pseudo-inverse)",
    ):
        assert said in out
    kernel = resize_patches(last["['ema']['embed']['kernel']"], 12)
    np.testing.assert_allclose(
        state(tmp_path / "other", 1)["['params']['embed']['kernel']"], kernel, rtol=1e-6, atol=1e-6
    )
