"""An alarm for runs that are stuck: who stands where, then a non-zero exit, so that a scheduler notices.

A lost collective leaves every process waiting for ever inside the driver, with no error anywhere. The
processes tell each other their last step, and, once stuck, the line of code where they stand, through
the key-value store of `jax.distributed`: that works while the devices do not answer.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from visionfm_jax.errors import LostError, complain
from visionfm_jax.parallel import cluster

_KEY = "visionfm_jax/watchdog/"


class Watchdog:
    """Ends the process when no step finishes for too long.

    It then writes the stacks of all threads to stderr and to FOLDER/stacks-PROCESS.txt, one line that
    names the step and the processes that lag behind, and calls `os._exit(71)`: nothing gentler works
    when the main thread waits inside a driver.

    Args:
      minutes: without a beat before the alarm; above a compilation and above an evaluation. 0: off.
      folder: the run folder.
      process: this process.
      processes: how many the run has.
    """

    def __init__(self, minutes: float, *, folder: str | os.PathLike[str], process: int = 0, processes: int = 1) -> None:
        self._limit = minutes * 60
        self._folder = Path(folder)
        self._process, self._processes = process, processes
        self._step = -1  # none finished yet
        self._beaten = time.monotonic()
        self._suspended = False
        self._published: int | None = None
        self._said = "stuck"
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        if minutes > 0:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    def beat(self, step: int) -> None:
        """Say that `step` is done, or that a long evaluation or save after it has got further. Costs nothing."""
        self._step = step
        self._beaten = time.monotonic()

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """No alarm meanwhile: opening a dataset for the first time may take hours of reading, and is no standstill."""
        self._suspended = True
        try:
            yield
        finally:
            self._beaten = time.monotonic()
            self._suspended = False

    def close(self) -> None:
        """Stop watching; safe to call twice."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _watch(self) -> None:
        # All notice within one tick, which is less than the time they have to say where they stand.
        for tick in itertools.count():
            if self._stop.wait(min(self._limit / 10, 5.0)):
                return
            if not self._suspended and time.monotonic() - self._beaten > self._limit:
                self._alarm()
            if self._step != self._published and tick % 6 == 0:
                self._published = self._step
                self._publish("")

    def _alarm(self) -> None:
        cluster.end_alone()  # the others are stuck as well, and each says where
        where = _where(self._main)
        self._dump_stacks()
        # They notice at about the same moment: leave them time to say where.
        grace = min(self._limit, 10.0)
        asking = threading.Thread(target=self._compare, args=(where, grace), daemon=True)
        asking.start()
        asking.join(timeout=grace + 20)  # the store may be stuck itself
        if asking.is_alive():
            self._say("the other processes cannot be asked: process 0, which keeps the store, does not answer")
        if self._process == 0:
            time.sleep(min(2.0, grace))  # the store ends with this process, and others may still be reading
        cluster.end_all(LostError.exit_code, self._said)

    def _compare(self, where: str, grace: float) -> None:
        self._publish(where)
        time.sleep(grace)
        self._say(verdict(self._read(where), self._processes))

    def _say(self, text: str) -> None:
        minutes = self._limit / 60
        step = f"the last was step {self._step}" if self._step >= 0 else "not one since the start"
        who = f"process {self._process} of {self._processes}"
        self._said = (
            f"no step finished for {minutes:g} minutes, {step}; {text}; "
            f"stacks in {self._stacks}; raise config.telemetry.stuck_minutes if a step may take that long"
        )
        complain(f"error: {who}: {self._said}")

    @property
    def _stacks(self) -> Path:
        return self._folder / f"stacks-{self._process}.txt"

    def _dump_stacks(self) -> None:
        # A full disk must not keep a stuck run alive; stderr may be closed or have no file descriptor.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        with contextlib.suppress(OSError, ValueError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with open(self._stacks, "w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file=file, all_threads=True)

    def _publish(self, where: str) -> None:
        client = cluster.store()
        if client is not None:
            with contextlib.suppress(Exception):  # the alarm must go on when the store is gone
                client.key_value_set(f"{_KEY}{self._process}", f"{self._step} {where}", allow_overwrite=True)

    def _read(self, where: str) -> dict[int, tuple[int, str]]:
        known = {self._process: (self._step, where)}
        client = cluster.store()
        if client is not None:
            with contextlib.suppress(Exception):
                for key, value in client.key_value_dir_get(_KEY):
                    step, _, place = value.partition(" ")
                    known[int(key.rpartition("/")[2])] = int(step), place
        return known


def verdict(known: dict[int, tuple[int, str]], processes: int) -> str:
    """Which processes are behind.

    Args:
      known: process -> (last finished step, where its main thread stands; "" if it has not said).
      processes: how many there should be.

    Returns:
      Half a sentence. Processes in lock-step finish the same step even when one hangs, so where all are
      at the same step, those that stand at another line than most are named.
    """
    if processes == 1:
        return f"it stands at {known[0][1]}" if known else "it has not said where it stands"
    found: list[str] = []
    missing = sorted(set(range(processes)) - known.keys())
    if missing:
        found.append(f"{_processes(missing)} never reported a step")
    newest = max(step for step, _ in known.values())
    behind = sorted(p for p, (step, _) in known.items() if step < newest)
    if behind:
        found.append(
            "; ".join(f"process {p} lags behind at step {known[p][0]}, {known[p][1] or 'silent'}" for p in behind)
        )
    silent = sorted(p for p, (step, place) in known.items() if not place and step == newest)
    if silent:
        found.append(f"{_processes(silent)} did not answer the alarm")
    places = Counter(place for _, place in known.values() if place)
    if not found and len(places) > 1:
        usual = places.most_common(1)[0][0]
        odd = sorted(p for p, (_, place) in known.items() if place != usual)
        found.append(
            "all are at the same step, but "
            + ", ".join(f"process {p} stands at {known[p][1]}" for p in odd)
            + f" and the others at {usual}"
        )
    return "; ".join(found) or f"all {processes} processes are at the same step and stand at {next(iter(places), '?')}"


def _processes(numbers: list[int]) -> str:
    return ("process " if len(numbers) == 1 else "processes ") + ", ".join(map(str, numbers))


def _where(thread: int | None) -> str:
    """The innermost line of this package that the thread is in, or its innermost line at all."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return "an ended main thread"
    stack = traceback.extract_stack(frame)
    ours = [entry for entry in stack if f"{os.sep}visionfm_jax{os.sep}" in entry.filename]
    entry = (ours or stack)[-1]
    return f"{Path(entry.filename).name}:{entry.lineno} in {entry.name}"
