"""Write the frozen references of `test_aurora_parity.py`: OpenCLIP's CoCa decoder, and Hugging Face's SimMIM.

    python tests/parity/make_aurora.py

needs what `make_clip.py` needs. `coca.npz` holds

    params        float16, exact: weights in our names and layout, random in every tensor, one after the other; and
                  `image_tokens` (B, S, D), whose gradient is that of the encoder
    tokens        (B, T) int32: begin, words, end, zeros
    causal/…, bidirectional/…   what either view makes of the texts: `text` (B, T, D), features of the unimodal decoder,
                  and `logits` (B, T, V) of the multimodal decoder
    caption_loss  (B,), CoCaLoss of each text alone
    gradients     d(sum of the mean squares of all these)/d(param), likewise; of large tensors some elements: `sample`
    about         JSON: shapes by name, in the order of `params` and `gradients`; the model's shape, the versions, and
                  fp32 torch's own error against double precision

OpenCLIP has an MLP after self-attention and one after cross-attention. The last matrix and bias of the first are zero
here, so that its layer is ours.

`simmim.npz` holds, as `swin_*.npz` do, in the names of a file of `Swinv2ForMaskedImageModeling`: params, images,
gradients, about; and `hidden` (B, U, U) bool, units that are not shown, `reconstruction` (B, H, W, 3), and `loss`.

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
import transformers
from gates import sample
from make_swin import on_disk, randomise
from make_vit import relative
from open_clip.loss import CoCaLoss
from open_clip.transformer import MultimodalTransformer, TextTransformer

HERE = Path(__file__).parent
Tensors = dict[str, torch.Tensor]


class Text(NamedTuple):
    """Shape of a decoder, and its texts."""

    width: int = 32
    depths: tuple[int, int] = (1, 2)
    heads: int = 4
    context: int = 12
    vocab: int = 40
    image_tokens: int = 9
    lengths: tuple[int, ...] = (12, 3, 8)  # with begin and end


class Simmim(NamedTuple):
    """Shape of an encoder, and what is hidden from it."""

    width: int = 8
    depths: tuple[int, ...] = (1, 1, 1, 1)  # `swin_*.npz` have what layers add
    heads: tuple[int, ...] = (1, 2, 2, 4)
    patch: int = 2  # pixels
    window: int = 4
    image: int = 32
    unit: int = 8  # pixels
    hidden: int = 9  # units of each image


class Coca(torch.nn.Module):
    """Both halves. CoCa norms what the multimodal decoder gets of the unimodal; Aurora does not."""

    def __init__(self, case: Text):
        super().__init__()
        self.lower = TextTransformer(case.context, case.vocab, case.width, case.heads, case.depths[0])
        self.upper = MultimodalTransformer(case.width, case.depths[1], case.heads, case.context, output_dim=case.vocab)
        self.lengths = case.lengths
        self.image_tokens = torch.nn.Parameter(torch.empty(len(case.lengths), case.image_tokens, case.width))
        randomise(self, seed=0)
        for block in self.upper.resblocks:
            torch.nn.init.zeros_(block.mlp.c_proj.weight)
            torch.nn.init.zeros_(block.mlp.c_proj.bias)

    def view(self, tokens: torch.Tensor, *, causal: bool) -> Tensors:
        """Features and logits; text by text, since each has a mask of its own."""
        texts, logits = [], []
        x = self.lower.token_embedding(tokens) + self.lower.positional_embedding
        for i, length in enumerate(self.lengths):
            unseen = torch.arange(x.shape[1]).expand(x.shape[1], -1) >= length
            unseen = unseen | torch.ones_like(unseen).triu(1) if causal else unseen
            mask = torch.zeros(unseen.shape, dtype=x.dtype).masked_fill(unseen, -torch.inf)
            texts.append(self.lower.transformer(x[i : i + 1], attn_mask=mask))
            self.upper.attn_mask = mask
            logits.append(self.upper(self.image_tokens[i : i + 1], texts[-1]))
        return {"text": torch.cat(texts), "logits": torch.cat(logits)}

    def forward(self, tokens: torch.Tensor) -> Tensors:
        out = {}
        for name in ("causal", "bidirectional"):
            out |= {f"{name}/{k}": v for k, v in self.view(tokens, causal=name == "causal").items()}
        caption = CoCaLoss(caption_loss_weight=1.0, clip_loss_weight=0.0, pad_id=0)
        rows = zip(out["causal/logits"].split(1), tokens.split(1), strict=True)
        losses = [caption(None, None, words[:, :-1], text[:, 1:], None)[1] for words, text in rows]
        return out | {"caption_loss": torch.stack(losses)}


def ours(state: Tensors, depths: tuple[int, int]) -> dict[str, np.ndarray]:
    """OpenCLIP's names and layout to ours; linear, so that gradients follow it too."""
    state = {k: v.detach().numpy() for k, v in state.items()}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def linear(weight: np.ndarray, bias: np.ndarray) -> dict[str, np.ndarray]:
        return {"kernel": weight.T, "bias": bias}

    def named(name: str, mark: str = ".") -> dict[str, np.ndarray]:
        return linear(state[f"{name}{mark}weight"], state[f"{name}{mark}bias"])

    def tree(block: str, rest: str) -> dict[str, Any]:
        """A layer: `rest` is the block of the second norm and the MLP."""
        return {
            "ln1": norm(f"{block}.ln_1"), "ln2": norm(f"{rest}.ln_2"),
            "attn": {"qkv": named(f"{block}.attn", ".in_proj_"), "out": named(f"{block}.attn.out_proj")},
            "mlp": {"fc1": named(f"{rest}.mlp.c_fc"), "fc2": named(f"{rest}.mlp.c_proj")},
        }  # fmt: skip

    def upper(i: int) -> dict[str, Any]:
        cross = f"upper.cross_attn.{i}"
        parts = [np.split(state[f"{cross}.attn.in_proj_{n}"], 3) for n in ("weight", "bias")]
        heads = {k: linear(w, b) for k, w, b in zip(("query", "key", "value"), *parts, strict=True)}
        return tree(f"upper.resblocks.{i}", cross) | {
            "ln_cross": norm(f"{cross}.ln_1"), "ln_image": norm(f"{cross}.ln_1_kv"),
            "cross": heads | {"out": named(f"{cross}.attn.out_proj")},
        }  # fmt: skip

    lower = [flat(tree(*[f"lower.transformer.resblocks.{i}"] * 2)) for i in range(depths[0])]
    stacks = {"unimodal": lower, "multimodal": [flat(upper(i)) for i in range(depths[1])]}
    out = {
        "unimodal/token_embed": state["lower.token_embedding.weight"],
        "unimodal/pos_embed": state["lower.positional_embedding"],
        "multimodal/vocabulary": state["upper.text_projection"],
        "image_tokens": state["image_tokens"],
    }
    out |= {f"multimodal/norm/{k}": v for k, v in norm("upper.ln_final").items()}
    for half, layers in stacks.items():
        out |= {f"{half}/blocks/{k}": np.stack([layer[k] for layer in layers]) for k in layers[0]}
    return out


def flat(tree: dict[str, Any], path: str = "") -> dict[str, np.ndarray]:
    """Paths to leaves."""
    out = {}
    for key, value in tree.items():
        out |= flat(value, f"{path}{key}/") if isinstance(value, dict) else {path + key: value}
    return out


def differentiate(model: torch.nn.Module, forward: Callable[[], Tensors]) -> tuple[Tensors, Tensors]:
    """Outputs, and gradients by OpenCLIP's or Hugging Face's live names; parameters that have none are left out."""
    outputs = forward()
    model.zero_grad()
    sum(out.square().mean() for out in outputs.values()).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: out.detach() for name, out in outputs.items()}, gradients


def errors(outputs: Tensors, gradients: Tensors, exact: Tensors, exact_gradients: Tensors) -> dict[str, float]:
    """Those of fp32."""
    worst = max(relative({"": outputs[k]}, {"": exact[k]}) for k in exact)
    return {"worst output": worst, "gradients": relative(gradients, exact_gradients)}


def packed(params: dict[str, np.ndarray], gradients: dict[str, np.ndarray], exact: Tensors) -> dict[str, np.ndarray]:
    """The arrays that both files have."""
    # A key's bias has no gradient. Rounding would make it one of 1e-19.
    samples = [sample(np.where(np.abs(gradients[k]) < 1e-12, 0, gradients[k])) for k in params]
    return {k: v.numpy().astype(np.float32) for k, v in exact.items()} | {
        "params": np.concatenate([v.ravel() for v in params.values()]).astype(np.float16),
        "gradients": np.concatenate(samples).astype(np.float32),
    }


def write(name: str, about: dict, params: dict[str, np.ndarray], arrays: dict[str, np.ndarray]) -> None:
    """One file."""
    packages = {n: version(n) for n in ("open_clip_torch", "torch", "transformers", "numpy")}
    about = about | {"versions": packages | {"python": platform.python_version()}}
    about["shapes"] = {k: v.shape for k, v in params.items()}
    path = HERE / f"{name}.npz"
    np.savez_compressed(path, **arrays, about=np.array(json.dumps(about)))
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB, {about['peer_error']}")


def make_coca() -> None:
    """Write `coca.npz`."""
    case, generator = Text(), torch.Generator().manual_seed(0)
    model = Coca(case).eval()
    tokens = torch.zeros(len(case.lengths), case.context, dtype=torch.long)
    for row, length in zip(tokens, case.lengths, strict=True):
        row[:length] = torch.randint(3, case.vocab, (length,), generator=generator)
        row[0], row[length - 1] = 1, 2
    params = ours(dict(model.named_parameters()), case.depths)
    rounded = differentiate(model, lambda: model(tokens))
    params = {k: v.copy() for k, v in params.items()}
    model.double()
    exact, gradients = differentiate(model, lambda: model(tokens))
    about = case._asdict() | {"peer_error": errors(*rounded, exact, gradients)}
    unused = {k: torch.zeros_like(p) for k, p in model.named_parameters() if k not in gradients}
    arrays = packed(params, ours(gradients | unused, case.depths), exact)
    write("coca", about, params, arrays | {"tokens": tokens.numpy().astype(np.int32)})


def make_simmim() -> None:
    """Write `simmim.npz`."""
    case, generator = Simmim(), torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = transformers.Swinv2Config(
        image_size=case.image, patch_size=case.patch, embed_dim=case.width, depths=case.depths, num_heads=case.heads,
        window_size=case.window, encoder_stride=8 * case.patch,
    )  # fmt: skip
    model = transformers.Swinv2ForMaskedImageModeling(config).eval()
    randomise(model, seed=0)
    side, times = case.image // case.unit, case.unit // case.patch
    order = torch.stack([torch.randperm(side * side, generator=generator) for _ in range(2)])
    hidden = (order < case.hidden).unflatten(1, (side, side))
    patches = hidden.repeat_interleave(times, 1).repeat_interleave(times, 2).flatten(1)
    images = torch.randint(-4, 5, (2, 3, case.image, case.image), generator=generator) / 4

    def forward() -> Tensors:
        out = model(images.to(model.dtype), bool_masked_pos=patches)
        return {"reconstruction": out.reconstruction.permute(0, 2, 3, 1), "loss": out.loss}

    params = on_disk(model)
    rounded = differentiate(model, forward)
    model.double()
    exact, gradients = differentiate(model, forward)
    model.float()
    with torch.no_grad():  # the library itself then gives the gradients their names on disk
        for key, p in model.named_parameters():
            p.copy_(gradients[key])
    about = case._asdict() | {"peer_error": errors(*rounded, exact, gradients)}
    arrays = packed(params, on_disk(model), exact) | {"hidden": hidden.numpy()}
    write("simmim", about, params, arrays | {"images": images.permute(0, 2, 3, 1).numpy().astype(np.float16)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    make_coca()
    make_simmim()
