"""Statistics of every layer on one batch, forwards and backwards, in the order in which they run.

No network is named. Flax lets a function stand between a module and its caller (`nn.intercept_methods`); here it is one
that passes inputs and outputs through a probe: an identity with a second argument, of zeros, whose *gradient* is
defined as the statistics of what passed, and of the gradient that came back. So the numbers leave scans, rematerialised
blocks, micro-batches and devices as any gradient does. The zeros lie among the parameters of the module they belong to,
where a scan over layers hands each layer its own.

Shapes: D devices, A micro-batches of each, b rows of one, L layers of a scanned stack.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding

from visionfm_jax.parallel.accumulate import GradCache, to_micro_batches, with_grad_cache
from visionfm_jax.parallel.context import Context
from visionfm_jax.parallel.mesh import REPLICATED
from visionfm_jax.parallel.zero import SCANNED
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer, context_of, loss_of, with_keys

PROBE = "statistics"  # beside a module's parameters
INPUT, OUTPUT = "input of", "output of"
SIDES = (INPUT, OUTPUT)


class Statistics(NamedTuple):
    """Statistics of a layer's input, output, or the gradient of either: over all devices' rows."""

    rms: float  # of the finite values
    largest: float  # absolute value among them
    bad: int  # values that are not finite
    rows: tuple[
        int, ...
    ]  # of the global batch, that hold such a value: the first of each micro-batch, where it is known


@dataclasses.dataclass(frozen=True)
class Layer:
    """One side of one layer."""

    name: str  # as its parameters', "blocks[3].attn.out"; empty: the whole network
    side: str  # INPUT or OUTPUT
    forward: Statistics
    backward: Statistics  # of the gradient; in fp16 multiplied by the loss scale

    def __str__(self) -> str:
        return f"{self.side} {self.name or 'the network'}"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Probe:
    """The zeros of a module, and the name that the module, inside a scanned block, does not know."""

    zeros: jax.Array  # ([L,] 2 sides, 2 directions, numbers)
    name: str = dataclasses.field(metadata={"static": True})


# Squares are taken in units of this share of the largest value: no number overflows, and no reciprocal that a compiler
# may divide by is too small to be a normal one.
UNIT, TINY = 2.0**-30, float(np.finfo(np.float32).tiny)
NUMBERS = ("ran", "mean_square", "largest", "bad", "row")


def _numbers(leaves: list[jax.Array], rows: int) -> jax.Array:
    """The NUMBERS of some arrays, the mean square in squared units of `UNIT` of the largest value.

    `row` is that of the first bad value, -1: there is none, or the arrays have not one row each.
    """
    leaves = [x.astype(jnp.float32) for x in leaves]
    finite = [jnp.isfinite(x) for x in leaves]
    largest = jnp.stack([jnp.abs(jnp.where(f, x, 0)).max() for x, f in zip(leaves, finite, strict=True)]).max()
    unit = jnp.maximum(largest * UNIT, TINY)
    squares = sum(jnp.sum(jnp.where(f, x / unit, 0) ** 2) for x, f in zip(leaves, finite, strict=True))
    good = sum(jnp.sum(f, dtype=jnp.float32) for f in finite)
    row = jnp.float32(-1)
    for f in finite:
        if f.ndim > 1 and len(f) == rows:
            bad = ~f.reshape(rows, -1).all(1)
            row = jnp.where((row < 0) & bad.any(), jnp.argmax(bad).astype(jnp.float32), row)
    bad = sum(x.size for x in leaves) - good
    return jnp.stack([jnp.float32(1), squares / jnp.maximum(good, 1), largest, bad, row])


def _probe(leaves: list[jax.Array], zeros: jax.Array, rows: int) -> list[jax.Array]:
    """`leaves`; the gradient of `zeros` (2, numbers) is the statistics of the leaves, and of their gradients."""

    @jax.custom_vjp
    def through(leaves: list[jax.Array], zeros: jax.Array) -> list[jax.Array]:
        return leaves

    def forward(leaves: list[jax.Array], zeros: jax.Array) -> tuple[list[jax.Array], jax.Array]:
        return leaves, _numbers(leaves, rows)

    def backward(seen: jax.Array, gradients: list[jax.Array]) -> tuple[list[jax.Array], jax.Array]:
        return gradients, jnp.stack([seen, _numbers(gradients, rows)])

    through.defvjp(forward, backward)
    return through(leaves, zeros)


class LayerStatistics:
    """(state, batch, step) -> the `Layer`s of that batch under the state's weights, in execution order.

    It runs the passes of a training step, with its stage, micro-batches, rematerialisation and loss scale, but for the
    gradients of the weights: memory is that of a step. Of a layer that runs more than once, the first time counts.
    """

    def __init__(self, trainer: Trainer):
        self._trainer = trainer
        self._order: list[tuple[str, str]] = []  # names and sides, as the trace met them
        self._compiled = jax.jit(self._run, out_shardings=NamedSharding(trainer.mesh, REPLICATED))

    def __call__(self, state: TrainState, batch: dict, step: int) -> list[Layer]:
        """`step`: whose random draws the batch gets."""
        state = state.replace(step=np.int32(step), opt_state=())
        probes = jax.device_get(self._compiled(state, batch))
        values = {p.name: p.zeros for p in jax.tree.leaves(probes, is_leaf=_is_probe)}
        rows = self._trainer.config.train.batch_size // (
            self._trainer.mesh.size * self._trainer.config.train.accumulate
        )
        layers = []
        for scanned, met in itertools.groupby(self._order, lambda entry: _stack_of(entry[0])):
            met = list(met)
            for i in range(values[met[0][0]].shape[1] if scanned else 1):
                for name, side in met:
                    numbers = values[name][:, i] if scanned else values[name]
                    numbers = numbers[:, SIDES.index(side)]
                    if numbers[0, 0, 0]:  # nothing passes back where the loss does not depend on it
                        both = (_over_micro_batches(numbers[:, direction], rows) for direction in (0, 1))
                        layers.append(Layer(_layer_name(name, i), side, *both))
        return layers

    def _run(self, state: TrainState, batch: dict) -> Any:
        config, zero, task = self._trainer.config, self._trainer.zero, self._trainer.task
        loss, n = loss_of(config, task), config.train.accumulate
        scale = state.loss_scale.scale if state.loss_scale else None
        probes = _probes(self._trainer.shapes.params)
        parts = zero.mesh.size * n
        batch = with_keys(config, zero.mesh, state.step, batch)
        context = context_of(config, task, zero, state, batch)
        # As in `Zero.loss_and_grads`.
        batch["scale"] = jnp.full(zero.mesh.size, 1.0 if scale is None else scale / parts)

        def local(params: Any, batch: dict, context: Context) -> Any:
            scale, row_loss = batch.pop("scale")[0], loss
            if isinstance(loss, GradCache):
                batch, row_loss, _ = with_grad_cache(loss, params, batch, n, context)

            def micro(rows: dict) -> Any:
                def scaled(probes: Any) -> jax.Array:
                    self._order.clear()
                    with nn.intercept_methods(self._interceptor(len(rows["key"]))):
                        return row_loss(_join(params, probes), rows, context)[0] * scale

                return jax.grad(scaled)(probes)

            return jax.lax.map(micro, to_micro_batches(batch, n))

        return zero.apply(local, state.params, batch, context)

    def _interceptor(self, rows: int) -> Callable:
        seen: set[tuple[str, str | None]] = set()

        def between(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            module = context.module
            probe = module.get_variable("params", PROBE) if context.method_name == "__call__" else None
            if probe is None or (key := (probe.name, _root(module).name)) in seen:
                return call(*args, **kwargs)
            seen.add(key)
            args, kwargs = self._through(probe, INPUT, (args, kwargs), rows)
            return self._through(probe, OUTPUT, call(*args, **kwargs), rows)

        return between

    def _through(self, probe: _Probe, side: str, values: Any, rows: int) -> Any:
        """The same values, of which the arrays of floating numbers have passed the probe."""
        leaves, tree = jax.tree.flatten(values)
        arrays = [(i, x) for i, x in enumerate(leaves) if isinstance(x, jax.Array) and x.size]
        at = [i for i, x in arrays if jnp.issubdtype(x.dtype, jnp.floating)]
        if at:
            if (probe.name, side) not in self._order:  # which holds a stack's blocks once
                self._order.append((probe.name, side))
            passed = _probe([leaves[i] for i in at], probe.zeros[SIDES.index(side)], rows)
            for i, x in zip(at, passed, strict=True):
                leaves[i] = x
        return jax.tree.unflatten(tree, leaves)


def _root(module: nn.Module) -> nn.Module:
    """The module that was applied; inside a scanned block, that block: it has a name if its loop takes several."""
    while isinstance(module.parent, nn.Module):
        module = module.parent
    return module


def _is_probe(x: Any) -> bool:
    return isinstance(x, _Probe)


def _probes(params: dict, path: tuple[str, ...] = ()) -> dict:
    """A probe for every module, which is every dict, of these (shapes of) parameters."""
    layers = (jax.tree.leaves(params)[0].shape[0],) if SCANNED in path else ()
    zeros = jnp.zeros((*layers, len(SIDES), 2, len(NUMBERS)))
    below = {k: _probes(v, (*path, k)) for k, v in params.items() if isinstance(v, dict)}
    return {PROBE: _Probe(zeros, ".".join(path)), **below}


def _join(params: dict, probes: dict) -> dict:
    return params | {k: p if _is_probe(p) else _join(params[k], p) for k, p in probes.items()}


def _stack_of(name: str) -> str:
    """The scanned stack that a layer belongs to: "stage0.blocks"; empty: none."""
    before, found, _ = f".{name}.".partition(f".{SCANNED}.")
    return f"{before}.{SCANNED}".strip(".") if found else ""


def _layer_name(name: str, i: int) -> str:
    """With the layer's number in its stack."""
    stack = _stack_of(name)
    return f"{stack}[{i}]{name.removeprefix(stack)}" if stack else name


def _over_micro_batches(numbers: np.ndarray, rows: int) -> Statistics:
    """One for all of (D A, numbers), of b rows each."""
    _, square, largest, bad, row = numbers.T.astype(np.float64)
    rms = np.sqrt(np.mean(square * np.maximum(largest * UNIT, TINY) ** 2))
    first = [int(i * rows + r) for i, r in enumerate(row) if r >= 0]
    return Statistics(float(rms), float(largest.max()), round(bad.sum()), tuple(first))
