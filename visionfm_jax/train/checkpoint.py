"""Checkpoints of a run's whole state, by Orbax: asynchronous, atomic, for any later mesh or stage."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as managers

from visionfm_jax import storage
from visionfm_jax.config import CheckpointConfig
from visionfm_jax.errors import CheckpointError, StorageError, UserError, one_line
from visionfm_jax.logs import without_orbax
from visionfm_jax.optim import loss_scale
from visionfm_jax.parallel import agreement
from visionfm_jax.storage import seal, unseal
from visionfm_jax.train.checksum import checksums, name_of
from visionfm_jax.train.state import TrainState

SUBFOLDER = "checkpoints"
ITEM = "default"  # Orbax's name of the state, in the folder of a step
SCORES = "scores.json"  # of the evals, in the folder of their step


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read, or holds other values than were saved."""


@dataclasses.dataclass(frozen=True)
class Restored:
    """A state, or its weights alone, from a checkpoint.

    Attributes:
      step: of the checkpoint.
      what: the state, or the weights alone.
      record: what was saved beside the state.
      notes: for people: damaged steps that were passed over, and whether this one could not be verified.
    """

    step: int
    what: Any
    record: dict[str, Any]
    notes: list[str]


class Checkpoints:
    """The checkpoints of one run folder: FOLDER/checkpoints/STEP.

    Saving copies the state to the host and writes it in the background; a folder gets its final name when it is
    complete, so that a crash leaves whole checkpoints and, at worst, a temporary folder that the next start removes.
    """

    def __init__(
        self, folder: str | Path, config: CheckpointConfig, *, read_only: bool = False, until: int | None = None
    ):
        """`until`: later steps do not count."""
        self.folder, self._until = Path(folder).absolute() / SUBFOLDER, until
        self._config, self._read_only = config, read_only
        with _plain_errors(f"opening {self.folder}"):
            more: dict[str, Any] = {"read_only": True, "create": False, "save_interval_steps": 0}
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)  # Orbax would notice only at the first save
                self._keep = _Keep(config, self.folder)
                more = {"preservation_policy": self._keep, "cleanup_tmp_directories": True}
            # The first process lists the steps for all.
            options = ocp.CheckpointManagerOptions(single_host_load_and_broadcast=True, **more)
            self._arrays = ocp.PyTreeCheckpointHandler()
            self._open = lambda: ocp.CheckpointManager(self.folder, options=options, item_handlers=self._arrays)
            with without_orbax() if read_only else contextlib.nullcontext():  # it warns that the folder is read only
                self._manager = self._open()
        self._failures = 0  # in a row

    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return next(iter(self._steps()), None)

    def _steps(self) -> list[int]:
        """Of the complete checkpoints that count, newest first."""
        steps = map(int, self._manager.all_steps())  # of several processes they are NumPy's
        return sorted((s for s in steps if self._until is None or s <= self._until), reverse=True)

    def save(self, step: int, state: TrainState, record: dict[str, Any]) -> None:
        """Start to write `state`; returns when it is on the host. An error of the save before is raised here.

        Args:
          record: what else continues with the state; JSON.

        Raises:
          CheckpointError, StorageError: as `failed`.
        """
        sealed = seal({**record, "checksums": checksums(vars(state))})
        while True:
            try:
                with _plain_errors(f"saving step {step} to {self.folder}"):
                    self._manager.save(
                        step, args=ocp.args.PyTreeSave(state), custom_metadata={"record": sealed}, force=True
                    )
                return
            except StorageError as error:
                self._pause(error)

    def failed(self, *, wait: bool = False) -> bool:
        """Whether the last save has failed in the background so that the state shall be saved again; costs nothing.

        Args:
          wait: until everything is on disk.

        Raises:
          CheckpointError: it has failed for good: no space, no permission, …
          StorageError: it has failed too often.
        """
        try:
            with _plain_errors(f"saving to {self.folder}"):
                if wait:
                    self._manager.wait_until_finished()
                else:
                    self._manager.check_for_errors()
        except StorageError as error:
            self._pause(error)
            return True
        if wait or not self._manager.is_saving_in_progress():
            self._failures = 0
        return False

    def _pause(self, error: StorageError) -> None:
        """Before another try, or no more: `error`. Several processes would have to try together, in a new start."""
        if self._failures == len(storage.WAITS) or jax.process_count() > 1:
            raise error
        wait = storage.WAITS[self._failures]
        self._failures += 1
        storage.announce(str(error), wait)
        time.sleep(wait)
        with contextlib.suppress(Exception):  # the same error again
            self._manager.close()
        with _plain_errors(f"opening {self.folder}"):
            self._manager = self._open()  # without the half-written step

    def record(self, step: int) -> dict[str, Any]:
        """What was saved with the state of `step`; {} by an older version.

        Raises:
          CheckpointError: it is damaged.
        """
        with self._reading(step):
            kept = self._manager.metadata(step)
            if kept.commit_timestamp_nsecs is None:  # which versions without a record left, too
                raise ValueError("the file of its record is missing or empty")
            sealed = (kept.custom_metadata or {}).get("record")
            return unseal(sealed) if sealed else {}

    def attach(self, step: int, scores: dict[str, float], protocols: dict[str, str]) -> None:
        """Keep the scores of the evals with the state of `step`, which is on disk, and the best states as they say.

        Args:
          protocols: by which each eval measured.

        Raises:
          CheckpointError, OutputError: no space, ….
          StorageError: as `failed`.
        """
        scores = agreement.from_first(lambda: {k: float(v) for k, v in scores.items()})
        self._keep.scores[step] = scores
        if jax.process_index() == 0:
            kept = {"scores": scores, "protocols": protocols}
            path = self.folder / str(step) / SCORES
            storage.write(lambda: storage.write_text(path, seal(kept) + "\n"), path)
        while True:
            try:
                with _plain_errors(f"removing checkpoints of {self.folder}"):
                    steps = self._manager.all_steps()
                    for old in set(steps) - self._keep.of(steps):
                        self._manager.delete(old)
                return
            except StorageError as error:
                self._pause(error)

    def scores(self, step: int) -> tuple[dict[str, float], dict[str, str]]:
        """Those attached to `step`, and by which protocols each eval measured; empty: none."""
        kept = agreement.from_first(lambda: _read_scores(self.folder / str(step)))
        return kept["scores"], kept["protocols"]

    def close(self) -> None:
        """Wait, and free the threads.

        Raises:
          CheckpointError, StorageError: the last save has failed.
        """
        with _plain_errors(f"saving to {self.folder}"):
            self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif issubclass(kind, Exception) and jax.process_count() == 1:
            # What is being written is a good state: let it land. With several processes, the others, whose help
            # that needs, may be gone; and who presses Ctrl-C twice does not want to wait.
            with contextlib.suppress(CheckpointError, StorageError):
                self.close()

    def restore(self, shapes: TrainState, shardings: TrainState) -> Restored:
        """The newest state, laid out by `shardings` whatever mesh, stage or precision wrote it, and verified.

        Raises:
          CheckpointError: it is damaged, or of another model; with the differences.
        """

        def parts_of(step: int) -> dict[str, Any]:
            stored = self._stored(step)
            parts = {k: v for k, v in vars(_targets(shapes, shardings)).items() if v is not None}
            if not jax.tree.leaves(stored.pop("loss_scale", None)):
                parts.pop("loss_scale", None)
            _refuse_other_tree(self.folder / str(step), stored, shapes.replace(loss_scale=None))
            return parts

        found = self._newest_whole(parts_of)
        if shapes.loss_scale and "loss_scale" not in found.what:
            found.what["loss_scale"] = jax.device_put(loss_scale.init(), shardings.loss_scale)
        return dataclasses.replace(found, what=shapes.replace(**found.what))

    def restore_weights(self, shapes: Any, shardings: Any) -> Restored:
        """The newest weights alone, verified: the averaged ones where the run kept them, of the parts it trained.

        Args:
          shapes, shardings: of the parameters.

        Raises:
          CheckpointError: as `restore`.
        """

        def choose(step: int, stored: Any) -> Any:
            _refuse_other_tree(self.folder / str(step), {"params": stored}, {"params": shapes})
            return _targets(shapes, shardings)

        return self.restore_chosen_weights(choose)

    def restore_chosen_weights(self, choose: Callable[[int, Any], Any]) -> Restored:
        """As `restore_weights`, of the weights that `choose` asks for.

        Args:
          choose: (step, the stored tree, of objects with a shape) -> the part of it that is read, of
            `jax.ShapeDtypeStruct`s with shardings.

        Raises:
          CheckpointError: as `restore`; and what `choose` raises.
        """

        def parts_of(step: int) -> dict[str, Any]:
            stored = self._stored(step)
            averaged = stored["ema"] if jax.tree.leaves(stored.get("ema")) else {}
            parts: dict[str, Any] = {"params": {}, "ema": {}}
            for name, part in choose(step, {**stored["params"], **averaged}).items():
                parts["ema" if name in averaged else "params"][name] = part
            return {key: part for key, part in parts.items() if part}

        found = self._newest_whole(parts_of)
        weights = {name: part for parts in found.what.values() for name, part in parts.items()}
        return dataclasses.replace(found, what=weights)

    def _newest_whole(self, parts_of: Callable[[int], dict[str, Any]]) -> Restored:
        """The newest step, or, if the configuration says so, the newest whole one, of all processes alike.

        Damage that one of them finds is damage for all. Storage that fails is no damage: it is asked again for a
        minute, and then the run ends and starts again with the same step.

        Args:
          parts_of: what to read of a step, name -> tree of shapes with shardings.

        Raises:
          CheckpointError: there is none, or it is damaged.
          StorageError: it cannot be read.
        """
        steps = self._steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no complete checkpoint; name the folder of another run")
        notes: list[str] = []
        for i, step in enumerate(steps):
            record, what, damage = {}, None, ""
            try:
                record, what = storage.retry(functools.partial(self._load, step, parts_of), lambda: "restoring")
            except DamagedError as error:
                damage = str(error)
            damage = agreement.first_text(damage)
            if not damage:
                record = agreement.from_first(lambda record=record: record)
                damage = self._difference(step, record, what)
            if damage:
                older = steps[i + 1 :]
                if self._config.on_damage == "stop" or not older:
                    remedy = "there is no older one"
                    if older:
                        remedy = f"move it away to continue from step {older[0]}, or set config.checkpoint.on_damage="
                        remedy += '"older"'
                    raise DamagedError(f"{damage}; {remedy}")
                notes.append(f"passed over: {damage}")
                continue
            if "checksums" not in record:
                notes.append(f"step {step} is not verified: it was saved by a version without checksums")
            self._set_aside(steps[:i])
            return Restored(step, what, record, notes)
        raise AssertionError("one was whole or the last one raised")

    def _load(self, step: int, parts_of: Callable[[int], dict[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The record of `step`, and the parts of its state; of this process alone, others may fail meanwhile."""
        where = self.folder / str(step)
        with self._reading(step):
            if not where.is_dir():
                raise StorageError(f"{where}: was there, but process {jax.process_index()} does not see it")
            record = self.record(step)
            parts = parts_of(step)
            arguments = ocp.args.PyTreeRestore(
                item=parts, restore_args=ocp.checkpoint_utils.construct_restore_args(parts), partial_restore=True
            )
            what = self._arrays.restore(where / ITEM, args=arguments)  # the manager would wait for other processes
            if (number := int(what.get("step", step))) != step:
                raise ValueError(f"it holds step {number}")
        return record, what

    def _difference(self, step: int, record: dict[str, Any], what: dict[str, Any]) -> str:
        """How the arrays differ from their checksums, the same on all processes; "": not at all."""
        found, saved = checksums(what), record.get("checksums")
        bad = [] if saved is None else [name for name, value in found.items() if saved.get(name) != value]
        if not bad:
            return ""
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return (
            f"{self.folder / str(step)} is damaged: {len(bad)} of {len(found)} arrays differ from their checksums, "
            f"{', '.join(bad[:3])}{more}"
        )

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Move damaged steps of the own run out of the way of those to come."""
        if not steps or self._read_only:
            return
        with _plain_errors(f"moving damaged steps out of {self.folder}"):
            if jax.process_index() == 0:
                away = self.folder.parent / "damaged"
                away.mkdir(exist_ok=True)
                for step in steps:
                    (self.folder / str(step)).rename(away / f"{step}-{time.time_ns()}")
            multihost_utils.sync_global_devices("damaged steps are set aside")
            self._manager.reload()

    def _stored(self, step: int) -> dict[str, Any]:
        """The stored tree, of objects with a shape."""
        with self._reading(step):
            metadata = self._manager.item_metadata(step)
            if metadata is None or not (self.folder / str(step) / ITEM).is_dir():
                raise FileNotFoundError("the list of its arrays is missing")
            return metadata.tree

    def _reading(self, step: int) -> contextlib.AbstractContextManager:
        return _plain_errors(str(self.folder / str(step)), reading=True)


class _Keep(managers.PreservationPolicy):
    """The policy of which checkpoints stay: the last, and the best by a score that a step gets after it is saved.

    Orbax's own policies know a score only if it is there when the state is saved.
    """

    def __init__(self, config: CheckpointConfig, folder: Path):
        self.config = config
        self.scores = {int(step): scores for step, scores in agreement.from_first(lambda: _all_scores(folder)).items()}

    def of(self, steps: Sequence[int]) -> set[int]:
        """Those of `steps` that stay."""
        best, metric = self.config.keep_best, self.config.best_metric
        scored = [step for step in steps if metric in self.scores.get(step, {})]
        scored = [step for step in scored if self.scores[step][metric] == self.scores[step][metric]]  # not NaN
        ranked = sorted(scored, key=lambda step: (self.scores[step][metric], step), reverse=True)
        return {*sorted(steps)[-self.config.keep_last :], *ranked[:best]}

    def should_preserve(
        self, checkpoints: Sequence[managers.PolicyCheckpointInfo], *, context: managers.PreservationContext
    ) -> Sequence[bool]:
        """Orbax asks at each save."""
        kept = self.of([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _all_scores(folder: Path) -> dict[str, dict[str, float]]:
    """Of every step in the folder, by its name."""
    steps = [path for path in folder.iterdir() if path.name.isdigit()]
    return {path.name: _read_scores(path)["scores"] or _former_scores(path) for path in steps}


def _read_scores(folder: Path) -> dict[str, dict]:
    """What `attach` has left in the folder of a step.

    Raises:
      CheckpointError: it is damaged.
      DataError, StorageError: it cannot be read.
    """
    path = folder / SCORES
    if (content := storage.read_bytes(path)) is None:
        return {"scores": {}, "protocols": {}}
    try:
        return unseal(content.decode().removesuffix("\n"))
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; remove it, the step is then evaluated again") from error


def _former_scores(folder: Path) -> dict[str, float]:
    """What versions that evaluated before they saved have left; {}: nothing."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((folder / "metrics" / "metrics").read_text())
    return {}


def _targets(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, shardings)


def _leaves(tree: Any) -> dict[str, tuple[int, ...]]:
    """Path to shape."""
    return {name_of(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


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


@contextlib.contextmanager
def _plain_errors(doing: str, *, reading: bool = False) -> Iterator[None]:
    """Turn what Orbax, TensorStore and the file system raise into one line: what was done, the cause, the remedy.

    Args:
      doing: what; with `reading`, the checkpoint.
      reading: what cannot be read is damaged.

    Raises:
      StorageError: for causes that may pass by themselves.
      CheckpointError: for all others.
      DamagedError: for all others, when reading.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = _cause_of(error)
        if storage.is_passing(cause):
            raise StorageError(f"{doing}: {cause[:200]}") from error
        if reading:
            raise DamagedError(f"{doing} is damaged: {cause[:200]}") from error
        if storage.is_full(cause):
            cause = "the disk is full; free space and start again: earlier checkpoints are intact"
        raise CheckpointError(f"{doing}: {cause[:200]}") from error


def _cause_of(error: BaseException) -> str:
    """The text of what an error came from, in one line; Orbax's own words only repeat where it was.

    What was raised while another error was handled came from that one (a clean-up that failed), unless it names a
    failure of the storage itself (a further try that failed, too).
    """
    while True:
        text = one_line(error, most=None)
        of_storage = storage.is_passing(text) or storage.is_full(text)
        before = error.__cause__ or (None if error.__suppress_context__ or of_storage else error.__context__)
        if before is None:
            return text
        error = before
