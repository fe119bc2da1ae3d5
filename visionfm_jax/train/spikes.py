"""Records of steps whose gradient is far larger than usual, or not finite: RUN/spikes/step-N.jsonl.

The first line is the step's: its number, what happened, metrics, the norm of every tensor's gradient. A line for each
sample of the batch follows, with its place among all samples of the run, its record and its loss. With several
processes each writes the samples that it has loaded, the first one step-N.jsonl, the others step-N.process-P.jsonl.

In fp16 overflows are how the loss scale finds its size: they are kept as overflow-N.jsonl, and crowd nothing out.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.data.sources import Source
from visionfm_jax.errors import DataError
from visionfm_jax.storage import write_text

SUBFOLDER = "spikes"
KEPT = 32  # steps of either sort: the first half of what there was, and the latest
SPIKE, NOT_FINITE, OVERFLOW = "spike", "not finite", "overflow"

_NAME = re.compile(r"(step|overflow)-(\d+)(\.process-\d+)?\.jsonl")


class SpikeFolder:
    """Writes what is known of such steps; a full disk is a note, not the end of the run.

    Args:
      run: the run folder.
      sources: those of the training data.
      host, hosts: this process and their number.
    """

    def __init__(self, run: Path, sources: Sequence[Source], host: int = 0, hosts: int = 1):
        self._folder, self._sources, self._host, self._hosts = Path(run) / SUBFOLDER, sources, host, hosts

    def keep(self, kind: str, step: int, values: Mapping[str, Any], losses: np.ndarray, batch: Mapping) -> str:
        """Write one step; returns, for people, where it lies.

        Args:
          kind: SPIKE, NOT_FINITE or OVERFLOW.
          step: its number.
          values: whatever is known of the step as a whole, by name.
          losses: (B,) of the global batch.
          batch: this host's, as the loader gives it.
        """
        prefix = "overflow" if kind == OVERFLOW else "step"
        path = self._folder / f"{prefix}-{step:08}{f'.process-{self._host}' if self._host else ''}.jsonl"
        lines = [{"step": step, "kind": kind, **values}, *self._rows(step, losses, batch)]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(json.dumps(plain(line)) + "\n" for line in lines))
            self._thin_out(prefix, path)
        except OSError as error:
            return f"not kept, as {path} cannot be written: {error.strerror}"
        return f"kept in {path}, visionfm replay --step={step} runs it again"

    def _rows(self, step: int, losses: np.ndarray, batch: Mapping) -> list[dict[str, Any]]:
        local = len(losses) // self._hosts
        offset = self._host * local
        rows = []
        for at in range(local):
            source, record = used_record(self._sources, batch, at)
            rows.append(
                {
                    "sample": step * len(losses) + offset + at, "source": source.name, "record": record,
                    "key": source.key(record), "loss": float(losses[offset + at]),
                }
            )  # fmt: skip
        return rows

    def _thin_out(self, prefix: str, written: Path) -> None:
        """Drop from the middle what is too many of this process's own, but for what was written just now."""
        own = f".process-{self._host}" if self._host else None
        found = [(match, path) for path in self._folder.iterdir() if (match := _NAME.fullmatch(path.name))]
        steps = sorted((int(match[2]), path) for match, path in found if (match[1], match[3]) == (prefix, own))
        for _, path in steps[KEPT // 2 : len(steps) - KEPT // 2]:
            if path != written:  # of a run that continues from an earlier step
                path.unlink()


def used_record(sources: Sequence[Source], batch: Mapping, at: int) -> tuple[Source, int]:
    """The source, and in it the record, that row `at` of a host batch shows: past the damaged ones."""
    source = sources[int(batch["source"][at])]
    return source, (int(batch["record"][at]) + int(batch["damaged"][at])) % len(source)


def kept_step(run: Path, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """What the first process has kept of `step`: its first line, and those of the samples; None: nothing.

    Raises:
      DataError: the file is damaged, or cannot be read.
    """
    for prefix in ("step", "overflow"):
        path = run / SUBFOLDER / f"{prefix}-{step:08}.jsonl"
        if not path.exists():
            continue
        try:
            head, *rows = map(json.loads, path.read_text().splitlines())
            head, rows = _numbers(head), [{**row, "loss": float(row["loss"])} for row in rows]
            numbers = [head["loss"], head["grad_norm"], *head["gradient_norms"].values()]
            if isinstance(head["kind"], str) and all(isinstance(number, float | int) for number in numbers):
                return head, rows
            cause = "it lacks numbers"
        except OSError as error:
            cause = error.strerror
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            cause = " ".join(repr(error).split())[:100]
        raise DataError(f"{path} is damaged or cannot be read: {cause}; move it away")
    return None


def plain(value: Any) -> Any:
    """With strings for the numbers that JSON has no sign for."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _numbers(value: Any) -> Any:
    """The reverse of `plain`."""
    if isinstance(value, dict):
        return {k: _numbers(v) for k, v in value.items()}
    return float(value) if value in ("nan", "inf", "-inf") else value
