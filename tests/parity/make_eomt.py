"""Write the frozen reference of `test_eomt_parity.py`: `EomtForUniversalSegmentation` of Hugging Face transformers.

    python tests/parity/make_eomt.py

needs what `make_vit.py` needs, and scipy. `eomt.npz` holds a tiny one, with registers and a class token:

    params        float16, exact: weights, random in every tensor, one after the other
    images        (B, 3, H, W) float16, exact
    logits        (N + 1, B, Q, C + 1), before each of the blocks that queries join, and after the last
    masks         (N + 1, B, Q, h, w), likewise: each block sees the masks before it
    alone/…       both, after the last block, without masked attention
    gradients     d(sum of the mean squares of logits and masks)/d(param), but of keys' biases, which change nothing; of
                  large tensors some elements: `sample`
    truth, labels, objects  (B, M, h, w) uint8, (B, M), and (B,), how many of the M each image has
    loss          of all predictions, and its gradients loss/logits and loss/masks; in place of drawn points, the peer
                  is given all places of the masks
    about         JSON: shapes by the library's names, in the order of `params` and `gradients`; the versions, and fp32
                  torch's own error against double precision

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from unittest import mock

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
import transformers
from gates import relative, sample
from make_segmentation import randomise, versions

HERE = Path(__file__).parent
BATCH, SIDE, PATCH, PLACES, MASKS, CLASSES = 2, 64, 16, 16, 4, 5
OBJECTS = (3, 1)
SHAPE = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "mlp_ratio": 2, "num_queries": 7}


def tiny() -> torch.nn.Module:
    """The model, its weights random."""
    config = transformers.EomtConfig(
        **SHAPE, image_size=SIDE, patch_size=PATCH, num_upscale_blocks=2, num_blocks=2, num_register_tokens=2,
        num_labels=CLASSES, train_num_points=PLACES**2, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.EomtForUniversalSegmentation(config).eval()
    weight = model.criterion.empty_weight.clone()
    randomise(model, 0)
    model.criterion.empty_weight.copy_(weight)
    return model


def centres(dtype: torch.dtype) -> torch.Tensor:
    """Of all places of a mask (1, h w, 2), as the library's `sample_point` takes them."""
    at = (torch.arange(PLACES, dtype=dtype) + 0.5) / PLACES
    rows, columns = torch.meshgrid(at, at, indexing="ij")
    return torch.stack([columns, rows], -1).reshape(1, -1, 2)


def run(model: torch.nn.Module, share: float, images: torch.Tensor, **labels: list[torch.Tensor]) -> tuple:
    """What is predicted, before each block and after the last, and the loss."""
    made, predict = [], model.predict

    def look(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made.append(predict(tokens))
        for part in made[-1]:
            part.retain_grad()
        return made[-1]

    model.attn_mask_probs.fill_(share)
    all_places = centres(images.dtype)
    with (
        mock.patch.object(model, "predict", look),
        mock.patch.object(torch, "rand", return_value=all_places),
        mock.patch.object(
            type(model.criterion), "sample_points_using_uncertainty",
            lambda self, logits, *_: all_places.expand(len(logits), -1, -1),
        ),
    ):  # fmt: skip
        out = model(images, **labels)
    return [masks for masks, _ in made], [logits for _, logits in made], out.loss


def main() -> None:
    """Write `eomt.npz`."""
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator).half()
    truth = torch.randint(0, 4, (BATCH, MASKS, PLACES, PLACES), generator=generator) == 0
    labels = torch.randint(0, CLASSES, (BATCH, MASKS), generator=generator)
    state = {k: v.clone() for k, v in model.named_parameters()}
    kept = {}
    for dtype in (torch.float32, torch.float64):
        model.to(dtype).zero_grad()
        masks, logits, _ = run(model, 1.0, images.to(dtype))
        stacked = {"logits": torch.stack(logits), "masks": torch.stack(masks)}
        sum(part.square().mean() for part in stacked.values()).backward()
        kept[dtype] = {name: part.detach().numpy() for name, part in stacked.items()}
        gradients = {name: p.grad.clone().numpy() for name, p in model.named_parameters()}
    exact, rough = kept[torch.float64], kept[torch.float32]
    masks, logits, _ = run(model, 0.0, images.double())
    exact |= {"alone/logits": logits[-1].detach().numpy(), "alone/masks": masks[-1].detach().numpy()}
    assert len(masks) == 1
    masks, logits, loss = run(
        model, 1.0, images.double(),
        mask_labels=[t[:n].double() for t, n in zip(truth, OBJECTS, strict=True)],
        class_labels=[one[:n] for one, n in zip(labels, OBJECTS, strict=True)],
    )  # fmt: skip
    loss.backward()
    exact |= {f"loss/{k}": np.stack([p.grad.numpy() for p in v]) for k, v in (("logits", logits), ("masks", masks))}
    samples = {name: sample(g) for name, g in gradients.items() if not name.endswith("k_proj.bias")}
    about = {
        "params": {name: list(v.shape) for name, v in state.items()},
        "gradients": {name: list(v.shape) for name, v in samples.items()},
        "versions": versions(),
        "fp32_error": relative(rough["masks"], exact["masks"]),
        "above_0": float((exact["masks"] > 0).mean()),
    }
    np.savez_compressed(
        HERE / "eomt.npz",
        params=np.concatenate([v.detach().numpy().ravel() for v in state.values()]).astype(np.float16),
        gradients=np.concatenate([v.ravel() for v in samples.values()]).astype(np.float32),
        images=images.numpy(),
        truth=truth.numpy().astype(np.uint8),
        labels=labels.numpy().astype(np.int32),
        objects=np.array(OBJECTS, np.int32),
        loss=np.float32(loss.item()),
        about=json.dumps(about),
        **{name: value.astype(np.float32) for name, value in exact.items()},
    )


if __name__ == "__main__":
    main()
