"""Write the frozen references of `test_clip_parity.py`: small text towers and both losses, as OpenCLIP computes them.

    python tests/parity/make_clip.py

needs what `make_swin.py` needs, and open_clip_torch. Each `text_*.npz` holds

    params        float16, exact: weights in OpenCLIP's layout, random in every tensor, one after the other
    tokens        (B, T) int32
    pooled        (B, D), each text's normed end token
    embedding     (B, E), its image in the joint space
    gradients     d(sum of the mean squares of the two)/d(param), likewise; of large tensors some elements: `sample`
    about         JSON: shapes by OpenCLIP's names, in the order of `params` and `gradients`; the model's shape, the
                  versions, and fp32 torch's own error against double precision

`clip_losses.npz` holds images, texts (G, D), of any length; and for "softmax" and "sigmoid" NAME/scale, the logarithm,
NAME/bias, NAME/loss, and NAME/gradient/… by each of these: what one device makes of the global batch.

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
from gates import sample
from make_swin import randomise
from make_vit import relative
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.transformer import TextTransformer
from torch.nn.functional import normalize

HERE = Path(__file__).parent


class Case(NamedTuple):
    """A tower and its texts."""

    width: int
    depth: int
    heads: int
    context: int
    vocab: int
    embed: int
    end: int  # token of the end; OpenCLIP takes the largest id of a text for it, or is told
    lengths: tuple[int, ...]  # of the texts, with begin and end


CASES = {
    # Heads and positions of the tower beside SwinV2-G and ViT-H; texts of all lengths.
    "context77": Case(128, 2, 16, 77, 128, 48, 127, (77, 3, 40, 76)),
    # Heads of 64 channels as all towers have them; an end token that is not the largest id.
    "head64": Case(128, 1, 2, 20, 64, 32, 7, (20, 2, 9)),
}


def texts_of(case: Case, generator: torch.Generator) -> torch.Tensor:
    """Token ids (B, T): begin, anything but the end token, the end token, zeros."""
    tokens = torch.zeros(len(case.lengths), case.context, dtype=torch.long)
    for row, length in zip(tokens, case.lengths, strict=True):
        row[:length] = torch.randint(1, case.end, (length,), generator=generator)
        if case.end < case.vocab - 1:  # every other id above the end's
            row[0:length:2] += case.end
        row[length - 1] = case.end
    return tokens


def differentiate(model: TextTransformer, tokens: torch.Tensor) -> tuple[dict, dict]:
    """Outputs and gradients."""
    seen = []
    hook = model.ln_final.register_forward_hook(lambda _, __, out: seen.append(out))
    embedding = model(tokens)
    hook.remove()
    ends = (tokens == model.eos_id).int().argmax(1)
    outputs = {"pooled": seen[0][torch.arange(len(ends)), ends], "embedding": embedding}
    model.zero_grad()
    sum(out.square().mean() for out in outputs.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return {name: out.detach() for name, out in outputs.items()}, gradients


def versions() -> dict[str, str]:
    """What made a file."""
    packages = {name: version(name) for name in ("open_clip_torch", "torch", "numpy")}
    return packages | {"python": platform.python_version()}


def write(name: str, about: dict, arrays: dict[str, np.ndarray]) -> None:
    """One file."""
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, **arrays, about=np.array(json.dumps(about | {"versions": versions()})))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {about['peer_error']}")


def make_text(name: str, seed: int) -> None:
    """Write one tower."""
    case = CASES[name]
    torch.manual_seed(seed)
    model = TextTransformer(
        case.context, case.vocab, case.width, case.heads, case.depth, output_dim=case.embed, eos_id=case.end,
        pool_type="argmax" if case.end == case.vocab - 1 else "eos",
    ).eval()  # fmt: skip
    randomise(model, seed)
    tokens = texts_of(case, torch.Generator().manual_seed(seed))
    params = {name: p.detach().numpy().copy() for name, p in model.named_parameters()}
    outputs, gradients = differentiate(model, tokens)
    exact, exact_gradients = differentiate(model.double(), tokens)
    about = case._asdict() | {
        "shapes": {k: v.shape for k, v in params.items()},
        "peer_error": {"outputs": relative(outputs, exact), "gradients": relative(gradients, exact_gradients)},
    }
    arrays = {k: v.numpy().astype(np.float32) for k, v in exact.items()} | {
        "params": np.concatenate([v.ravel() for v in params.values()]).astype(np.float16),
        "gradients": np.concatenate([sample(exact_gradients[k].numpy()) for k in params]).astype(np.float32),
        "tokens": tokens.numpy().astype(np.int32),
    }
    write(f"text_{name}", about, arrays)


def make_losses(rows: int = 32, width: int = 24) -> None:
    """Write `clip_losses.npz`: pairs that resemble one another somewhat, of various lengths."""
    generator = torch.Generator().manual_seed(0)
    common, *own = torch.randn(3, rows, width, generator=generator)
    images, texts = (((common + 0.7 * o) * (0.2 + i)).half().double() for i, o in enumerate(own))
    arrays = {"images": images.numpy().astype(np.float16), "texts": texts.numpy().astype(np.float16)}
    peer_error = {}
    for name, scale, bias in (("softmax", 3.5, None), ("sigmoid", 2.25, -9.5)):
        values = {"images": images, "texts": texts, "scale": torch.tensor(scale).double()}
        values |= {} if bias is None else {"bias": torch.tensor(bias).double()}

        def differentiate(values: dict, name: str = name) -> dict[str, torch.Tensor]:
            v = {k: x.clone().requires_grad_() for k, x in values.items()}
            module = ClipLoss() if name == "softmax" else SigLipLoss()
            units = [normalize(v[k], dim=-1) for k in ("images", "texts")]
            loss = module(*units, v["scale"].exp(), logit_bias=v.get("bias"))
            loss.backward()
            return {"loss": loss.detach()} | {f"gradient/{k}": x.grad for k, x in v.items()}

        exact = differentiate(values)
        peer_error[name] = relative(differentiate({k: x.float() for k, x in values.items()}), exact)
        arrays |= {f"{name}/{k}": x.numpy().astype(np.float32) for k, x in exact.items()}
        arrays |= {f"{name}/{k}": values[k].numpy().astype(np.float32) for k in ("scale", "bias") if k in values}
    write("clip_losses", {"peer_error": peer_error}, arrays)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for i, case in enumerate(CASES):
        make_text(case, seed=i)
    make_losses()
