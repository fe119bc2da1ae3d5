"""From a compiled step to seconds and bytes: a roofline of its schedule.

Every instruction takes the longer of its arithmetic and its traffic to memory; a collective runs on the network from
its start, one after the other, and delays the instruction that waits for it by what is left of it then. Asynchronous
copies take their turn among the kernels: a large product leaves no core for them. How fast kernels and copies are, is
in `planning.rates`.

Of branches that depend on the data, the shortest counts, and the range reaches up to the longest.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

from visionfm_jax.parallel.hlo import Attention, Collective, Computation, Instruction, Module
from visionfm_jax.parallel.targets import MEMORY_FRACTION, Cluster
from visionfm_jax.planning.calibration import ATTENTION, ELSE, MATMULS, WAITS, Calibration, calibration_of
from visionfm_jax.planning.compiled import GPU, CompiledStep
from visionfm_jax.planning.rates import KERNEL, LATENCY, NETWORK, arithmetic_seconds, memory_rate


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
    calibration: Calibration
    memory: dict[str, int]  # bytes by kind; they add up to the peak
    collectives: list[CollectiveTime]
    executed_flops: float
    traffic_by_kind: dict[str, float]  # bytes to and from device memory by matmuls, attention and all else
    modelled: dict[str, float]  # seconds by kind, before they are calibrated
    longest_branches: float  # seconds more, were every branch the longest

    @property
    def traffic(self) -> float:
        """Bytes to and from device memory."""
        return sum(self.traffic_by_kind.values())

    @property
    def seconds_by_kind(self) -> dict[str, float]:
        """Of matmuls, of attention, of all else (bound by memory), and of waiting for the network."""
        return {kind: self.calibration.factors[kind] * seconds for kind, seconds in self.modelled.items()}

    @property
    def seconds(self) -> float:
        return sum(self.seconds_by_kind.values())

    @property
    def range(self) -> tuple[float, float]:
        """Seconds between which a measurement should lie."""
        factor = math.exp(2 * self.calibration.deviation(self.modelled))
        return self.seconds / factor, self.seconds * factor + self.longest_branches

    @property
    def exposed(self) -> float:
        """Seconds of waiting for the network."""
        return self.seconds_by_kind[WAITS]

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


def estimate(compiled: CompiledStep, cluster: Cluster, calibration: Calibration | None = None) -> Estimate:
    """Walk the schedule of a step that was compiled for GPUs.

    Args:
      calibration: from measurements; None: what is known of the card without any.
    """
    if compiled.platform != GPU:
        raise ValueError("a schedule for CPUs says nothing of a GPU's time")
    module = Module(compiled.hlo)
    walk = _Walk(module, cluster)
    walk.computation(module.entry, 1)
    collectives = list(walk.collectives.values())
    waits = sum(e.exposed * e.collective.count for e in collectives)
    return Estimate(
        compiled=compiled,
        cluster=cluster,
        calibration=calibration or calibration_of(cluster.target, fp8="f8e4m3" in compiled.hlo),
        memory=memory_by_kind(compiled, module),
        collectives=collectives,
        executed_flops=walk.flops,
        traffic_by_kind={kind: walk.traffic[kind] for kind in (MATMULS, ATTENTION, ELSE)},
        modelled={**{kind: walk.seconds[kind] for kind in (MATMULS, ATTENTION, ELSE)}, WAITS: waits},
        longest_branches=walk.longest_branches,
    )


def usable_bytes(cluster: Cluster) -> int:
    """Bytes of each of its GPUs that a run may use."""
    return int(cluster.target.memory_bytes * MEMORY_FRACTION)


def memory_by_kind(compiled: CompiledStep, module: Module) -> dict[str, int]:
    """Bytes of one GPU at the step's peak.

    What is held throughout follows from the ZeRO stage, activations are what the forward pass keeps for the backward
    pass, in loops and outside of them, and temporary is the rest of the compiler's peak.
    """
    kinds = {**compiled.held, "activations": module.stacked_bytes()[0] + module.kept_bytes()}
    kinds["temporary"] = max(compiled.peak - sum(kinds.values()), 0)
    return {kind: size for kind, size in kinds.items() if size}


def network_seconds(collective: Collective, cluster: Cluster) -> float:
    """One collective's time, as a ring over its group; of small ones that of the steps around the ring.

    A ring that crosses hosts has one lane per member on a host, each with a network adapter of its own; it runs at
    the speed of all adapters of a host, or at that inside hosts if this is less.
    """
    target, size = cluster.target, len(collective.group)
    hosts = len({device // cluster.per_host for device in collective.group})
    bandwidth = target.network_inside
    if hosts > 1:
        bandwidth = min(bandwidth, size / hosts * target.network_between)
    start, inside, between = LATENCY
    steps = (size - hosts) * inside + (hosts - 1) * between
    return collective.wire_bytes / (NETWORK * bandwidth) + start + steps


class _Walk:
    """Time and totals, as a schedule is walked."""

    def __init__(self, module: Module, cluster: Cluster):
        self.module, self.cluster = module, cluster
        self.collectives: dict[str, CollectiveTime] = {}
        self.flops = self.longest_branches = 0.0
        self.traffic: Counter[str] = Counter()  # bytes by kind
        self.seconds: Counter[str] = Counter()  # by kind

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
                apart = _Walk(self.module, self.cluster)
                lengths = sorted((apart.computation(called, 1), called) for called in instruction.called)
                self.longest_branches += times * (lengths[-1][0] - lengths[0][0])
                clock += self.computation(lengths[0][1], times)
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
        traffic = self.module.bytes_moved(instruction, inside)
        if not traffic:
            return 0.0
        target = self.cluster.target
        products = self.module.products(instruction, inside)
        arithmetic = sum(arithmetic_seconds(product, target) for product in products)
        seconds = max(arithmetic, traffic / memory_rate(target)) + KERNEL
        kind = ELSE
        if products:
            kind = ATTENTION if any(isinstance(product, Attention) for product in products) else MATMULS
        self.flops += times * sum(product.flops for product in products)
        self.traffic[kind] += times * traffic
        self.seconds[kind] += times * seconds
        return seconds


def _label(source: str) -> str:
    """The end of a JAX scope path, which names the layer and the operation."""
    names = [name for name in source.split(";")[0].split("/") if not name.startswith(_SCOPES)]
    return "/".join(names[-3:]) or "copies"


# Parts of a path that say how JAX got there, not what is computed.
_SCOPES = (
    "jit(", "jvp(", "transpose(", "shard_map", "while", "body", "eval_jaxpr", "checkpoint", "rematted_computation",
)  # fmt: skip
