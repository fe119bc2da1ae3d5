"""One step of a run again: the same weights, the same samples, the same random draws, and a look into every layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from visionfm_jax.data.sources import Source
from visionfm_jax.parallel.mesh import REPLICATED, to_global
from visionfm_jax.train.layer_statistics import Layer, LayerStatistics
from visionfm_jax.train.spikes import used_record
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer

SHOWN = 12  # samples whose images are kept
PASSES = 3  # over the step: its layers, those of the next batch, the step itself


@dataclasses.dataclass(frozen=True)
class Replayed:
    """A step that was run again.

    Attributes:
      step: its number.
      metrics: as `make_step` gives them, on the host.
      gradient_norms: by tensor.
      bad_weights: tensors that were not finite before the step.
      layers: of the step's batch, in execution order.
      beside: of the next step's batch under the same weights, to compare with.
      samples: of each row of the batch `sample`, `source`, `record`, `key`, `loss`.
      suspects: rows that brought the first value that is not finite, where that is known; else those of the largest
        losses.
      images: of the suspects, of several views the first, (S, H, W, 3), uint8, before they are coloured and normalised.
    """

    step: int
    metrics: dict[str, Any]
    gradient_norms: dict[str, float]
    bad_weights: list[str]
    layers: list[Layer]
    beside: list[Layer]
    samples: list[dict[str, Any]]
    suspects: list[int]
    images: np.ndarray

    @property
    def finite(self) -> bool:
        """Whether the step changed the weights."""
        return bool(self.metrics["finite"])

    @property
    def first_bad(self) -> str:
        """Where the first value that is not finite appears, in the order of execution; empty: nowhere."""
        if self.bad_weights:
            return f"the weights before the step: {self.bad_weights[0]} ({len(self.bad_weights)} tensors)"
        if (i := _first_bad_forward(self.layers)) is not None:
            before = f"the {self.layers[i - 1]} is finite" if i else "so it comes with the data"
            return f"forward pass, {self.layers[i]}; {before}"
        if not np.isfinite(self.metrics["loss"]):
            return f"the loss; the {self.layers[-1]} is finite"
        if (i := _first_bad_backward(self.layers)) is not None:
            before = f"that of the {self.layers[i + 1]}" if i + 1 < len(self.layers) else "the loss"
            return f"backward pass, gradient of the {self.layers[i]}; {before} is finite"
        bad = [name for name, norm in self.gradient_norms.items() if not np.isfinite(norm)]
        if bad:
            return f"the gradient of the weights {bad[0]} ({len(bad)} tensors); those of all layers are finite"
        return "" if self.finite else "the gradient norm; the norm of each tensor is finite"


def run_again(
    trainer: Trainer,
    state: TrainState,
    batches: Iterator[dict],
    sources: Sequence[Source],
    step: int,
    begins: Callable[[str], object],
) -> Replayed:
    """Train from `state` up to `step`, which is then run with statistics; to be called on every host alike.

    It needs the memory of a training step, and time to compile two: the step, and its statistics.

    Args:
      trainer: of the run.
      state: of this or an earlier step; consumed.
      batches: of this host, from `state.step` on.
      sources: of the training data.
      step: at least `state.step`.
      begins: called with a name for people before each step up to it, and before each of `PASSES` passes of its own.
    """
    fields = trainer.task.batch_spec(1)
    pictures = next(name for name, spec in fields.items() if spec.dtype == np.uint8)

    def on_devices(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return to_global(trainer.mesh, {k: batch[k] for k in fields})

    for before in range(int(state.step), step):
        begins(f"step {before}, on the way to step {step}")
        state, metrics = trainer.step(state, on_devices(next(batches)))
        jax.block_until_ready(metrics)  # no more than one batch at a time: memory is that of training
    own, following = next(batches), next(batches)
    batch = on_devices(own)
    statistics = LayerStatistics(trainer)
    begins(f"layers of step {step}; compiling comes first")
    layers = statistics(state, batch, step)
    begins("layers on the next step's batch")
    beside = statistics(state, on_devices(following), step + 1)
    names = trainer.tensor_names
    whole = NamedSharding(trainer.mesh, REPLICATED)
    are_finite = jax.jit(
        lambda params: jnp.stack([jnp.isfinite(p).all() for p in jax.tree.leaves(params)]), out_shardings=whole
    )
    good = np.asarray(are_finite(state.params))
    bad_weights = [name for name, good in zip(names, good, strict=True) if not good]
    begins(f"step {step}")
    _, metrics = trainer.step(state, batch)
    metrics = jax.device_get(metrics)

    losses = metrics["losses"]
    suspects = _suspects(layers, losses)
    keep = jax.jit(lambda images: images[np.array(suspects)], out_shardings=whole)
    images = np.asarray(keep(batch[pictures]))
    return Replayed(
        step=step,
        metrics={k: float(v) for k, v in metrics.items() if np.ndim(v) == 0},
        gradient_norms=dict(zip(names, metrics["gradient_norms"].tolist(), strict=True)),
        bad_weights=bad_weights,
        layers=layers,
        beside=beside,
        samples=[
            {"sample": step * len(losses) + row, "source": source.name, "record": record, "key": source.key(record)}
            | {"loss": float(losses[row])}
            for row, (source, record) in enumerate(_all_records(trainer, own, sources))
        ],
        suspects=suspects,
        images=images if images.ndim == 4 else images[:, 0],
    )


def _first_bad_forward(layers: Sequence[Layer]) -> int | None:
    return next((i for i, layer in enumerate(layers) if layer.forward.bad), None)


def _first_bad_backward(layers: Sequence[Layer]) -> int | None:
    return next((i for i in reversed(range(len(layers))) if layers[i].backward.bad), None)


def _suspects(layers: Sequence[Layer], losses: np.ndarray) -> list[int]:
    """Rows, at most `SHOWN`: see `Replayed`."""
    in_time = [layer.forward.rows for layer in layers] + [layer.backward.rows for layer in reversed(layers)]
    bad = np.flatnonzero(~np.isfinite(losses)).tolist()
    rows = next(filter(None, in_time), ()) or (bad if len(bad) < len(losses) else ())
    return list(rows or np.argsort(-losses).tolist())[:SHOWN]


def _all_records(trainer: Trainer, batch: Mapping[str, np.ndarray], sources: Sequence[Source]) -> list:
    """The source and the record of each row of the global batch, of which this host's are in `batch`."""
    names = ("source", "record", "damaged")
    local = np.stack([batch[name].astype(np.int64) for name in names], 1).view(np.int32)  # devices have no 64 bits
    whole = jax.jit(lambda x: x, out_shardings=NamedSharding(trainer.mesh, REPLICATED))
    rows = np.asarray(whole(to_global(trainer.mesh, {"rows": local})["rows"])).view(np.int64)
    columns = dict(zip(names, rows.T, strict=True))
    return [used_record(sources, columns, row) for row in range(len(rows))]
