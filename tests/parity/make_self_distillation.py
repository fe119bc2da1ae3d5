"""Write the frozen reference of `test_self_distillation_parity.py`: DINOv2's losses and head, in torch.

    python tests/parity/make_self_distillation.py

needs torch and numpy. The formulas are those of Oquab et al. 2023 and of the papers that it builds on, with torch's own
softmax, weight normalisation, pairwise distance and derivatives. `self_distillation.npz` holds

    student, teacher       logits (V, B, K) and (U, B, K), the teacher's views first
    chosen                 (U B,) bool, rows that exist for `sinkhorn_chosen`
    centre                 (K,)
    sinkhorn, sinkhorn_chosen, centred    targets (U B, K)
    views                  the loss; views/gradient by the student's logits
    masked                 (B, M) bool; patches: the loss of the first two views' logits as (B, M, K); patches/gradient
    features, koleo, koleo/gradient       (B, D), (B,), by the sum
    head/x, head/NAME, head/logits, head/gradient/NAME    a head, and the derivatives of its logits' mean square
    about                  temperatures, versions

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
from torch import Tensor, nn
from torch.nn.functional import gelu, log_softmax, normalize, softmax
from torch.nn.utils.parametrizations import weight_norm

TEACHER, STUDENT = 0.05, 0.1  # temperatures
VIEWS, TARGETS, ROWS, K, D = 4, 2, 6, 24, 10
HIDDEN, BOTTLENECK = 20, 8


def sinkhorn(logits: Tensor, iterations: int = 3) -> Tensor:
    """Algorithm 1 of SwAV's appendix, with DINOv2's order of normalisations."""
    q = torch.exp(logits / TEACHER)
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(0, keepdim=True) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / q.shape[0]
    return q * q.shape[0]


def views(student: Tensor, targets: Tensor) -> Tensor:
    """Pair by pair."""
    losses = [
        -(target * log_softmax(logits / STUDENT, -1)).sum(-1).mean()
        for u, target in enumerate(targets)
        for v, logits in enumerate(student)
        if u != v
    ]
    return torch.stack(losses).mean()


def patches(student: Tensor, targets: Tensor, masked: Tensor) -> Tensor:
    """Every masked patch with the inverse of the number of its image's."""
    losses = -(targets * log_softmax(student / STUDENT, -1)).sum(-1)
    weights = masked / masked.sum(1, keepdim=True).clamp(min=1)
    return (losses * weights).sum() / len(student)


def koleo(features: Tensor) -> Tensor:
    x = normalize(features, eps=1e-8)
    with torch.no_grad():
        scores = x @ x.T
        nearest = scores.fill_diagonal_(-1).argmax(1)
    return -torch.log(nn.PairwiseDistance(2, eps=1e-8)(x, x[nearest]) + 1e-8)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.fc3 = nn.Linear(HIDDEN, BOTTLENECK)
        self.last = weight_norm(nn.Linear(BOTTLENECK, K, bias=False))
        self.last.parametrizations.weight.original0.data.fill_(1)  # the length, which is not learnt

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc3(gelu(self.fc2(gelu(self.fc1(x)))))
        return self.last(normalize(x, dim=-1))


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)

    def draw(*shape: int) -> Tensor:  # what float32 holds exactly
        return torch.randn(shape).float().double()

    out: dict[str, Tensor] = {}
    student, teacher = out["student"], out["teacher"] = 0.4 * draw(VIEWS, ROWS, K), 0.4 * draw(TARGETS, ROWS, K)
    student, teacher = out["student"], out["teacher"] = student.float().double(), teacher.float().double()
    rows = teacher.flatten(0, 1)
    out["chosen"] = torch.arange(len(rows)) % 3 != 1
    out["centre"] = (0.1 * draw(K)).float().double()
    out["sinkhorn"] = sinkhorn(rows)
    out["sinkhorn_chosen"] = torch.zeros_like(rows)
    out["sinkhorn_chosen"][out["chosen"]] = sinkhorn(rows[out["chosen"]])
    out["centred"] = softmax((rows - out["centre"]) / TEACHER, -1)

    student.requires_grad_()
    targets = out["centred"].reshape(teacher.shape)
    out["views"] = views(student, targets)
    (out["views/gradient"],) = torch.autograd.grad(out["views"], student)

    out["masked"] = torch.tensor([[1, 1], [1, 0], [0, 0], [0, 1], [1, 1], [1, 0]], dtype=torch.bool)
    of_patches = student[:TARGETS].transpose(0, 1)
    out["patches"] = patches(of_patches, targets.transpose(0, 1), out["masked"])
    (gradient,) = torch.autograd.grad(out["patches"], student)
    out["patches/gradient"] = gradient[:TARGETS].transpose(0, 1)

    out["features"] = features = draw(ROWS, D).requires_grad_()
    out["koleo"] = koleo(features)
    (out["koleo/gradient"],) = torch.autograd.grad(out["koleo"].sum(), features)

    head = Head()
    named = {
        name.replace("last.parametrizations.weight.original1", "prototypes"): p
        for name, p in head.named_parameters()
        if not name.endswith("original0")
    }
    for p in named.values():
        p.data = (0.5 * draw(*p.shape)).float().double()
    out["head/x"] = x = draw(ROWS, D).requires_grad_()
    out["head/logits"] = logits = head(x)
    gradients = torch.autograd.grad((logits**2).mean(), [x, *named.values()])
    for name, p, gradient in zip(["x", *named], [x, *named.values()], gradients, strict=True):
        out[f"head/{name}"], out[f"head/gradient/{name}"] = p, gradient

    about = {"teacher": TEACHER, "student": STUDENT, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "numpy": version("numpy")}
    arrays = {k: v.detach().numpy() for k, v in out.items()}
    arrays = {k: v if v.dtype == bool else v.astype(np.float32) for k, v in arrays.items()}
    np.savez_compressed(Path(__file__).with_name("self_distillation.npz"), **arrays, about=json.dumps(about))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
