"""How much a compiled step reads and writes of a GPU's memory, by kind: no change is to lose quietly what was saved.

Bounds are in arrays of one layer's tokens, (B, T, D) in 16 bit, of which a ViT block, ideally fused, reads and writes
49 beside its attention and its matmuls, of which residual sums are a part. Forward: two norms (2 each), GELU (8).
Backward: of each norm 4 for the gradient of its input, 2 for those of scale and bias, 2 to make its output again; GELU
(16) and biases (5). The optimiser adds 34 to 40 bytes a parameter, 9 arrays.
"""

from __future__ import annotations

import functools
import math

import pytest

from visionfm_jax.config.load import from_arguments
from visionfm_jax.parallel.hlo import Module
from visionfm_jax.parallel.targets import find_cluster
from visionfm_jax.planning.calibration import ATTENTION, ELSE, MATMULS
from visionfm_jax.planning.compiled import GPU, compile_step
from visionfm_jax.planning.estimate import Estimate, estimate

BATCH, TOKENS, WIDTH = 128, 256, 1280
ARRAY = 2 * BATCH * TOKENS * WIDTH  # bytes


@functools.cache
def plan_of(depth: int, *more: str) -> Estimate:
    """Of ViT-H with so few blocks, on one H100."""
    flags = [f"--config.model.depth={depth}", f"--config.train.batch_size={BATCH}", "--config.task.num_classes=1000"]
    config, rest = from_arguments(["--config=configs/vit_huge.py", *flags, *more])
    assert not rest
    cluster = find_cluster("h100:1x1")
    return estimate(compile_step(config, cluster, GPU), cluster)


def of_a_block(kind: str, *more: str) -> float:
    """Bytes of one block, and its part of the optimiser, in arrays."""
    two, four = (plan_of(depth, *more).traffic_by_kind[kind] for depth in (2, 4))
    return (four - two) / 2 / ARRAY


@pytest.mark.parametrize(("remat", "most"), [("dots", 73), ("none", 65)])  # 71 and 63 were read by jax 0.12
def test_a_block_reads_and_writes_little_more_than_it_must(remat, most):
    flag = f"--config.model.remat={remat}"
    # Operands, results and weights of twelve products of D x D; two add what is there, of queries, keys and values.
    matmuls = 3 * 18 + 2 + 6 * 12 * WIDTH**2 / (ARRAY / 2)
    assert matmuls <= of_a_block(MATMULS, flag) <= 1.02 * matmuls
    assert of_a_block(ATTENTION, flag) == pytest.approx(12, rel=0.02)  # 4 forward, 8 backward
    assert 49 < of_a_block(ELSE, flag) <= most
    kept = (plan_of(4, flag).memory["activations"] - plan_of(2, flag).memory["activations"]) / 2 / ARRAY
    assert kept == pytest.approx({"dots": 10, "none": 16}[remat], rel=0.06)


def test_no_kernel_of_a_block_writes_fp32_of_the_size_of_its_tokens():
    """As derivatives of norms and GELU have it that XLA is left to fuse; logits are fp32, and small here."""
    written = math.prod((BATCH, TOKENS, WIDTH))
    large = [
        (instruction.name, array)
        for instruction, _, _ in Module(plan_of(2, "--config.model.remat=dots").compiled.hlo).instructions()
        if instruction.opcode == "fusion" and "Block" in instruction.source
        for array in instruction.outputs
        if array.dtype == "f32" and math.prod(array.shape) >= written
    ]
    assert large == []
