"""What accelerators can do, from their makers' data sheets: for MFU, and for planning without one.

Sources, all NVIDIA; peaks are dense (the sheets print twice that, "with sparsity", from Hopper on):
  a100  "NVIDIA A100 Tensor Core GPU" data sheet: 312 TFLOPS BF16; 40 GB at 1,555 GB/s, 80 GB (SXM) at 2,039 GB/s
  h100  "NVIDIA H100 Tensor Core GPU" data sheet, SXM5: 1,979 TFLOPS BF16 with sparsity; 80 GB at 3.35 TB/s
  h200  "NVIDIA H200 Tensor Core GPU" data sheet, SXM: 1,979 TFLOPS BF16 with sparsity; 141 GB at 4.8 TB/s
  b200  "NVIDIA DGX B200" data sheet, an eighth of the system: 4.5 PFLOPS BF16 with sparsity; 180 GB at 8 TB/s
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of accelerator."""

    name: str
    peak_flops: float  # dense bf16 with fp32 accumulation, FLOP/s
    memory_bytes: int  # as sold, in decimal gigabytes; what a program may use differs by a few per cent
    memory_bandwidth: float  # bytes/s


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target(name="a100-40gb", peak_flops=312e12, memory_bytes=40 * 10**9, memory_bandwidth=1.555e12),
        Target(name="a100-80gb", peak_flops=312e12, memory_bytes=80 * 10**9, memory_bandwidth=2.039e12),
        Target(name="h100", peak_flops=989.5e12, memory_bytes=80 * 10**9, memory_bandwidth=3.35e12),
        Target(name="h200", peak_flops=989.5e12, memory_bytes=141 * 10**9, memory_bandwidth=4.8e12),
        Target(name="b200", peak_flops=2250e12, memory_bytes=180 * 10**9, memory_bandwidth=8e12),
    )
}

# Slower boards and slices that carry a table entry's name: no figure is better than a wrong one.
_OTHERS = re.compile(r"\b(NVL|MIG|H\d00 PCIe)\b", re.IGNORECASE)


def find_target(device_kind: str) -> Target | None:
    """The table's entry for a `jax.Device.device_kind`, such as "NVIDIA H100 80GB HBM3"; None if it has none."""
    if _OTHERS.search(device_kind):
        return None
    words = set(re.split(r"[^a-z0-9]+", device_kind.lower()))  # whole words: GH200 is no H200
    for name, target in TARGETS.items():
        if set(name.split("-")) <= words:
            return target
    return None


def peak_flops(device_kind: str) -> float | None:
    """Dense bf16 FLOP/s of a `jax.Device.device_kind`; None for CPUs and whatever is not in the table."""
    target = find_target(device_kind)
    return None if target is None else target.peak_flops
