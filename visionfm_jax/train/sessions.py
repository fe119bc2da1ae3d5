"""The sessions of a run, from a start of the program to its end: RUN/sessions.jsonl.

Each writes a line when it begins (time, step, devices, versions), one every ten minutes while it lives (time, step),
and one when it ends (time, step, how). A session that was killed lacks the last.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import resource
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Self

import jax

import visionfm_jax
from visionfm_jax.errors import one_line
from visionfm_jax.machine import usable_cores
from visionfm_jax.storage import append_line, read_bytes, seal, unseal

FILE = "sessions.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")  # whose versions are kept
ALIVE_EVERY = 600.0  # seconds between two signs of life


class Session:
    """Writes the lines; that it cannot is no reason to end a run.

    Args:
      folder: the run's; None: write nothing, as on every process but the first.
      step: that it continues from.
      devices: of all processes.
      more: whatever else is known at the beginning; JSON.
    """

    def __init__(self, folder: Path | None, step: int, *, devices: int, **more: Any):
        self._folder, self._end = folder, {"last": step, "state": "stopped"}
        device, self._told = jax.devices()[0], time.monotonic()
        self._write(
            began=_now(), first=step, devices=devices, device=device.device_kind, platform=device.platform,
            processes=jax.process_count(), cores=usable_cores(), versions=_versions(), **more,
        )  # fmt: skip

    def alive(self, step: int) -> None:
        """Sign of life, after `step`: written where the last one is old enough."""
        if (now := time.monotonic()) - self._told >= ALIVE_EVERY:
            self._told = now
            self._write(seen=_now(), last=step)

    def ends(self, step: int, state: str, **more: Any) -> None:
        """What the last line will say: the last step, whether the run is finished or was stopped there, and `more`."""
        self._end = {"last": step, "state": state, **more}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self._write(ended=_now(), **self._end, **_memory())
        else:
            self._write(ended=_now(), state=f"{type(error).__name__}: {one_line(error)}")

    def _write(self, **values: Any) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                append_line(self._folder / FILE, seal(values))


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions of the run in `folder`, oldest first; what is damaged is left out.

    Each has what its lines say, and numbers for the times: `began`, `seen` (the last sign of life) and `ended`, seconds
    since 1970. Of one that was killed, or still runs, `ended` is None and `state` empty; `seen` is None in the first
    ten minutes.

    Raises:
      DataError, StorageError: the file cannot be read.
    """
    found: list[dict[str, Any]] = []
    for line in (read_bytes(folder / FILE) or b"").decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            row = unseal(line)
            if "began" in row:
                found.append({**row, "began": _seconds(row["began"]), "seen": None, "ended": None, "state": ""})
            elif found and found[-1]["ended"] is None and "seen" in row:
                found[-1] |= {**row, "seen": _seconds(row["seen"])}
            elif found and found[-1]["ended"] is None:
                found[-1] |= {**row, "ended": _seconds(row["ended"]), "state": str(row["state"])}
    return found


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _seconds(time: str) -> float:
    return datetime.datetime.fromisoformat(time).timestamp()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "visionfm_jax": visionfm_jax.__version__}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _memory() -> dict[str, int]:
    """Bytes at the peak of this process, and of its first device where that counts them."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    peak = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return found if peak is None else found | {"device_memory_bytes": peak}
