"""The sessions of a run, from a start of the program to its end: RUN/sessions.jsonl.

Each writes a line when it begins (time, step, devices, versions) and one when it ends (time, step, how). A session
that was killed lacks the second.
"""

from __future__ import annotations

import contextlib
import datetime
import platform
import resource
import sys
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


class Session:
    """Writes both lines; that it cannot is no reason to end a run.

    Args:
      folder: the run's; None: write nothing, as on every process but the first.
      step: that it continues from.
      devices: of all processes.
      more: whatever else is known at the beginning; JSON.
    """

    def __init__(self, folder: Path | None, step: int, *, devices: int, **more: Any):
        self._folder, self._last, self._state = folder, step, "stopped"
        device = jax.devices()[0]
        self._write(
            began=_now(), first=step, devices=devices, device=device.device_kind, platform=device.platform,
            processes=jax.process_count(), cores=usable_cores(), versions=_versions(), **more,
        )  # fmt: skip

    def ends(self, step: int, state: str) -> None:
        """What the second line will say: the last step, and whether the run is finished or was stopped there."""
        self._last, self._state = step, state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if error is None:
            self._write(ended=_now(), last=self._last, state=self._state, **_memory())
        else:
            self._write(ended=_now(), state=f"{type(error).__name__}: {one_line(error)}")

    def _write(self, **values: Any) -> None:
        if self._folder is not None:
            with contextlib.suppress(OSError):
                append_line(self._folder / FILE, seal(values))


def read_sessions(folder: Path) -> list[dict[str, Any]]:
    """The sessions of the run in `folder`, oldest first; what is damaged is left out.

    Each has what both lines say, and numbers for the times: `began` and `ended`, seconds since 1970. Of one that was
    killed, or still runs, `ended` is None and `state` empty.

    Raises:
      DataError, StorageError: the file cannot be read.
    """
    found: list[dict[str, Any]] = []
    for line in (read_bytes(folder / FILE) or b"").decode(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError):
            row = unseal(line)
            if "began" in row:
                found.append({**row, "began": _seconds(row["began"]), "ended": None, "state": ""})
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
