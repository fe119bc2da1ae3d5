"""Where the weights of a run come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from visionfm_jax.config import CheckpointConfig, Config
from visionfm_jax.errors import CheckpointError, ConfigError
from visionfm_jax.parallel.agreement import from_first
from visionfm_jax.train.checkpoint import SUBFOLDER, Checkpoints, Restored
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer


def starting_state(trainer: Trainer, checkpoints: Checkpoints) -> tuple[TrainState, dict[str, Any], str]:
    """The first that there is: own run folder, `resume`, `weights`, scratch; its record; and its name for people.

    Raises:
      CheckpointError: it is named or there, but cannot be used.
    """
    config = trainer.config.checkpoint
    if checkpoints.latest() is not None:
        own = checkpoints.restore(trainer.shapes, trainer.shardings)
        return own.what, own.record, origin_of(own, f"step {own.step} of its own folder")
    if config.resume:
        with other_run(config, config.resume, "checkpoint.resume") as other:
            found = other.restore(trainer.shapes, trainer.shardings)
        if found.step >= (total := trainer.config.total_steps):
            raise ConfigError(
                f"config.checkpoint.resume = {config.resume!r}: is at step {found.step}, and config.train sets {total} "
                "steps; set more, or evaluate it by --mode=evaluate"
            )
        return found.what, found.record, origin_of(found, f"step {found.step} of {config.resume}")
    state = trainer.init()
    if config.weights:
        with other_run(config, config.weights, "checkpoint.weights") as other:
            found = other.restore_weights(trainer.shapes.params, trainer.shardings.params)
        ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, found.what)
        origin = origin_of(found, f"the weights of {config.weights}")
        return state.replace(params=found.what, ema=ema), {}, origin
    return state, {}, f"scratch, seed {trainer.config.seed}"


def origin_of(found: Restored, name: str) -> str:
    """`name` for people, with what they should know of the checkpoint."""
    return "\n                   ".join([name, *found.notes])


def other_run(config: CheckpointConfig, folder: str, field: str) -> Checkpoints:
    """The checkpoints of the run in `folder`, which `config.FIELD` names.

    Raises:
      ConfigError: there is no such folder.
      CheckpointError: there are none.
    """
    if not Path(folder).exists():
        raise ConfigError(f"config.{field} = {folder!r}: there is no such folder; name that of a run")
    if (other := saved_run(config, folder)) is not None:
        return other
    raise CheckpointError(f"config.{field} = {folder!r}: holds no complete checkpoint; name the folder of another run")


def saved_run(config: CheckpointConfig, folder: str) -> Checkpoints | None:
    """The checkpoints in a run folder, to be read; None: it has none. Process 0 looks for all."""
    if from_first(lambda: Path(folder, SUBFOLDER).is_dir()):
        found = Checkpoints(folder, config, read_only=True)
        if found.latest() is not None:
            return found
        found.close()
    return None


def run_to_evaluate(config: Config) -> tuple[str, Checkpoints]:
    """The run folder and its checkpoints; where it has none, those that `config.checkpoint.weights` names.

    Raises:
      ConfigError, CheckpointError: as `other_run`.
    """
    if (own := saved_run(config.checkpoint, config.folder)) is not None:
        return config.folder, own
    if weights := config.checkpoint.weights:
        return weights, other_run(config.checkpoint, weights, "checkpoint.weights")
    return config.folder, other_run(config.checkpoint, config.folder, "workdir")
