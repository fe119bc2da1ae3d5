"""Read a compiled step: what XLA scheduled, how often it runs, what it computes, moves and keeps.

The text form of an optimised, scheduled HLO module (`jax.stages.Compiled.as_text()`) is the program that a device
executes: each computation's lines stand in order of execution, loops carry their trip counts, and a collective that
runs beside other work is a pair of start and done.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
_NO_WORK = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id"}


class Array(NamedTuple):
    """Type and shape of one array."""

    dtype: str  # HLO's name: bf16, f32, u8, pred
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (int(bits[0]) if bits else 8) // 8


class Product(NamedTuple):
    """Matmuls (m, k) @ (k, n), `batch` of them in one kernel."""

    dtype: str  # of the operands
    batch: int
    m: int
    n: int
    k: int

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.n * self.k


class Attention(NamedTuple):
    """A fused attention kernel."""

    dtype: str
    batch: int  # images or windows, times heads
    queries: int
    keys: int
    dim: int  # of a head
    backward: bool

    @property
    def flops(self) -> int:
        """QKᵀ and PV; five products of the same size in the backward pass."""
        return 2 * (5 if self.backward else 2) * self.batch * self.queries * self.keys * self.dim


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    outputs: tuple[Array, ...]  # a tuple's members, flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    attributes: str  # what follows the operands
    argument: str  # the text between the parentheses: a parameter's number
    is_root: bool

    @property
    def source(self) -> str:
        """The JAX operation that it came from, as a path of scopes; empty where XLA made it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, but for the scalar ones of reductions."""
        roles = "calls|body|condition|true_computation|false_computation"
        names = re.findall(rf"\b(?:{roles})=%?([\w.\-]+)", self.attributes)
        for group in re.findall(r"\bbranch_computations=\{([^}]*)\}", self.attributes):
            names += re.findall(r"%?([\w.\-]+)", group)
        if self.opcode == "call":
            names += re.findall(r"\bto_apply=%?([\w.\-]+)", self.attributes)
        return tuple(names)

    @property
    def body(self) -> str:
        """Of a `while`: its body's name."""
        return re.search(r"\bbody=%?([\w.\-]+)", self.attributes)[1]

    @property
    def trips(self) -> int:
        """Of a `while`: how often it runs; 1 where XLA could not tell."""
        match = re.search(r'"?known_trip_count"?\s*[:=]\s*\{\s*"?n"?\s*:\s*"?(\d+)', self.attributes)
        return int(match[1]) if match else 1

    @property
    def output_bytes(self) -> int:
        return sum(a.nbytes for a in self.outputs)


class Computation(dict):
    """Instructions by name, in the order of execution."""

    @property
    def root(self) -> Instruction:
        return next(i for i in self.values() if i.is_root)

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction's name, those that read it."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.values():
            for name in dict.fromkeys(instruction.operands):
                users.setdefault(name, []).append(instruction)
        return users

    def parameter(self, number: int) -> Instruction:
        return next(i for i in self.values() if i.opcode == "parameter" and int(i.argument) == number)


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective between devices, and how often a step makes it."""

    kind: str  # of COLLECTIVES
    arrays: tuple[Array, ...]  # the whole ones: gathered by all-gather, given to reduce-scatter
    group: tuple[int, ...]  # the devices of the first group, numbered as in the mesh
    is_async: bool
    count: int  # per step, loops counted
    source: str

    @property
    def nbytes(self) -> int:
        """Bytes of the whole arrays, once."""
        return sum(a.nbytes for a in self.arrays)

    @property
    def wire_bytes(self) -> float:
        """Bytes that each device sends, once: a sum is a scatter and a gather."""
        share = (len(self.group) - 1) / len(self.group)
        if self.kind == "collective-permute":
            return float(self.nbytes)
        return self.nbytes * share * (2 if self.kind == "all-reduce" else 1)


class Module:
    """A parsed program.

    Args:
      text: of a compiled, scheduled module.
    """

    def __init__(self, text: str):
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        devices = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(devices[1]) if devices else 1
        current: Computation | None = None
        for line in text.splitlines():
            if current is None:
                if match := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
                    current = self.computations[match[2]] = Computation()
                    if match[1]:
                        self.entry = match[2]
            elif line.startswith("}"):
                current = None
            elif " = " in line:
                instruction = _instruction(line)
                current[instruction.name] = instruction
        if not self.entry:
            raise ValueError("no ENTRY computation: not the text of a compiled module")

    def instructions(self, computation: str = "", times: int = 1) -> Iterator[tuple[Instruction, Computation, int]]:
        """Everything that a step executes, in program order, loops' bodies once: (it, its computation, how often)."""
        inside = self.computations[computation or self.entry]
        for instruction in inside.values():
            if instruction.opcode == "while":
                yield instruction, inside, times
                yield from self.instructions(instruction.body, times * instruction.trips)
            elif instruction.opcode in ("call", "conditional"):
                for name in instruction.called:
                    yield from self.instructions(name, times)
            else:
                yield instruction, inside, times

    def collective(self, instruction: Instruction, inside: Computation, times: int = 1) -> Collective | None:
        """What `instruction` sends and receives; None for everything else, and for the done of a pair."""
        kind = self._work(instruction).opcode
        kind = kind.removesuffix("-start")
        if kind not in COLLECTIVES or instruction.opcode.endswith("-done"):
            return None
        if kind == "reduce-scatter":
            arrays = tuple(a for name in instruction.operands for a in inside[name].outputs)
        elif instruction.opcode.endswith("-start"):
            arrays = next(u for u in inside.users[instruction.name] if u.opcode.endswith("-done")).outputs
        else:
            arrays = instruction.outputs
        return Collective(
            kind=kind,
            arrays=arrays,
            group=_first_group(self._work(instruction).attributes + instruction.attributes, self.devices),
            is_async=instruction.opcode.endswith("-start") and '"is_sync":true' not in instruction.attributes,
            count=times,
            source=instruction.source,
        )

    def collectives(self) -> list[Collective]:
        """All collectives of a step, in program order."""
        found = (self.collective(*at) for at in self.instructions())
        return [c for c in found if c is not None]

    def _work(self, instruction: Instruction) -> Instruction:
        """Itself, or what the computation does that it starts."""
        if instruction.opcode in ("async-start", "async-done", "async-update") and instruction.called:
            return self.computations[instruction.called[0]].root
        return instruction

    def products(self, instruction: Instruction, inside: Computation) -> tuple[Product | Attention, ...]:
        """Its matmuls and attention kernels; those of a loop once."""
        if instruction.opcode == "dot":
            return (_product(instruction, inside),)
        if instruction.opcode == "custom-call":
            return _library_products(instruction, inside)
        if instruction.opcode.endswith("-done"):
            return ()
        return tuple(itertools.chain.from_iterable(map(self._computation_products, instruction.called)))

    @functools.cache  # noqa: B019 - lives as long as the module
    def _computation_products(self, name: str) -> tuple[Product | Attention, ...]:
        inside = self.computations[name]
        return tuple(itertools.chain.from_iterable(self.products(i, inside) for i in inside.values()))

    def flops(self, instruction: Instruction, inside: Computation) -> Counter[str]:
        """FLOPs of its matmuls and attention kernels, by the operands' dtype; loops once."""
        counts: Counter[str] = Counter()
        for product in self.products(instruction, inside):
            counts[product.dtype] += product.flops
        return counts

    def bytes_moved(self, instruction: Instruction, inside: Computation) -> int:
        """Bytes that it reads and writes in device memory: of a stack of layers' arrays, one layer's."""
        work = self._work(instruction)
        if work.opcode in _NO_WORK or instruction.opcode.endswith("-done"):
            return 0
        operands = [inside[name] for name in instruction.operands if name in inside]
        read = [o.output_bytes for o in operands]
        written = instruction.output_bytes
        if work.opcode == "custom-call":  # all but its workspace
            written = sum(a.nbytes for a in instruction.outputs if a.dtype not in ("s8", "u8"))
        if instruction.opcode.endswith("-start"):  # gives its operands along with its results
            written = sum(u.output_bytes for u in inside.users.get(instruction.name, ()) if u.opcode.endswith("-done"))
        body = None
        if work.opcode in ("fusion", "fusion-start") and work.called:
            body = self.computations[work.called[0]]
        if body is not None:
            read = [self._parameter_bytes(body, n, full) for n, full in enumerate(read)]
            written = self._result_bytes(body)
        elif work.opcode in ("slice", "dynamic-slice"):
            read = [written]
        elif work.opcode == "dynamic-update-slice":
            read, written = [], 2 * operands[1].output_bytes
        return sum(read) + written

    def _parameter_bytes(self, body: Computation, number: int, full: int) -> int:
        """What a fused computation reads of its operand `number`."""
        names, slices = [body.parameter(number).name], 0
        for name in names:
            for user in body.users.get(name, ()):
                if user.opcode == "bitcast":
                    names.append(user.name)
                elif user.opcode in ("slice", "dynamic-slice") and user.operands[0] == name:
                    slices += user.output_bytes
                elif not (user.opcode == "dynamic-update-slice" and user.operands[0] == name):
                    return full
        return min(slices, full)

    def _result_bytes(self, body: Computation) -> int:
        """What a fused computation writes: of an array that it updates in place, the update."""
        root = body.root
        total = 0
        for name in root.operands if root.opcode == "tuple" else (root.name,):
            result = body[name]
            while result.opcode == "bitcast":
                result = body[result.operands[0]]
            if result.opcode == "dynamic-update-slice":
                total += body[result.operands[1]].output_bytes
            else:
                total += result.output_bytes
        return total

    def stacked_bytes(self) -> tuple[int, int]:
        """Bytes of arrays that loops over layers write, a slice an iteration: (in forward loops, in backward loops).

        Those of the forward pass are the activations kept for the backward pass, those of the backward pass the
        gradients of scanned parameters.
        """
        kept = [0, 0]
        for instruction, _, _ in self.instructions():
            if instruction.opcode != "while":
                continue
            body = self.computations[instruction.body]
            backward = any("transpose(" in i.source for i in body.values())
            members = [body[name] for name in body.root.operands]
            for array, member in zip(instruction.outputs, members, strict=True):
                if self._is_updated_in_place(member, body):
                    kept[backward] += array.nbytes
        return kept[0], kept[1]

    def kept_bytes(self) -> int:
        """Bytes of arrays that the forward pass makes and the backward pass of the same computation reads.

        That is, not of layers in a loop, whose activations are `stacked_bytes`; a loop over micro-batches has both.
        """
        kept = {}
        for reader, inside, _ in self.instructions():
            if "transpose(" not in reader.source:
                continue
            for made, index in (_made_by(inside, name) for name in reader.operands):
                backward = "transpose(" in made.source or made.opcode in ("while", "parameter")
                if "jvp(" in made.source and not backward:
                    kept[made.name, index] = made.outputs[index].nbytes
        return sum(kept.values())

    def _is_updated_in_place(self, member: Instruction, body: Computation) -> bool:
        index = 0
        while member.opcode in ("get-tuple-element", "bitcast", "copy") or member.opcode.endswith("-done"):
            if member.opcode == "get-tuple-element":
                index = int(re.search(r"\bindex=(\d+)", member.attributes)[1])
            member = body[member.operands[0]]
        if member.opcode in ("fusion", "fusion-start"):
            called = self.computations[member.called[0]]
            root = called.root
            if root.opcode == "tuple":
                root = called[root.operands[index]]
            while root.opcode == "bitcast":
                root = called[root.operands[0]]
            return root.opcode == "dynamic-update-slice"
        return member.opcode == "dynamic-update-slice"


def _made_by(inside: Computation, name: str) -> tuple[Instruction, int]:
    """The instruction that an array comes from by other names alone, and which of its outputs it is."""
    instruction, index = inside[name], 0
    while instruction.opcode in ("bitcast", "get-tuple-element"):
        if instruction.opcode == "get-tuple-element":
            index = int(re.search(r"\bindex=(\d+)", instruction.attributes)[1])
        instruction = inside[instruction.operands[0]]
    return instruction, min(index, len(instruction.outputs) - 1)


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    end = _closing(right, 0) if right.startswith("(") else right.index(" ") - 1
    outputs = _arrays(right[: end + 1])
    opening = right.index("(", end + 1)
    opcode = right[end + 1 : opening].strip()
    closing = _closing(right, opening)
    argument = right[opening + 1 : closing]
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode,
        outputs=outputs,
        operands=() if opcode in ("constant", "parameter") else tuple(re.findall(r"%([\w.\-]+)", argument)),
        attributes=right[closing + 1 :],
        argument=argument,
        is_root=left.startswith("ROOT "),
    )


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` closes."""
    depth = 0
    for match in re.finditer(r"[()]", text[start:]):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return start + match.start()
    raise ValueError(f"unbalanced parentheses in {text[:80]!r}")


@functools.lru_cache(4096)
def _arrays(text: str) -> tuple[Array, ...]:
    found = re.findall(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]", text)
    return tuple(Array(t, tuple(map(int, filter(None, dims.split(","))))) for t, dims in found if t != "token")


def _product(dot: Instruction, inside: Computation) -> Product:
    """Of a dot, or of the text of one in a library call's configuration."""
    lhs, rhs = (inside[name].outputs[0] for name in dot.operands[:2])
    contracted, batched = _dims(dot, "contracting", lhs), _dims(dot, "batch", lhs)
    k, batch = math.prod(contracted), math.prod(batched)
    return Product(lhs.dtype, batch, math.prod(lhs.shape) // (k * batch), math.prod(rhs.shape) // (k * batch), k)


def _dims(dot: Instruction, kind: str, lhs: Array) -> list[int]:
    """Sizes of the left operand's contracting or batch dims, in either of HLO's notations."""
    found = re.search(rf'lhs_{kind}_dim(?:s=\{{|ensions":\[)([^\]}}]*)', dot.attributes)
    return [lhs.shape[int(d)] for d in re.findall(r"\d+", found[1])] if found else []


def _library_products(call: Instruction, inside: Computation) -> tuple[Product | Attention, ...]:
    """Those of a library call: cuBLAS products and cuDNN attention; none of others."""
    found = re.search(r'custom_call_target="([^"]*)"', call.attributes)
    target = found[1] if found else ""
    if "gemm" in target or "matmul" in target:
        return (_product(call, inside),)
    if target.startswith("__cudnn$fmha"):  # q, k (B, T, N, K)
        q, k = (inside[name].outputs[0] for name in call.operands[:2])
        batch, queries, heads, dim = q.shape
        return (Attention(q.dtype, batch * heads, queries, k.shape[1], dim, "Backward" in target),)
    return ()


def _first_group(attributes: str, devices: int) -> tuple[int, ...]:
    """The devices of the first replica group, in whichever of HLO's notations."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", attributes):
        axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        over = re.findall(r"'([^']+)'", match[2])
        ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
        index = tuple(slice(None) if name in over else 0 for name in axes)
        return tuple(ids[index].ravel().tolist())
    if match := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        ids = np.arange(int(match[1]) * int(match[2])).reshape([int(n) for n in match[3].split(",")])
        ids = ids.transpose([int(n) for n in match[4].split(",")]) if match[4] else ids
        return tuple(ids.reshape(int(match[1]), int(match[2]))[0].tolist())
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(int(n) for n in match[1].split(","))
    return tuple(range(devices))
