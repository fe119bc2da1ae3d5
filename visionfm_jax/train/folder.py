"""The run folder: one owner at a time, and what the samples of the run follow from."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, Self

from visionfm_jax.config import Config
from visionfm_jax.config.saved import TOKENIZER
from visionfm_jax.data.tokenizer import content_of
from visionfm_jax.errors import ConfigError, OutputError, UserError
from visionfm_jax.storage import FULL, append_line, read, read_bytes, replacing, retry, write, write_text
from visionfm_jax.train.provenance import (
    DATA,
    SETTINGS,
    Provenance,
    changes,
    former_settings,
    read_provenance,
    settings_files,
)

WEIGHTS = "weights.json"  # where the weights that the run began with came from


class RunFolder:
    """Holds FOLDER for this process until closed; the lock dies with the process, however it dies.

    Raises:
      UserError: another run is using there, or the folder cannot be made.
    """

    def __init__(self, config: Config, *, owner: bool):
        self.path = Path(config.folder)
        self._lock = None
        if not owner:  # only the first process of a run guards and writes the folder
            return
        refuse_links(self.path)
        where = f"config.workdir = {str(self.path)!r}"
        try:
            self._lock = retry(self._open_lock, lambda: where)
        except OSError as error:
            kind = OutputError if error.errno in FULL else UserError
            raise kind(f"{where}: {error.strerror}; name a folder that can be written") from error
        try:
            retry(self._take_lock, lambda: where)
        except OSError as error:
            raise UserError(
                f"{where}: cannot be locked ({error.strerror}); name a folder whose file system has locks"
            ) from error

    def _open_lock(self) -> IO[str]:
        self.path.mkdir(parents=True, exist_ok=True)
        return open(self.path / ".lock", "w")  # held for the process's life

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is using {self.path}; wait for it, or set config.workdir") from error

    def keep(
        self, new: Provenance, step: int, begun_in: str | Path, weights: dict[str, Any] | None = None
    ) -> list[str]:
        """Keep what the samples follow from; called once it is known that the state of `step` fits the configuration.

        Args:
          new: of this run.
          step: that it continues from.
          begun_in: the run folder that `step` was reached in; empty: it starts anew.
          weights: where the weights of a new run come from (`initialise.Start`).

        Returns:
          The settings that have changed since the run was there, "field: old -> new"; the former file is kept beside
          the new one.

        Raises:
          ConfigError, DataError: a run that continues would get other samples than it was promised.
          OutputError, StorageError: the folder cannot be written.
        """
        changed = changes(read_provenance(Path(begun_in)), new, Path(begun_in)) if begun_in else []
        path = self.path / SETTINGS
        self._keep_former(self.path / f"config-until-{step}.json", step, bool(changed))
        _write(self.path / DATA, json.dumps(new.data, indent=1) + "\n")
        self._keep_tokenizer(new.config)
        _write(path, json.dumps(new.settings, indent=2) + "\n")
        if weights is not None:
            _write(self.path / WEIGHTS, json.dumps(weights, indent=1) + "\n")
        elif not begun_in:
            former = self.path / WEIGHTS
            write(lambda: former.unlink(missing_ok=True), former)
        return changed

    def _keep_tokenizer(self, config: Config) -> None:
        """Copy it, so that the folder alone is enough to use the model."""
        if not config.task.reads_captions or (content := content_of(config.task.tokenizer)) is None:
            return
        path = self.path / f"{TOKENIZER}{Path(config.task.tokenizer).suffix}"

        def copy() -> None:
            with replacing(path) as part:
                part.write_bytes(content)

        write(copy, path)

    def _keep_former(self, path: Path, step: int, changed: bool) -> None:
        """Name the settings of the steps before `step` by it; those of later steps, which come anew, are dropped."""
        [before] = settings_files(self.path, max(step - 1, 0), max(step - 1, 0))
        if before.name == SETTINGS:
            if changed and (former := read_bytes(before)) is not None:
                _write(path, former.decode())
            return
        write(lambda: before.replace(path), path)
        for later in [file for end, file in former_settings(self.path).items() if end > step]:
            write(functools.partial(later.unlink, missing_ok=True), later)

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def damage_file(folder: Path, host: int) -> Callable[[dict[str, Any]], None]:
    """What adds a line to FOLDER/damaged.jsonl, or to a file of this process if it is not the first; if it can."""
    path = folder / f"damaged{f'.process-{host}' if host else ''}.jsonl"

    def keep(record: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):
            append_line(path, json.dumps(record))

    return keep


def refuse_other_weights(folder: Path, weights: dict[str, Any] | None) -> None:
    """Refuse to run a step again from other weights than the run in `folder` began with.

    Raises:
      ConfigError: they are others.
      DataError, StorageError: what is kept of them cannot be read.
    """
    if weights is None or (kept := read_bytes(folder / WEIGHTS)) is None:
        return
    try:
        before = json.loads(kept)
    except ValueError as error:
        raise ConfigError(f"{folder / WEIGHTS} is damaged: {error}; move it away") from error
    for key in ("sha256", "step"):
        if isinstance(before, dict) and before.get(key) != weights.get(key):
            raise ConfigError(
                f"config.checkpoint.weights = {weights['source']!r}: not those that the run in {folder} began with "
                f"({key} was {before.get(key)}); put them back, or name them"
            )


def _write(path: Path, text: str) -> None:
    write(lambda: write_text(path, text), path)


def refuse_links(folder: str | Path) -> None:
    """Refuse a run folder, perhaps somebody else's, of which a file would be written elsewhere.

    The folder itself may be reached by a link. What is within an array store of a checkpoint is only read. In wandb/
    Weights & Biases writes new folders alone, with links of its own.

    Raises:
      UserError: something in it is neither a file nor a folder.
      DataError, StorageError: it cannot be read.
    """
    read(lambda: _refuse_links(folder), lambda: str(folder))


def _refuse_links(folder: str | Path) -> None:
    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError) and error.errno != errno.ELOOP:
            raise error  # what is in there could be written to without having been seen

    for at, folders, files in os.walk(folder, onerror=unreadable):
        for name in (*folders, *files):
            path = Path(at, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a run that is in there has just renamed or removed it
                continue
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = f"a link to {str(path.readlink())!r}" if stat.S_ISLNK(mode) else "no ordinary file"
                raise UserError(
                    f"{path}: is {what}, which a run folder must not have; remove it, or set config.workdir"
                )
        if "default" in folders and Path(at).parent.name == "checkpoints":
            folders.remove("default")
        if "wandb" in folders and at == str(folder):
            folders.remove("wandb")
