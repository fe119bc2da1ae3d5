"""How fast kernels run on a card: what they reach of its data sheet, by kind and shape.

Each share has its source beside it. Those of the H100 were then fitted to three steps measured on one
(benchmarks/RESULTS.md); no other card and no network has been measured.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

from visionfm_jax.parallel.hlo import Attention, Product
from visionfm_jax.parallel.targets import Target

# Of these figures and of what `estimate` does with them: a change of either raises it, as a calibration corrects the
# times of one version alone.
VERSION = 1


class Rates(NamedTuple):
    """Shares of a data sheet's figures."""

    matmuls: float  # of the dense 16-bit peak: at the clock that the card's power allows, without idle cores
    fp8: float  # rate of fp8 products, in rates of 16-bit ones
    forward: tuple[float, float]  # of the peak, by attention kernels over long sequences: head dim 64, and 128 or more
    backward: tuple[float, float]
    measured: bool = False


RATES = {
    # Matmuls: 267.9 TFLOP/s at the best shape, of 312 (Bekman, "Machine Learning Engineering", MAMF table). Attention:
    # FlashAttention-2's paper, figures 5 and 6.
    "a100": Rates(matmuls=0.86, fp8=1.0, forward=(0.60, 0.72), backward=(0.53, 0.62)),
    # Matmuls: 794 TFLOP/s at the best shape, of 989 (MAMF), 720 at those of language models (SemiAnalysis, December
    # 2024, H100 and H200 alike; fp8 1,280). Attention: cuDNN in FlashAttention-3's paper, figures 5 and 6.
    "h100": Rates(matmuls=0.76, fp8=1.78, forward=(0.42, 0.61), backward=(0.475, 0.55), measured=True),
    # The same chip and power as the H100: published are 720 (SemiAnalysis) and 821 at the best shape (MAMF, GH200).
    "h200": Rates(matmuls=0.78, fp8=1.78, forward=(0.42, 0.61), backward=(0.475, 0.55)),
    # Matmuls: 1,745 TFLOP/s at the best shape, of 2,250 (MAMF). Attention: as H100.
    "b200": Rates(matmuls=0.77, fp8=1.78, forward=(0.42, 0.61), backward=(0.475, 0.55)),
}
OTHERS = Rates(matmuls=0.75, fp8=1.78, forward=(0.42, 0.61), backward=(0.475, 0.55))  # as H100

# Tiles of the output that a core computes at a time, and their speed: small ones load more for each product.
TILES = {(128, 256): 1.0, (256, 128): 1.0, (128, 128): 0.9, (64, 128): 0.7, (128, 64): 0.7, (64, 64): 0.5}
FILL = 64  # of the summed dim: the time in which a tile's first operands arrive and its result leaves
SPLITS = (1, 2, 4, 8, 16)  # of the summed dim, where the output alone has too few tiles for all cores
FP32 = 0.5  # TF32, in rates of 16-bit products
HALF_SPEED = {False: 115, True: 400}  # keys at which attention (forward, backward) reaches half its rate; same figures
BLOCK = 128  # queries and keys of attention are padded to multiples of
MEMORY = 0.87  # of the bandwidth, by large elementwise kernels; copies reach 0.91
NETWORK = 0.80  # of network bandwidth
# Seconds of a collective, and of each step of its ring inside a host and to another. NCCL's own model (tuning.cc) has 7
# to 8 µs, 0.6 µs for small messages to 3.4 for large ones, and 2.7 to 14.
LATENCY = 8e-6, 1e-6, 4e-6
KERNEL = 1.3e-6  # seconds from one kernel to the next of a recorded graph


def rates_of(target: Target) -> Rates:
    """Those of the card that its description names."""
    return next((rates for name, rates in RATES.items() if name in target.description.lower()), OTHERS)


@functools.cache
def matmul_seconds(m: int, n: int, k: int, dtype: str, target: Target, batch: int = 1) -> float:
    """Arithmetic of `batch` products (m, k) @ (k, n), by the best of the tiles and splits.

    Each core works on one tile at a time, so that the last wave of tiles may leave cores idle.
    """
    rates = rates_of(target)
    factor = rates.fp8 if dtype.startswith("f8") else {"f32": FP32, "f64": 1 / 16}.get(dtype, 1.0)
    core = rates.matmuls * factor * target.peak_flops / target.cores

    def seconds(rows: int, columns: int, split: int) -> float:
        waves = math.ceil(batch * math.ceil(m / rows) * math.ceil(n / columns) * split / target.cores)
        tile = 2 * rows * columns * (math.ceil(k / split / 16) * 16 + FILL) / (TILES[rows, columns] * core)
        sums = 2 * 4 * split * batch * m * n if split > 1 else 0  # bytes of partial sums in fp32
        return waves * tile + sums / memory_rate(target)

    return min(seconds(*tile, split) for tile in TILES for split in SPLITS)


@functools.cache
def attention_seconds(kernel: Attention, target: Target) -> float:
    """Arithmetic of a fused attention kernel."""
    narrow, wide = rates_of(target).backward if kernel.backward else rates_of(target).forward
    reached = narrow * kernel.dim / 64 if kernel.dim <= 64 else wide * kernel.dim / (128 * math.ceil(kernel.dim / 128))
    padded = [math.ceil(length / BLOCK) * BLOCK / length for length in (kernel.queries, kernel.keys)]
    slower = 1 + HALF_SPEED[kernel.backward] / kernel.keys
    return kernel.flops * math.prod(padded) * slower / (reached * target.peak_flops)


def arithmetic_seconds(product: Product | Attention, target: Target) -> float:
    """Of one kernel, as if its operands were at hand."""
    if isinstance(product, Attention):
        return attention_seconds(product, target)
    return matmul_seconds(product.m, product.n, product.k, product.dtype, target, product.batch)


def memory_rate(target: Target) -> float:
    """Bytes/s that kernels reach."""
    return MEMORY * target.memory_bandwidth
