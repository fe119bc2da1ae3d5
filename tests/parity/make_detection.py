"""Write the frozen reference of `test_detection_parity.py`: the losses and the matching of transformers' DETR family.

    python tests/parity/make_detection.py

needs torch, scipy and transformers, whose losses of Deformable DETR are Plain-DETR's but for the L1 loss of boxes.
`detection.npz` holds, for images with different numbers of objects,

    logits, boxes          (B, Q, C) and (B, Q, 4), centres and sides relative to the image
    truth, labels, objects (B, M, 4), (B, M) and (B,): how many of the M each image has
    class_costs, giou_costs  (B, M, Q), 0 where there is no object
    query                  (B, M), the query of each object, -1 where there is none
    class, giou            the losses by the number of objects; with gradients class/gradient by the logits and
                           giou/gradient by the boxes
    many/…                 the same, of every object three times
    about                  weights of the costs, versions

All that is computed is computed in double precision and kept in float32.
"""

from __future__ import annotations

import argparse
import json
import platform
from importlib.metadata import version
from pathlib import Path

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import torch
from torch import Tensor
from transformers.loss import loss_deformable_detr as peer

B, Q, C, M, COPIES = 4, 30, 5, 7, 3
OBJECTS = (7, 3, 0, 1)
CLASS, GIOU = 2.0, 3.0  # weights of the costs


def costs(outputs: dict, targets: list[dict], **weights: float) -> list[np.ndarray]:
    """What the peer's matcher hands to scipy, (Q, objects) of each image."""
    seen, solve = [], peer.linear_sum_assignment

    def look(matrix: Tensor) -> tuple:
        seen.append(matrix.numpy())
        return solve(matrix)

    peer.linear_sum_assignment = look
    try:
        peer.DeformableDetrHungarianMatcher(**weights)(outputs, targets)
    finally:
        peer.linear_sum_assignment = solve
    return seen


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)

    def boxes(*shape: int) -> Tensor:  # what float32 holds exactly
        return torch.cat([torch.rand(*shape, 2), 0.02 + 0.5 * torch.rand(*shape, 2)], -1).float().double()

    out: dict[str, Tensor] = {"logits": (2 * torch.randn(B, Q, C)).float().double(), "boxes": boxes(B, Q)}
    out |= {"truth": boxes(B, M), "labels": torch.randint(0, C, (B, M)), "objects": torch.tensor(OBJECTS)}
    logits, predicted = out["logits"].requires_grad_(), out["boxes"].requires_grad_()
    outputs = {"logits": logits, "pred_boxes": predicted}
    targets = [
        {"class_labels": labels[:n], "boxes": truth[:n]}
        for labels, truth, n in zip(out["labels"], out["truth"], OBJECTS, strict=True)
    ]
    for name, weights in {"class": (1.0, 0.0, 0.0), "giou": (0.0, 0.0, 1.0)}.items():
        found = costs(outputs, targets, **dict(zip(("class_cost", "bbox_cost", "giou_cost"), weights, strict=True)))
        out[f"{name}_costs"] = torch.zeros(B, M, Q)
        for i, matrix in enumerate(found):
            out[f"{name}_costs"][i, : OBJECTS[i]] = torch.tensor(matrix.T)

    matcher = peer.DeformableDetrHungarianMatcher(class_cost=CLASS, bbox_cost=0.0, giou_cost=GIOU)
    out["query"] = torch.full((B, M), -1)
    for i, (query, target) in enumerate(matcher(outputs, targets)):
        out["query"][i, target] = query
    criterion = peer.DeformableDetrImageLoss(matcher, C, 0.25, ["labels", "boxes"])
    several = [{k: v.repeat_interleave(COPIES, 0) for k, v in target.items()} for target in targets]
    for prefix, wanted in {"": targets, "many/": several}.items():
        losses = criterion(outputs, wanted)
        for name, theirs, by in (("class", "loss_ce", logits), ("giou", "loss_giou", predicted)):
            out[prefix + name] = losses[theirs]
            (out[f"{prefix}{name}/gradient"],) = torch.autograd.grad(losses[theirs], by, retain_graph=True)

    about = {"class": CLASS, "giou": GIOU, "copies": COPIES, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "transformers": version("transformers"), "numpy": version("numpy")}
    arrays = {k: v.detach().numpy() for k, v in out.items()}
    arrays = {k: v.astype(np.float32 if v.dtype == np.float64 else np.int32) for k, v in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("detection.npz"), **arrays, about=json.dumps(about))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
