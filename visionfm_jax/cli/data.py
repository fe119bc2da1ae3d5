"""The training data of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np

from visionfm_jax import machine
from visionfm_jax.config import Config
from visionfm_jax.data.batches import Loader
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.fields import Fields, check_classes, class_names
from visionfm_jax.data.loader import check_pair_ratio, train_loader
from visionfm_jax.data.sources import Source, open_sources
from visionfm_jax.errors import ConfigError, DataError, count
from visionfm_jax.parallel.agreement import from_each, require_same
from visionfm_jax.parallel.targets import peak_flops
from visionfm_jax.tasks.task import Task
from visionfm_jax.train.step import Trainer


def open_data(config: Config, task: Task) -> tuple[list[Source], Fields]:
    """The sources of `config.data.train`, and what is read of their records for `task`.

    Raises:
      ConfigError: batches will not have the arrays that the task learns from.
      DataError: they cannot be opened, lack what the task learns from, or are not of the size that the schedule counts
        on.
      StorageError: another process sees other data.
    """
    sources = open_sources(config.data.train, "data.train")
    fields = config.task.fields(config)
    _check_rows(config, fields, task)
    for source in sources:
        fields.check(source)
    if "label" in fields.spec:
        for i, source in enumerate(sources):
            check_classes(f"config.data.train[{i}]", source, class_names(sources))
    check_pair_ratio(sources, config.task.pair_ratio)
    require_same([[len(source), list(source.class_names or ())] for source in sources], "data.train")
    records = sum(map(len, sources))
    if len(sources) == 1 and config.train.epochs and records != config.data.num_examples:
        raise DataError(
            f"{sources[0].name} has {count(records, 'record')}; set config.data.num_examples={records}, or, to "
            "continue a run, put back the data that it began with"
        )
    return sources, fields


def _check_rows(config: Config, fields: Fields, task: Task) -> None:
    made = {**Chain(config.data.transforms, config.model.image_size).spec, **fields.spec}
    made = {name: f"{name} {np.dtype(dtype).name} {shape}" for name, (shape, dtype) in made.items()}
    wanted = {name: f"{name} {x.dtype.name} {x.shape[1:]}" for name, x in task.batch_spec(1).items()}
    if lacking := [what for name, what in wanted.items() if made.get(name) != what]:
        raise ConfigError(
            f"config.data.transforms = {[type(t).__name__ for t in config.data.transforms]}: a sample is "
            f"{', '.join(made.values())}, and {type(config.task).__name__} learns from {', '.join(lacking)}; set "
            "transforms that make it, or another task"
        )


def open_loader(trainer: Trainer, sources: Sequence[Source], fields: Fields, start_step: int) -> Loader:
    """This process's batches from step `start_step` on."""
    config = trainer.config
    return train_loader(
        config.data, image_size=config.model.image_size, batch_size=config.train.batch_size, seed=config.seed,
        start_step=start_step, host=jax.process_index(), hosts=jax.process_count(), sources=sources, fields=fields,
        pair_ratio=config.task.pair_ratio, demand=demand_of(trainer),
        room=machine.room(from_each(machine.place()), jax.process_index()),
    )  # fmt: skip


def demand_of(trainer: Trainer) -> float:
    """Images/s of this process that its step takes at most, by the peak of the card, which no step reaches.

    0 on CPUs, whose cores the step needs itself; infinite on an accelerator whose peak is not known.
    """
    device = trainer.mesh.devices.flat[0]
    if device.platform == "cpu":
        return 0.0
    seconds = trainer.task.step_flops / trainer.mesh.size / (peak_flops(device.device_kind) or math.inf)
    return trainer.config.train.batch_size / jax.process_count() / seconds if seconds else math.inf
