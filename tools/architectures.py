"""Write `visionfm_jax/interop/architectures.json`: networks by the names that timm and OpenCLIP have for them.

    python tools/architectures.py

needs timm, open_clip_torch and torch (no network, no weights). A network is written in the fields of this project, as
far as they differ from their defaults, with the preprocessing that its library gives its images. The number of its
parameters must be the library's; networks that ours cannot be are left out.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import jax
import numpy as np
import open_clip
import timm
import torch

from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import UserError
from visionfm_jax.interop.described import describe
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.interop.pretrained import timm_architectures
from visionfm_jax.models.layers import no_gather
from visionfm_jax.tasks.task import make_task
from visionfm_jax.train.initialise import settled, untrained

OUT = Path(__file__).parents[1] / "visionfm_jax" / "interop" / "architectures.json"
NO_ARRAYS = ("timm.import_state", "open_clip.import_state", "swin_v2._import")  # which would make them


def timm_models() -> Iterator[tuple[str, torch.nn.Module, dict[str, Any], str]]:
    """Name, network without numbers, what its `config.json` would say, and the name of that file."""
    for name in timm_architectures():
        with torch.device("meta"):
            model = timm.create_model(name, num_classes=0)
        cfg = model.pretrained_cfg
        said = {key: cfg[key] for key in ("crop_pct", "interpolation", "crop_mode") if key in cfg}
        said |= {"input_size": list(cfg["input_size"]), "mean": list(cfg["mean"]), "std": list(cfg["std"])}
        yield name, model, {"architecture": name, "pretrained_cfg": said}, "model.safetensors"


def open_clip_models() -> Iterator[tuple[str, torch.nn.Module, dict[str, Any], str]]:
    """Likewise, of models of two towers."""
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        plain = set(cfg) <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
        vision = cfg["vision_cfg"]
        if not plain or "timm_model_name" in vision or "hf_model_name" in cfg["text_cfg"]:
            continue
        if not isinstance(vision["layers"], int):  # a ResNet
            continue
        with torch.device("meta"):
            model = open_clip.CLIP(**cfg)
        yield name, model, {"model_cfg": cfg}, "open_clip_model.safetensors"


def different(values: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """What of the plain values of a configuration is not as in another of its class, and its kind."""
    out = {}
    for name, value in values.items():
        if isinstance(value, dict):
            out[name] = different(value, base[name] if base[name].get("kind") == value.get("kind") else {})
        elif name == "kind" or base.get(name) != value:
            out[name] = value
    return out


def entry(model: torch.nn.Module, about: dict[str, Any], file: str) -> dict[str, Any]:
    """A model in our fields.

    Raises:
      UserError: ours cannot be that.
    """
    state = {k: np.broadcast_to(np.float32(0), tuple(v.shape)) for k, v in model.state_dict().items()}
    path = Path("/none") / file
    said = describe(path, state, about)
    with (
        mock.patch.multiple("visionfm_jax.interop.timm", import_state=lambda *a: {}),
        mock.patch.multiple("visionfm_jax.interop.open_clip", import_state=lambda *a: {}),
        mock.patch.multiple("visionfm_jax.interop.swin_v2", _import=lambda *a: {}),
    ):  # which would make arrays
        config, found, problems = settled(untrained("model", said), path, state, about)
    if found is None:
        raise UserError(problems[-1])
    config.validate_model()
    shapes = jax.eval_shape(make_task(config, no_gather).init, jax.random.key(0))
    ours = sum(math.prod(leaf.shape) for leaf in flatten(shapes).values())
    theirs = sum(p.numel() for p in model.parameters())
    if ours != theirs:
        raise UserError(f"{ours:,} parameters, {theirs:,} there")
    values = to_dict(config.model)
    how = {k: getattr(said.preprocess, k) for k in ("crop", "resize", "interpolation")}
    return {"model": different(values, to_dict(type(config.model)())), "mean": said.mean, "std": said.std, **how}


def main() -> None:
    """Write the table, a line for each model."""
    lines, left = [], []
    for models in (timm_models(), open_clip_models()):
        for name, model, about, file in models:
            try:
                lines.append(f" {json.dumps(name)}: {json.dumps(entry(model, about, file))}")
            except UserError as error:
                left.append(f"left out: {name}: {error}"[:300])
    head = f'{{"timm": "{timm.__version__}", "open_clip": "{open_clip.__version__}", "models": {{\n'
    OUT.write_text(head + ",\n".join(lines) + "\n}}\n")
    print("\n".join(left))
    print(f"{OUT}: {len(lines)} models, {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
