"""Golden dumps: every shipped configuration in full. `python tests/golden/dump.py` regenerates them."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax

from visionfm_jax.config import load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.optim.adamw import decay_mask, make_optimizer
from visionfm_jax.parallel.zero import gather_params, shard_dim
from visionfm_jax.tasks.task import make_task
from visionfm_jax.train.state import init_state

FOLDER = Path(__file__).parent
CONFIGS = FOLDER.parents[1] / "configs"
SHIPPED = (
    "aurora_xl",
    "aurora_xl:tiny",
    "aurora_xl_ade20k",
    "aurora_xl_ade20k:tiny",
    "aurora_xl_coco",
    "aurora_xl_coco:tiny",
    "quickstart",
    "swinv2_g_clip",
    "swinv2_g_clip:tiny",
    "swinv2_g_clip_640",
    "swinv2_g_clip_640:tiny",
    "swinv2_g_ade20k",
    "swinv2_g_ade20k:tiny",
    "swinv2_g_coco",
    "swinv2_g_coco:tiny",
    "vit_huge",
    "vit_huge:tiny",
    "vit_huge_ade20k",
    "vit_huge_ade20k:eomt",
    "vit_huge_ade20k:tiny",
    "vit_huge_coco",
    "vit_huge_coco:panoptic",
    "vit_huge_coco:tiny",
    "vit_huge_dino",
    "vit_huge_dino:tiny",
)
SHARDS = 8


def dump(name: str) -> str:
    """The configuration, what follows from it, and a line for each parameter; full size costs nothing."""
    stem, _, variant = name.partition(":")
    config, _ = load.from_arguments([f"--config={CONFIGS / stem}.py" + (f":{variant}" if variant else "")])
    tx = make_optimizer(config.optim, config.total_steps)
    params = jax.eval_shape(lambda: init_state(make_task(config, gather_params), tx, config)).params
    decays = jax.tree.leaves(decay_mask(params))
    lines = {}
    for (path, leaf), decay in zip(jax.tree_util.tree_leaves_with_path(params), decays, strict=True):
        dim = shard_dim(path, leaf, SHARDS)
        where = "whole" if dim is None else f"dim {leaf.ndim + dim} sharded"
        key = "/".join(k.key for k in path)
        lines[key] = f"{leaf.dtype}{list(leaf.shape)}, {'decay' if decay else 'no decay'}, {where} over {SHARDS}"
    total = sum(p.size for p in jax.tree.leaves(params))
    content = {"config": to_dict(config), "derived": config.derived(), "parameters": total, "tensors": lines}
    return json.dumps(content, indent=1) + "\n"


def path_of(name: str) -> Path:
    return FOLDER / f"{name.replace(':', '_')}.json"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    for shipped in SHIPPED:
        path_of(shipped).write_text(dump(shipped))
