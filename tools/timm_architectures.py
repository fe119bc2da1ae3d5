"""Write `visionfm_jax/interop/timm_architectures.json`: what timm's ViTs and SwinV2s compute that their names hide.

    python tools/timm_architectures.py

needs timm and torch (no network, no weights). A folder of timm's hub names its architecture, and what follows from that
is in timm's code: heads, pooling, the epsilon of norms, activations, windows. Architectures whose network ours is not
are left out.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import timm
import torch
from timm.layers import GELU, GELUTanh, GluMlp, Mlp, QuickGELU, SwiGLU
from timm.models import eva, swin_transformer_v2, vision_transformer

OUT = Path(__file__).parents[1] / "visionfm_jax" / "interop" / "timm_architectures.json"
MODULES = ("vision_transformer", "deit", "eva", "swin_transformer_v2")
ACTIVATIONS = {torch.nn.GELU: "gelu", GELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_tanh"}


def activation(mlp: torch.nn.Module) -> str | None:
    """By our name; None: another."""
    if isinstance(mlp, SwiGLU) or (isinstance(mlp, GluMlp) and isinstance(mlp.act, torch.nn.SiLU)):
        return "swiglu"
    return ACTIVATIONS.get(type(mlp.act)) if type(mlp) is Mlp else None


def vit(model: vision_transformer.VisionTransformer) -> dict[str, Any] | None:
    """What `vit_from_timm` asks for; None: not our network."""
    block = model.blocks[0]
    norms = [block.norm1, block.norm2]
    if type(block) is not vision_transformer.Block or type(block.attn) is not vision_transformer.Attention:
        return None
    return facts(model, block, norms, no_embed_class=bool(model.no_embed_class))


def dinov3(model: eva.Eva) -> dict[str, Any] | None:
    """Likewise, of an `Eva` with DINOv3's positions."""
    block = model.blocks[0]
    if type(model.rope).__name__ != "RotaryEmbeddingDinoV3" or type(block) is not eva.EvaBlock:
        return None
    return facts(model, block, [block.norm1, block.norm2], rope_temperature=float(model.rope.temperature))


def facts(model: torch.nn.Module, block: torch.nn.Module, norms: list, **more: Any) -> dict[str, Any] | None:
    """What both ask for."""
    act = activation(block.mlp)
    if act is None or any(not isinstance(norm, torch.nn.LayerNorm) for norm in norms):
        return None
    if model.global_pool not in ("token", "avg", "map") or getattr(model, "pool_include_prefix", False):
        return None
    return {"num_heads": block.attn.num_heads, "global_pool": model.global_pool, "norm_eps": norms[0].eps,
            "act_layer": act} | {k: v for k, v in more.items() if v}  # fmt: skip


def swin(model: swin_transformer_v2.SwinTransformerV2, **arguments: Any) -> dict[str, Any]:
    """What `swin_v2_from_timm` asks for."""
    block = model.layers[0].blocks[0]
    return {"window_size": arguments["window_size"],
            "pretrained_window_sizes": list(arguments.get("pretrained_window_sizes", (0, 0, 0, 0))),
            "norm_eps": model.norm.eps, "act_layer": activation(block.mlp)}  # fmt: skip


def facts_of(name: str) -> dict[str, Any] | None:
    """Of an architecture; None: not our network."""
    seen: dict[str, Any] = {}
    original = swin_transformer_v2.SwinTransformerV2.__init__

    def spy(self: Any, *args: Any, **arguments: Any) -> None:
        seen.update(arguments)
        original(self, *args, **arguments)

    swin_transformer_v2.SwinTransformerV2.__init__ = spy
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    finally:
        swin_transformer_v2.SwinTransformerV2.__init__ = original
    size = {"img_size": model.pretrained_cfg["input_size"][-1]}
    if type(model) is vision_transformer.VisionTransformer:
        return vit(model)
    if type(model) is eva.Eva:
        return dinov3(model)
    if type(model) is swin_transformer_v2.SwinTransformerV2:
        return swin(model, **seen) | size
    return None


def main() -> None:
    """Write the table: each set of facts with the architectures that have it."""
    groups: dict[str, list[str]] = {}
    failed = []
    for name in sorted({n for module in MODULES for n in timm.list_models(module=module)}):
        try:
            found = facts_of(name)
        except Exception as error:
            failed.append(f"{name}: {error!r}"[:200])
            continue
        if found:
            groups.setdefault(json.dumps(found), []).append(name)
    rows = [f'  {{"facts": {facts}, "of": {json.dumps(names)}}}' for facts, names in groups.items()]
    OUT.write_text(f'{{"timm": "{timm.__version__}", "architectures": [\n' + ",\n".join(rows) + "\n]}\n")
    count = sum(map(len, groups.values()))
    print(f"{OUT}: {count} architectures, {len(groups)} sets of facts, {OUT.stat().st_size} bytes")
    print("\n".join(failed))


if __name__ == "__main__":
    main()
