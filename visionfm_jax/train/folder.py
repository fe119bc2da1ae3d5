"""The run folder: one owner at a time, and the exact configuration."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from pathlib import Path
from typing import Any, Self

from visionfm_jax.config import Config
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError, OutputError, UserError

# What the order of the samples follows from, beside the training sources; those may move to another path.
ORDER = ("seed", "train.batch_size", "data.shuffle")

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunFolder:
    """Holds FOLDER for this process until closed; the lock dies with the process, however it dies.

    Raises:
      UserError: another run is in there, or the folder cannot be made.
    """

    def __init__(self, config: Config, *, owner: bool):
        self.path = Path(config.folder)
        self._lock = None
        if not owner:  # only the first process of a run guards and writes the folder
            return
        refuse_links(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  held for the process's life
        except OSError as error:
            kind = OutputError if error.errno in FULL else UserError
            raise kind(
                f"config.workdir = {str(self.path)!r}: {error.strerror}; name a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is in {self.path}; wait for it, or set config.workdir") from error
        except OSError as error:
            raise UserError(
                f"config.workdir = {str(self.path)!r}: cannot be locked ({error.strerror}); name a folder whose file "
                "system has locks"
            ) from error

    def record(self, config: Config, step: int, order_version: int) -> list[str]:
        """Keep the exact configuration; called once it is known that the state of `step` fits it.

        Args:
          config: of this run.
          step: that it continues from; 0 at the beginning.
          order_version: of the shuffle that the samples come in.

        Returns:
          The settings that have changed since the run was last here, "field: old -> new"; the former file is kept
          beside the new one.

        Raises:
          ConfigError: a run that continues would get other samples than it was promised.
        """
        if self._lock is None:
            return []
        path, new = self.path / "config.json", json.loads(json.dumps(to_dict(config)))
        changes = []
        if step and path.exists():
            kept = _read_record(path)
            if config.data.shuffle and (was := kept.get("order_version", 1)) != order_version:
                raise ConfigError(
                    f"the run in {self.path} has version {was} of the order of the samples, this program shuffles by "
                    f"version {order_version}: finish it with the release that it began with, or start in another "
                    "config.workdir, with its weights by config.checkpoint.weights"
                )
            changes = _changes(kept["config"], new)
            for name in (c.partition(":")[0] for c in changes):
                if name in ORDER or (name.startswith("data.train") and not name.endswith(".path")):
                    raise ConfigError(
                        f"config.{name} differs from that of the run in {self.path}, and with it the order of the "
                        "samples; set it back, or start in another config.workdir"
                    )
            if changes:
                self._write(self.path / f"config-until-{step}.json", path.read_text())
        record = {"config": new, "derived": config.derived(), "order_version": order_version}
        self._write(path, json.dumps(record, indent=2) + "\n")
        return changes

    def _write(self, path: Path, text: str) -> None:
        """Whole or not at all."""
        try:
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text)
            temporary.replace(path)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; free space there") from error

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_record(path: Path) -> dict[str, Any]:
    """What `RunFolder.record` has kept.

    Raises:
      ConfigError: the file is damaged.
    """
    try:
        kept = json.loads(path.read_text())
        if isinstance(kept, dict) and isinstance(kept.get("config"), dict):
            return kept
        cause = "it holds no configuration"
    except OSError as error:
        cause = error.strerror
    except (ValueError, RecursionError) as error:
        cause = " ".join(str(error).split())[:100]
    raise ConfigError(
        f"{path} is damaged: {cause}; move it away to continue, and see yourself that the settings are those of before"
    )


def refuse_links(folder: str | Path) -> None:
    """Refuse a run folder, perhaps somebody else's, of which a file would be written elsewhere.

    The folder itself may be reached by a link. What is within an array store of a checkpoint is only read.

    Raises:
      UserError: something in it is neither a file nor a folder.
    """
    for at, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(at, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = f"a link to {str(path.readlink())!r}" if stat.S_ISLNK(mode) else "no ordinary file"
                raise UserError(
                    f"{path}: is {what}, which a run folder must not have; remove it, or set config.workdir"
                )
        if "default" in folders and Path(at).parent.name == "checkpoints":
            folders.remove("default")


def _changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Differing leaves of two nested JSON values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(k for k in old if k not in new)]
        return [c for k in keys for c in _changes(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old and isinstance(old[0], dict):
        return [c for i, (a, b) in enumerate(zip(old, new, strict=True)) for c in _changes(a, b, f"{name}[{i}]")]
    return [] if old == new else [f"{name}: {old} -> {new}"]
