"""Damage files of weights at random (safetensors and config.json), and check that reading them is safe.

    python tools/attack/weights_files.py --count=2000 --seed=0

Bits are flipped, files are truncated, and parts are inserted and rewritten. Each file is read as at the start of a run.
The result must be finite arrays of the right names and shapes, or a UserError of one line. Violations are listed. Exit
codes: 0 none · 1 some.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import struct
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from visionfm_jax.errors import UserError  # noqa: E402
from visionfm_jax.interop import files  # noqa: E402
from visionfm_jax.interop.pretrained import import_weights  # noqa: E402
from visionfm_jax.models.backbones.vit import ViTConfig  # noqa: E402

TIMM = {"architecture": "vit_tiny_patch16_224", "global_pool": "token", "model_args": {"img_size": 8}}
WIDTH, VIT = 6, ViTConfig(width=6, depth=1, heads=3, mlp=6, patch_size=4, image_size=8, pool="cls")
HUGGINGFACE = {"model_type": "vit", "num_attention_heads": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu"}
WILD = (None, 0, -1, 2**70, 1e308, float("nan"), "", "\x1b[31m", "x" * 10_000, True, [], [[]], {}, {"a": 1}, [1, "a"])


def timm_state(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """A ViT of one layer."""
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, WIDTH), "pos_embed": (1, 5, WIDTH), "patch_embed.proj.weight": (WIDTH, 3, 4, 4),
        "head.weight": (5, WIDTH), "blocks.0.attn.qkv.weight": (3 * WIDTH, WIDTH), "blocks.0.attn.qkv.bias": (18,),
    }  # fmt: skip
    shapes |= {f"blocks.0.{name}.weight": (WIDTH, WIDTH) for name in ("attn.proj", "mlp.fc1", "mlp.fc2")}
    shapes |= {f"{name}.weight": (WIDTH,) for name in ("blocks.0.norm1", "blocks.0.norm2", "norm")}
    biased = ("blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.norm1", "blocks.0.norm2", "norm")
    shapes |= {f"{name}.bias": (WIDTH,) for name in (*biased, "patch_embed.proj")} | {"head.bias": (5,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def strike(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One blow, and its name."""
    data, header = bytearray(content), 8 + struct.unpack("<Q", content[:8])[0]
    kind = rng.choice(("bit of the header", "bit of the data", "length", "cut", "splice", "number", "zeros"))
    if kind == "bit of the header":
        data[rng.randrange(8, header)] ^= 1 << rng.randrange(8)
    if kind == "bit of the data":
        data[rng.randrange(header, len(data))] ^= 1 << rng.randrange(8)
    if kind == "length":
        data[:8] = struct.pack("<Q", rng.choice((0, 1, 2**20, 2**40, 2**63, rng.randrange(2 * header))))
    if kind == "cut":
        del data[rng.randrange(len(data)) :]
    if kind == "splice":
        at = rng.randrange(len(data))
        data[at:at] = rng.randbytes(rng.randrange(1, 64))
    if kind == "number":
        text = json.loads(data[8:header])
        tensor = text[rng.choice(list(text))]
        numbers = tensor[rng.choice(("shape", "data_offsets"))]
        numbers[rng.randrange(len(numbers))] = rng.choice((0, -1, 1, 2**31, 2**62, 2**64 - 1, rng.randrange(5000)))
        new = json.dumps(text).encode()
        data[:header] = struct.pack("<Q", len(new)) + new
    if kind == "zeros":
        at = rng.randrange(len(data))
        data[at : at + 512] = bytes(len(data[at : at + 512]))
    return kind, bytes(data)


def rewrite(about: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """A config.json with one value that nobody expects, at any depth."""
    key = rng.choice([*about, "x"])
    inner = about.get(key)
    new = rewrite(inner, rng) if isinstance(inner, dict) and rng.random() < 0.5 else rng.choice(WILD)
    return {**about, key: new, **({rng.choice(("model_cfg", "vision_config", "x")): new} if rng.random() < 0.3 else {})}


def read(folder: Path) -> str:
    """What a start makes of the folder: "read", or "refused"."""
    try:
        file = files.file_in(folder, "checkpoint.weights")
        about = files.about(file)
        found = import_weights(files.read_weights(file).tensors, about, {"": VIT}, "", ("head",))
    except UserError as error:
        if "\n" in str(error):
            raise RuntimeError(f"an error of several lines: {error}") from error
        return "refused"
    assert all(np.isfinite(value).all() and value.dtype == np.float32 for value in found.arrays.values())
    assert found.arrays["norm/scale"].shape == (WIDTH,)
    return "read"


def main(argv: list[str] | None = None) -> int:
    """Strike, and count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="number of damaged files (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    rng, results, bad = random.Random(arguments.seed), collections.Counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, beside = folder / "model.safetensors", folder / "config.json"
        save_file(timm_state(np.random.default_rng(arguments.seed)), file)
        content = file.read_bytes()
        beside.write_text(json.dumps(TIMM))
        assert read(folder) == "read"
        for _ in range(arguments.count):
            kind, struck, about = "config.json", content, TIMM
            if rng.random() < 0.3:
                about = rewrite(rng.choice((TIMM, HUGGINGFACE, {"model_cfg": {"vision_cfg": {}, "text_cfg": {}}})), rng)
            else:
                kind, struck = strike(content, rng)
            file.write_bytes(struck)
            beside.write_text(json.dumps(about))
            try:
                results[kind, read(folder)] += 1
            except BaseException as error:
                results[kind, "neither"] += 1
                lines = "".join(traceback.format_exception(error)[-3:])
                bad.append(f"{kind} {about if kind == 'config.json' else ''}: {lines}")
    print("| blow | read | refused | neither |\n|---|--:|--:|--:|")
    for kind in sorted({kind for kind, _ in results}):
        print(f"| {kind} | " + " | ".join(str(results[kind, how]) for how in ("read", "refused", "neither")) + " |")
    print("\n".join(bad[:10]))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
