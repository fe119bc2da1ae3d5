"""From a compiled step to seconds and bytes: a roofline of its schedule.

Every instruction takes the longer of its arithmetic and its traffic to memory; a collective runs on the network from
its start, one after the other, and delays the instruction that waits for it by what is left of it then.
"""

from __future__ import annotations

import dataclasses
from collections import Counter

from visionfm_jax.parallel.hlo import Collective, Computation, Instruction, Module
from visionfm_jax.parallel.targets import MEMORY_FRACTION, Cluster
from visionfm_jax.planning.compiled import GPU, CompiledStep

# What programs reach of a data sheet's figures. Assumptions, to be replaced by measurements of one's own machine.
MATMULS = 0.70  # of peak FLOP/s, by large matmuls
ATTENTION = 0.50  # of peak FLOP/s, by fused attention kernels
MEMORY = 0.85  # of memory bandwidth
NETWORK = 0.80  # of network bandwidth
KERNEL = 2e-6  # seconds from one kernel to the next
LATENCY = 10e-6, 1e-6  # seconds of a collective, and more for each further device of its group

# fp32 products run as TF32, at half the rate of 16-bit ones.
RATE = {"f32": 0.5, "f64": 1 / 16, "f8e4m3fn": 2.0, "f8e5m2": 2.0}


@dataclasses.dataclass
class CollectiveTime:
    """One collective of the step and what its time costs."""

    collective: Collective
    crosses_hosts: bool
    seconds: float  # each
    exposed: float = 0.0  # of that, not beside other work; each
    beside: Counter[str] = dataclasses.field(default_factory=Counter)  # seconds by what runs meanwhile


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on one cluster. Times are seconds a step, bytes and FLOPs one GPU's."""

    compiled: CompiledStep
    cluster: Cluster
    memory: dict[str, int]  # bytes by kind; they add up to the peak
    collectives: list[CollectiveTime]
    executed_flops: float
    traffic: float  # bytes to and from device memory
    seconds: float
    matmuls: float  # seconds in matmuls and attention
    other: float  # seconds in everything else that computes, all of it bound by memory
    exposed: float  # seconds of waiting for the network

    @property
    def usable(self) -> int:
        """Bytes of the card that a run may use."""
        return usable_bytes(self.cluster)

    @property
    def fits(self) -> bool:
        return self.compiled.peak <= self.usable

    @property
    def network(self) -> float:
        """Seconds that the network is busy."""
        return sum(e.seconds * e.collective.count for e in self.collectives)

    @property
    def images_per_s(self) -> float:
        return self.compiled.batch_size / self.seconds

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs' data sheets promise in the time of a step."""
        return self.compiled.step_flops / self.seconds / (self.cluster.devices * self.cluster.target.peak_flops)

    @property
    def days(self) -> float:
        return self.seconds * self.compiled.total_steps / 86_400

    @property
    def gpu_hours(self) -> float:
        return self.days * 24 * self.cluster.devices


def estimate(compiled: CompiledStep, cluster: Cluster) -> Estimate:
    """Walk the schedule of a step that was compiled for GPUs."""
    if compiled.platform != GPU:
        raise ValueError("a schedule for CPUs says nothing of a GPU's time")
    module = Module(compiled.hlo)
    walk = _Walk(module, cluster)
    seconds = walk.computation(module.entry, 1)
    return Estimate(
        compiled=compiled,
        cluster=cluster,
        memory=memory_by_kind(compiled, module),
        collectives=list(walk.collectives.values()),
        executed_flops=walk.flops,
        traffic=walk.traffic,
        seconds=seconds,
        matmuls=walk.matmuls,
        other=walk.other,
        exposed=sum(e.exposed * e.collective.count for e in walk.collectives.values()),
    )


def usable_bytes(cluster: Cluster) -> int:
    """Bytes of each of its GPUs that a run may use."""
    return int(cluster.target.memory_bytes * MEMORY_FRACTION)


def memory_by_kind(compiled: CompiledStep, module: Module) -> dict[str, int]:
    """Bytes of one GPU at the step's peak.

    What is held throughout follows from the ZeRO stage, activations are what the compiled loops keep for their backward
    pass, and temporary is the rest of the compiler's peak.
    """
    kinds = {**compiled.held, "activations": module.stacked_bytes()[0]}
    kinds["temporary"] = max(compiled.peak - sum(kinds.values()), 0)
    return {kind: size for kind, size in kinds.items() if size}


def network_seconds(collective: Collective, cluster: Cluster) -> float:
    """One collective's time, as a ring over its group.

    A ring that crosses hosts has one lane per member on a host, each with a network adapter of its own; it runs at
    the speed of all adapters of a host, or at that inside hosts if this is less.
    """
    target, size = cluster.target, len(collective.group)
    hosts = len({device // cluster.per_host for device in collective.group})
    bandwidth = target.network_inside
    if hosts > 1:
        bandwidth = min(bandwidth, size / hosts * target.network_between)
    return collective.wire_bytes / (NETWORK * bandwidth) + LATENCY[0] + LATENCY[1] * (size - 1)


class _Walk:
    """Time and totals, as a schedule is walked."""

    def __init__(self, module: Module, cluster: Cluster):
        self.module, self.cluster = module, cluster
        self.collectives: dict[str, CollectiveTime] = {}
        self.flops = self.traffic = self.matmuls = self.other = 0.0

    def computation(self, name: str, times: int) -> float:
        """Seconds of one run of a computation that a step runs `times`; adds to the totals."""
        inside = self.module.computations[name]
        clock = network_free = 0.0
        running: dict[str, tuple[float, CollectiveTime]] = {}  # by the name of the start: when it ends
        for instruction in inside.values():
            if instruction.opcode == "while":
                clock += instruction.trips * self.computation(instruction.body, times * instruction.trips)
                continue
            if instruction.opcode == "call":
                clock += sum(self.computation(called, times) for called in instruction.called)
                continue
            if instruction.opcode == "conditional":
                clock += max(self.computation(called, times) for called in instruction.called)
                continue
            if instruction.operands and instruction.operands[0] in running and instruction.opcode.endswith("-done"):
                end, timed = running.pop(instruction.operands[0])
                timed.exposed = max(end - clock, 0.0)
                clock = max(clock, end)
                continue
            if collective := self.module.collective(instruction, inside, times):
                timed = self._collective(f"{name}/{instruction.name}", collective)
                end = max(clock, network_free) + timed.seconds
                network_free = end
                if collective.is_async:
                    running[instruction.name] = end, timed
                else:
                    timed.exposed = end - clock
                    clock = end
                continue
            seconds = self._work(instruction, inside, times)
            for _, timed in running.values():
                timed.beside[_label(instruction.source)] += seconds
            clock += seconds
        return clock

    def _collective(self, key: str, collective: Collective) -> CollectiveTime:
        hosts = {device // self.cluster.per_host for device in collective.group}
        timed = CollectiveTime(collective, len(hosts) > 1, network_seconds(collective, self.cluster))
        return self.collectives.setdefault(key, timed)

    def _work(self, instruction: Instruction, inside: Computation, times: int) -> float:
        """Seconds of one kernel; adds to the totals."""
        target = self.cluster.target
        traffic = self.module.bytes_moved(instruction, inside)
        if not traffic:
            return 0.0
        flops = self.module.flops(instruction, inside)
        reached = ATTENTION if "fmha" in instruction.attributes else MATMULS
        arithmetic = sum(n / (RATE.get(dtype, 1.0) * reached * target.peak_flops) for dtype, n in flops.items())
        seconds = max(arithmetic, traffic / (MEMORY * target.memory_bandwidth)) + KERNEL
        self.flops += times * flops.total()
        self.traffic += times * traffic
        if flops:
            self.matmuls += times * seconds
        else:
            self.other += times * seconds
        return seconds


def _label(source: str) -> str:
    """The end of a JAX scope path, which names the layer and the operation."""
    names = [name for name in source.split(";")[0].split("/") if not name.startswith(_SCOPES)]
    return "/".join(names[-3:]) or "copies"


# Parts of a path that say how JAX got there, not what is computed.
_SCOPES = (
    "jit(", "jvp(", "transpose(", "shard_map", "while", "body", "eval_jaxpr", "checkpoint", "rematted_computation",
)  # fmt: skip
