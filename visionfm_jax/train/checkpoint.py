"""Checkpoints of a run's whole state, by Orbax: asynchronous, atomic, for any later mesh or stage."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers as managers

from visionfm_jax.config import CheckpointConfig
from visionfm_jax.errors import CheckpointError
from visionfm_jax.train.state import TrainState

SUBFOLDER = "checkpoints"


class Checkpoints:
    """The checkpoints of one run folder: FOLDER/checkpoints/STEP.

    Saving copies the state to the host and writes it in the background; a folder gets its final name when it is
    complete, so that a crash leaves whole checkpoints and, at worst, a temporary folder that the next start removes.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig, *, read_only: bool = False):
        self.folder = Path(folder).absolute() / SUBFOLDER
        self.best_metric = config.best_metric
        keep: list[managers.PreservationPolicy] = [managers.LatestN(config.keep_last)]
        if config.keep_best:
            keep.append(
                managers.BestN(
                    get_metric_fn=lambda metrics: metrics[config.best_metric],
                    n=config.keep_best,
                    keep_checkpoints_without_metrics=False,
                )
            )
        options = (
            ocp.CheckpointManagerOptions(read_only=True)
            if read_only
            else ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(keep), cleanup_tmp_directories=True
            )
        )
        with _plain_errors(f"opening {self.folder}"):
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, metrics: dict[str, float]) -> None:
        """Start to write `state`; returns when it is on the host. An error of the save before is raised here.

        Raises:
          CheckpointError: no space, no permission, …
        """
        best = {self.best_metric: metrics[self.best_metric]} if self.best_metric in metrics else None
        with _plain_errors(f"saving step {step} to {self.folder}"):
            self._manager.save(step, args=ocp.args.StandardSave(state), metrics=best, force=True)

    def wait(self) -> None:
        """Until everything is on disk.

        Raises:
          CheckpointError: it cannot be.
        """
        with _plain_errors(f"saving to {self.folder}"):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and free the threads."""
        self.wait()
        self._manager.close()

    def restore(self, shapes: TrainState, shardings: TrainState) -> TrainState:
        """The newest state, laid out by `shardings` whatever mesh or stage wrote it.

        Raises:
          CheckpointError: it is damaged, or of another model; with the differences.
        """
        step = self.latest()
        where = self.folder / str(step)
        with _plain_errors(f"reading {where}"):
            stored = self._manager.item_metadata(step)
        _refuse_other_tree(where, stored.tree, shapes)
        target = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
        older = [s for s in self._manager.all_steps() if s != step]
        remedy = f"move it away to continue from step {max(older)}" if older else "there is no older one"
        with _plain_errors(f"reading {where}, which seems damaged ({remedy})"):
            return self._manager.restore(step, args=ocp.args.StandardRestore(target))


def load_weights(folder: str | Path, shapes: Any, shardings: Any) -> Any:
    """The newest weights of another run's folder: the averaged ones where that run kept them.

    Args:
      folder: the run's, which holds `checkpoints`.
      shapes, shardings: of the parameters.

    Raises:
      CheckpointError: none there, or of another model.
    """
    source = Path(folder).absolute() / SUBFOLDER
    if not source.is_dir():
        raise CheckpointError(
            f"config.checkpoint.weights = {str(folder)!r}: has no folder {SUBFOLDER!r}; name a run folder"
        )
    with ocp.CheckpointManager(source, options=ocp.CheckpointManagerOptions(read_only=True)) as manager:
        step = manager.latest_step()
        if step is None:
            raise CheckpointError(f"{source} holds no complete checkpoint; name another run folder")
        where = source / str(step)
        with _plain_errors(f"reading {where}"):
            tree = manager.item_metadata(step).tree
        key = "params" if tree.get("ema") is None else "ema"
        _refuse_other_tree(where, {"params": tree[key]}, {"params": shapes})
        target = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)
        item = {key: target}
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        with _plain_errors(f"reading {where}, which seems damaged"):
            return manager.restore(step, args=arguments)[key]


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path to shape, with the same path for dicts, dataclasses and tuples."""

    def name(path: tuple) -> str:
        return ".".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)

    return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _refuse_other_tree(where: Path, stored: Any, expected: Any) -> None:
    """Compare paths and shapes; a partial match must never pass silently."""
    there, here = _leaves(stored), _leaves(expected)
    lines = [f"only in the checkpoint: {k} {there[k]}" for k in there if k not in here]
    lines += [f"only in this model:     {k} {here[k]}" for k in here if k not in there]
    lines += [
        f"other shape:            {k} {there[k]} there, {here[k]} here"
        for k in here
        if there.get(k, here[k]) != here[k]
    ]
    if lines:
        more = [f"… and {len(lines) - 12} more"] if len(lines) > 12 else []
        head = f"{where} belongs to another model or optimiser; use its configuration, or another config.workdir:"
        raise CheckpointError("\n  ".join([head, *itertools.islice(sorted(lines), 12), *more]))


class _plain_errors:
    """Turn what Orbax, TensorStore and the file system raise into one line; the details go to the log."""

    def __init__(self, doing: str):
        self.doing = doing

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> bool:
        if error is None or not isinstance(error, Exception) or isinstance(error, CheckpointError):
            return False
        logging.debug("checkpoint error", exc_info=error)
        text = " ".join(str(error).split())
        full = any(s in text for s in ("No space left", "File too large", "RESOURCE_EXHAUSTED", "Disk quota"))
        cause = "the disk is full; free space and start again: the checkpoints before are whole" if full else text[:300]
        raise CheckpointError(f"{self.doing}: {cause}") from error
