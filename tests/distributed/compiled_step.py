"""A step that XLA compiled for GPUs, and what tests ask of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterator

from visionfm_jax.parallel.hlo import Array, Collective, Module
from visionfm_jax.parallel.targets import Cluster
from visionfm_jax.planning.compiled import CompiledStep


@dataclasses.dataclass(frozen=True)
class Compiled:
    """One step on one cluster."""

    step: CompiledStep
    cluster: Cluster

    @functools.cached_property
    def module(self) -> Module:
        return Module(self.step.hlo)

    @functools.cached_property
    def collectives(self) -> list[Collective]:
        return self.module.collectives()

    @property
    def in_loops(self) -> list[Collective]:
        entry = self.module.computations[self.module.entry]
        found = (self.module.collective(*at) for at in self.module.instructions() if at[1] is not entry)
        return [c for c in found if c is not None]

    @property
    def parameters(self) -> int:
        return sum(self.step.parameters.values())

    @property
    def state_bytes(self) -> int:
        """Of weights and moments on each GPU, as the program takes them: its arguments but for the batch."""
        return self.step.arguments - self.step.state["batch"]

    @property
    def sent(self) -> float:
        """16-bit elements that a GPU sends in a step, over (N - 1)/N."""
        share = (self.cluster.devices - 1) / self.cluster.devices
        return sum(c.count * c.wire_bytes for c in self.collectives) / 2 / share

    def weights(self, kind: str) -> Counter:
        """The 16-bit matrices that travel in collectives of this kind: (sorted shape of one layer's) -> how often."""
        found: Counter = Counter()
        for c in self.collectives:
            for array in c.arrays if c.kind == kind else ():
                if array.dtype == "bf16":
                    *stack, short, long = sorted(array.shape)  # of a stack, the layers are the shortest dim
                    found[short, long] += c.count * math.prod(stack)
        return found

    def elements(self, kind: str, dtype: str) -> int:
        return sum(
            c.count * elements(a) for c in self.collectives if c.kind == kind for a in c.arrays if a.dtype == dtype
        )

    def arrays(self) -> Iterator[Array]:
        """Every array of the program, those inside fused kernels as well."""
        for computation in self.module.computations.values():
            for instruction in computation.values():
                yield from instruction.outputs


def elements(array: Array) -> int:
    return math.prod(array.shape)
