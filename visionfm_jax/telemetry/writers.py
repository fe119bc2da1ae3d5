"""Metrics of a run as files: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from visionfm_jax.errors import UserError

FILE = "metrics.jsonl"


class MetricWriter:
    """Appends to FOLDER/metrics.jsonl and, if wished, to FOLDER/tensorboard.

    One object a line, "step" first. NaN and the infinities, which JSON has no number for, are written
    as the strings "nan", "inf", "-inf". Every line is flushed, so that a killed run loses at most the
    line being written.

    A run that continues at `start_step` will write the later steps again, and the scores of this one: what a previous,
    killed attempt left of them is dropped first, and so is a torn last line.

    Args:
      folder: the run folder; made if missing.
      start_step: the last step that the resumed state contains; 0 for a new run.
      tensorboard: also write event files.

    Raises:
      UserError: the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, start_step: int = 0, tensorboard: bool = True) -> None:
        self._path = Path(folder) / FILE
        self._events = None
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path, start_step)
            self._lines = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - lives as long as the run
        except OSError as error:
            raise _unwritable(self._path, error) from error
        if tensorboard:
            from tensorboardX import SummaryWriter  # late: it costs a second that --help need not wait for

            self._events = SummaryWriter(
                str(self._path.parent / "tensorboard"),
                purge_step=start_step + 1 if start_step else None,  # hides what the lost part had drawn
                filename_suffix=f".{os.getpid()}.{start_step}",  # two starts in one second are two files
                flush_secs=20,
            )

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record scalars of one step; values are numbers or arrays of one element.

        Raises:
          UserError: the disk is full or the folder is gone.
        """
        values = {name: _number(value) for name, value in metrics.items()}
        line = json.dumps({"step": int(step), **{name: _plain(v) for name, v in values.items()}}, allow_nan=False)
        try:
            self._lines.write(line + "\n")
            self._lines.flush()
            if self._events is not None:
                for name, value in values.items():
                    self._events.add_scalar(name, value, step)
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of FOLDER/metrics.jsonl in order, "nan" and "inf" as floats again; [] where there is no file.

    Lines that a crash has torn are left out.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return []
    rows = (_parse(line) for line in path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [{k: float(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows if row is not None]


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to the training of `step`, by renaming a complete new file over the old one."""
    if not path.exists():
        return
    old = path.read_bytes()
    lines = old.decode("utf-8", errors="replace").splitlines(keepends=True)
    rows = [(line, _parse(line)) for line in lines if line.endswith("\n")]
    kept = [line for line, row in rows if row and (row["step"] < step or (row["step"] == step and "loss" in row))]
    new = "".join(kept).encode("utf-8")
    if new == old:
        return
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(new)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _plain(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(float(value))


def _unwritable(path: Path, error: OSError) -> UserError:
    reason = error.strerror or str(error)
    return UserError(f"cannot write {path}: {reason}; free space there or choose another folder by config.workdir")
