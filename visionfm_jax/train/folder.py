"""The run folder: one owner at a time, and the exact configuration."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Self

from visionfm_jax.config import Config
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import UserError


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
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  held for the process's life
        except OSError as error:
            raise UserError(
                f"config.workdir = {str(self.path)!r}: {error.strerror}; name a folder that can be written"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run is in {self.path}; wait for it, or set config.workdir") from error

    def record(self, config: Config) -> None:
        """Keep the exact configuration; called once it is known that it fits what the folder holds."""
        if self._lock is None:
            return
        text = json.dumps({"config": to_dict(config), "derived": config.derived()}, indent=2)
        try:
            (self.path / "config.json").write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path / 'config.json'}: {error.strerror}; free space there") from error

    def close(self) -> None:
        """Let go of the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
