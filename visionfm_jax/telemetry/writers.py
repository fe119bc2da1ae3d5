"""Metrics of a run as files: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, BinaryIO, Self

from visionfm_jax.errors import OutputError, complain, count, one_line
from visionfm_jax.storage import CHECKSUM, append_line, read_bytes, seal, unseal, unwritable, write, write_text
from visionfm_jax.telemetry.trackers import FAILED, FINISHED, Tracker

FILE = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"


class MetricWriter:
    """Appends to FOLDER/metrics.jsonl and, if wished, to FOLDER/tensorboard.

    One object a line, "step" first, a checksum of the line last. NaN and the infinities, which JSON has no number
    for, are written as the strings "nan", "inf", "-inf". Every line is written at once, so that a killed run loses
    at most the line being written.

    A run that continues at `start_step` will write the later steps again, and the scores of this one: what a previous,
    killed attempt left of them is dropped first, and so is a torn last line.

    Once begun, a full disk is no reason to end a run: lines wait in memory until they can be written. TensorBoard's
    events, which tell nothing else, end there.

    Args:
      folder: the run folder; made if missing.
      start_step: the last step that the resumed state contains; 0 for a new run.
      tensorboard: also write event files.
      trackers: services by name, which get the same scalars; the writer closes them.
      note: shows a line to people.

    Raises:
      OutputError, StorageError: the folder cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        start_step: int = 0,
        tensorboard: bool = True,
        trackers: Mapping[str, Tracker] = MappingProxyType({}),
        note: Callable[[str], None] = print,
    ) -> None:
        self._path, self._note = Path(folder) / FILE, note
        self._waiting: list[bytes] = []
        self._failed: OSError | None = None
        self._events, self._trackers = None, dict(trackers)

        def begin() -> BinaryIO:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _drop_after(self._path, start_step)
            return open(self._path, "ab", buffering=0)  # lives as long as the run

        self._lines = write(begin, self._path)
        if tensorboard:
            events = self._path.parent / "tensorboard"
            self._events = write(lambda: _Events(events, start_step), events)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Record scalars of one step; values are numbers or arrays of one element."""
        values = {name: _number(value) for name, value in metrics.items()}
        line = seal({"step": int(step), **{name: _plain(v) for name, v in values.items()}})
        self._waiting.append(line.encode() + b"\n")
        self._append()
        if self._events is not None:
            try:
                self._events.write(step, values)
            except OSError as error:
                self._note(f"tensorboard: {error.strerror}; no further events are written; {FILE} goes on")
                self._events = None
        for name, tracker in [*self._trackers.items()]:
            try:
                tracker.write(step, values)
            except Exception as error:  # whatever a client of a service raises must not end a run
                self._note(f"{name}: {one_line(error)}; it gets no further metrics; {FILE} goes on")
                del self._trackers[name]

    def _append(self) -> None:
        """Write the lines that wait; where that fails, all of the first that is not whole waits on."""
        try:
            while self._waiting:
                whole = os.fstat(self._lines.fileno()).st_size
                if self._lines.write(self._waiting[0]) < len(self._waiting[0]):
                    os.ftruncate(self._lines.fileno(), whole)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self._waiting.pop(0)
            self._failed = None
        except OSError as error:
            if self._failed is None:
                self._note(f"cannot write {self._path}: {error.strerror}; training goes on, the lines wait in memory")
            self._failed = error

    def close(self, state: str = FINISHED) -> None:
        """Flush and close; safe to call twice. Trackers are told the state (`trackers.Tracker.close`).

        Raises:
          OutputError: some lines could not be written.
        """
        if self._lines.closed:
            return
        self._append()
        self._lines.close()
        if self._events is not None:
            with contextlib.suppress(OSError):
                self._events.close()
        for name, tracker in self._trackers.items():
            try:
                tracker.close(state)
            except Exception as error:  # likewise
                self._note(f"{name}: {one_line(error)}; its last metrics may be missing")
        if self._failed is not None:
            raise unwritable(self._path, self._failed, f"{len(self._waiting)} lines of metrics are lost; ")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        with contextlib.suppress(OutputError) if error else contextlib.nullcontext():
            self.close(FAILED if error else FINISHED)


class _Events:
    """A file of events for TensorBoard, written by the thread that logs.

    tensorboardX's own `SummaryWriter` writes in a thread that dies of a full disk, and the run then waits for it.
    """

    def __init__(self, folder: Path, start_step: int) -> None:
        # Late: it costs a second that --help need not wait for.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(exist_ok=True)
        suffix = f".{os.getpid()}.{start_step}"  # two starts in one second are two files
        self._writer = EventsWriter(str(folder / "events"), suffix)
        if start_step:  # hides what the lost part had drawn
            self._add(Event(step=start_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        summary = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(step=step, summary=summary))

    def _add(self, event: Any) -> None:
        event.wall_time = time.time()
        self._writer.write_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


def read_metrics(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of FOLDER/metrics.jsonl in order, "nan", "inf" and null as floats; [] where there is no file.

    Damaged lines are left out and counted on stderr.
    """
    return [
        {k: math.nan if v is None else float(v) if isinstance(v, str) else v for k, v in row.items()}
        for _, row in _whole_lines(Path(folder) / FILE)
    ]


def write_details(folder: str | os.PathLike[str], name: str, details: Mapping[str, Any]) -> Path:
    """Write FOLDER/eval_NAME.json, whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    path = Path(folder) / f"eval_{name}.json"
    write_text(path, json.dumps(details, indent=1) + "\n")
    return path


def keep_details(folder: str | os.PathLike[str], name: str, protocol: str, kinds: Sequence[str]) -> Path | None:
    """Rename the details and pictures of an eval that were measured by another protocol: eval_NAME.PROTOCOL.json, ….

    Args:
      folder: the run's.
      name: the eval's.
      protocol: by which it was measured now.
      kinds: of pictures, KIND_NAME.png.

    Returns:
      The new name of the details; None: there are none of another protocol.

    Raises:
      OSError: one cannot be renamed.
    """
    path = Path(folder) / f"eval_{name}.json"
    try:
        former = json.loads(path.read_bytes())["protocol"]
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):  # damaged details are replaced
        return None
    if former == protocol or not re.fullmatch(r"[0-9a-f]{1,64}", str(former)):
        return None
    for file in (*(path.with_name(f"{kind}_{name}.png") for kind in kinds), path):  # the one that says so last
        with contextlib.suppress(FileNotFoundError):
            path = file.replace(file.with_name(f"{file.stem}.{former}{file.suffix}"))
    return path


def append_evaluation(folder: str | os.PathLike[str], step: int, found: Mapping[str, Any]) -> Path:
    """Add a line to FOLDER/evaluations.jsonl, with a checksum: what an evaluation apart from training has found.

    Args:
      folder: made if missing.
      step: of the weights.
      found: scores, and whatever tells them from those of other evaluations; numbers become as in metrics.jsonl.

    Raises:
      OutputError, StorageError: the folder cannot be written.
    """
    path = Path(folder) / EVALUATIONS
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    values = {name: _plain(v) if isinstance(v, float) else v for name, v in found.items()}
    line = seal({"step": step, "time": now, **values})

    def append() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        append_line(path, line)

    write(append, path)
    return path


def _drop_after(path: Path, step: int) -> None:
    """Keep the whole lines up to the training of `step`, by renaming a complete new file over the old one."""
    kept = [
        line + "\n" for line, row in _whole_lines(path) if row["step"] < step or (row["step"] == step and "loss" in row)
    ]
    new = "".join(kept)
    if new.encode() != (read_bytes(path) or b""):
        write_text(path, new)


def _whole_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Lines, and what they say; without those that are torn or hold something else than was written."""
    *lines, rest = (read_bytes(path) or b"").decode("utf-8", errors="replace").split("\n")
    found = [(line, row) for line in lines if (row := _parse(line)) is not None]
    if damaged := len(lines) + bool(rest) - len(found):
        complain(f"{path}: {count(damaged, 'damaged line')} left out")
    return found


def _parse(line: str) -> dict[str, Any] | None:
    """None: it is damaged. Lines of versions before have no checksum."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int:
        return None
    if CHECKSUM in row:
        try:
            row = unseal(line)
        except ValueError:
            return None
    plain = all(v is None or isinstance(v, int | float) or v in ("nan", "inf", "-inf") for v in row.values())
    return row if plain else None


def _number(value: Any) -> int | float:
    return value if isinstance(value, int) else float(value)


def _plain(value: int | float) -> int | float | str:
    return value if math.isfinite(value) else str(float(value))
