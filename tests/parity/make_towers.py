"""Write the frozen references of `test_towers_parity.py`: tiny models of two towers, as transformers computes them.

    python tests/parity/make_towers.py

needs what `make_dialects.py` needs. Each `towers_*.npz` holds

    params         weights, one behind the other, random in every tensor; float16, exact
    images         (B, H, W, 3) float16, exact; tokens (B, T) int32
    image, text    (B, E) float32, embeddings, not normalised
    cotangents     (2, B, E) float16, exact
    gradients      float32, d(sum of embeddings * cotangents)/d(param), in double precision, at most 511 elements of
                   each tensor (`gates.sample`)
    about          JSON: the weights' names on disk and shapes, config.json, versions
"""

from __future__ import annotations

import argparse
import json
import platform

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
import transformers
from gates import sample
from make_dialects import on_disk
from make_vit import HERE, randomise

BATCH, WORDS, VOCAB, END = 3, 8, 40, 39
TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": WORDS, "vocab_size": VOCAB, "eos_token_id": END,
}  # fmt: skip
VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4,
    "image_size": 16,
}  # fmt: skip
CASES = {
    "clip": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)
    ),
    "siglip": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)
    ),
}


def embeddings(model: torch.nn.Module, images: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
    """Of images and of texts, (B, E) each, not normalised."""
    found = model.get_image_features(pixel_values=images), model.get_text_features(input_ids=tokens)
    return [f if isinstance(f, torch.Tensor) else f.pooler_output for f in found]


def make(name: str, seed: int) -> None:
    """Write one file."""
    torch.manual_seed(seed)
    model = CASES[name]().eval()
    randomise(model, seed)
    state, config = on_disk(model)
    images = torch.randn(BATCH, 3, 16, 16).half().float()
    tokens = torch.randint(1, END, (BATCH, WORDS))
    for row, end in enumerate((4, 7, 5)):
        tokens[row, end] = END
        tokens[row, end + 1 :] = 0
    plain = [e.detach() for e in embeddings(model, images, tokens)]
    cotangents = torch.randn(2, *plain[0].shape).half().float()
    model.double()
    exact = embeddings(model, images.double(), tokens)
    sum((e * c).sum() for e, c in zip(exact, cotangents.double(), strict=True)).backward()
    with torch.no_grad():  # the library itself then gives the gradients their names on disk
        for p in model.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        named = on_disk(model)[0]
    about = {
        "asked": config, "shapes": {k: v.shape for k, v in state.items()},
        "versions": {
            "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__,
        },
    }  # fmt: skip
    path = HERE / f"towers_{name}.npz"
    np.savez_compressed(
        path, params=np.concatenate([v.ravel() for v in state.values()]).astype(np.float16),
        images=images.permute(0, 2, 3, 1).numpy().astype(np.float16), tokens=tokens.numpy().astype(np.int32),
        image=plain[0].numpy(), text=plain[1].numpy(), cotangents=cotangents.numpy().astype(np.float16),
        gradients=np.concatenate([sample(named[k]) for k in state]).astype(np.float32),
        about=np.array(json.dumps(about)),
    )  # fmt: skip
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    for i, case in enumerate(CASES):
        make(case, seed=20 + i)
