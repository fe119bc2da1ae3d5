"""One process writes a file that many could write: the others wait for it, as making the file may take hours.

A claim is a file beside the one to be written, opened so that it must not exist before, which every shared file system
can do (not all of them have locks). Its holder renews its time of change. When that has stood still for `SILENCE`
seconds, or the holder is a process of the same machine and container that has died, another one makes the claim of the
next number, which again only one of them can. What is written takes its name when it is whole: should two processes
write at once, as one of them was stopped for minutes and goes on, work is done twice and nothing is lost.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from absl import logging

from visionfm_jax.errors import DataError
from visionfm_jax.storage import remove_unfinished

BEAT = 10.0  # seconds between two signs of life
SILENCE = 180.0  # longer than a network's file system may show an old time of change
LOOK = 0.5  # seconds between two looks of those who wait


@contextlib.contextmanager
def claimed(places: Sequence[Path], what: str) -> Iterator[Path | None]:
    """The first of `places` that can be written, for this process alone; None after another process had it: look again.

    What a process that died has left of unfinished files is removed.

    Args:
      places: files that may be written, each as good as the other.
      what: is to be written, for people.

    Raises:
      DataError: none of them can be written.
    """
    reasons = []
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            number = _take(path)
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
            continue
        break
    else:
        raise DataError(f"no place for {what} ({'; '.join(reasons)}); make one writable")
    if number is None:
        yield None
        return
    over = threading.Event()
    beats = threading.Thread(target=_beat, args=(_claim(path, number), over), name="claim", daemon=True)
    beats.start()
    try:
        remove_unfinished(path)
        yield path
    finally:
        over.set()
        beats.join()
        for earlier in range(number + 1):  # of the dead, too
            _claim(path, earlier).unlink(missing_ok=True)


def _claim(path: Path, number: int) -> Path:
    return path.with_name(f".{path.name}.claim-{number}")


def _take(path: Path) -> int | None:
    """The number of the claim that this process now holds; None: the process that held one has finished."""
    number, waited = 0, False
    while True:
        try:
            with open(_claim(path, number), "x") as file:
                try:
                    json.dump({**_whereabouts(), "process": os.getpid()}, file)
                    file.flush()
                except OSError:  # the others shall not wait for a claim that was not made
                    _claim(path, number).unlink(missing_ok=True)
                    raise
            return number
        except FileExistsError:
            pass
        if not waited:
            logging.warning("%s: another process is writing it; waiting until it has finished", path)
            waited = True
        if _finished(_claim(path, number)):
            return None
        number += 1


def _finished(claim: Path) -> bool:
    """Wait until the holder of a claim has let it go, or, False, has died without doing so."""
    seen, since = None, time.monotonic()
    while True:
        try:
            # Opened, for a network's file system then asks for the time of change.
            with open(claim, errors="replace") as file:
                holder, state = file.read(), os.fstat(file.fileno())
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ESTALE):  # the latter on NFS
                return True
            raise
        if (state.st_ino, state.st_mtime_ns) != seen:
            seen, since = (state.st_ino, state.st_mtime_ns), time.monotonic()
        if time.monotonic() - since > SILENCE or _is_dead(holder):
            logging.warning("%s: its process (%s) has died or stands still; another one takes over", claim, holder)
            return False
        time.sleep(LOOK)


def _whereabouts() -> dict[str, str | int]:
    """Where a process number means one process: containers may share a host's name, but not its process numbers."""
    out: dict[str, str | int] = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):  # not Linux
        out["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        out["namespace"] = os.stat("/proc/self/ns/pid").st_ino
    return out


def _is_dead(holder: str) -> bool:
    """Whether the process is one that could be seen from here and is no more; of others only silence tells."""
    try:
        who = json.loads(holder)
        process = int(who.pop("process"))
        if who != _whereabouts():
            return False
        os.kill(process, 0)
    except (ValueError, KeyError, TypeError, RecursionError, PermissionError):  # not yet written, or of another user
        return False
    except (ProcessLookupError, OverflowError):
        return True
    return False


def _beat(claim: Path, over: threading.Event) -> None:
    while not over.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(claim)
