"""The progress of a run on a terminal, or as plain lines in a log."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm

COMPILING = "compiling the first step, which may take minutes"
LINE_EVERY = 10.0  # seconds between plain lines where there is no terminal


class Progress:
    """A bar on a terminal; elsewhere a plain line every ten seconds and one at the end.

    The time left comes from the steps since the first update, so the compilation of the first step
    does not spoil it.

    Args:
      total: steps of the whole run.
      start: steps done before (a resumed run).
      enabled: False on all processes but the first: every method does nothing then.
      stream: where to write; stderr by default, so that stdout stays for results.
      clock: seconds; for tests.
    """

    def __init__(
        self,
        total: int,
        start: int = 0,
        *,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._enabled, self._clock = total, enabled, clock
        self._stream = sys.stderr if stream is None else stream
        self._first: tuple[int, float] | None = None  # step and time of the first update
        self._last_line = clock()
        self._unsaid = ""  # the newest line, as long as nobody has seen it
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=start,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}% |{bar}| {desc}",
                desc=f"step {start}/{total}  {COMPILING}",
            )
        elif start < total:
            self.note(f"step {start}/{total}  {COMPILING}")

    def update(
        self,
        step: int,
        *,
        loss: float,
        images_per_s: float,
        tflops_per_device: float,
        mfu: float | None,
        data_wait: float,
    ) -> None:
        """Show the state after `step`.

        Args:
          step: steps done.
          loss: the newest known.
          images_per_s: over all devices.
          tflops_per_device: model TFLOP/s of one device; shown where `mfu` is None.
          mfu: share of the device's peak, 0..1; None where the peak is not known.
          data_wait: share of the time that the loop waited for data, 0..1.
        """
        if not self._enabled:
            return
        speed = f"{tflops_per_device:.3g} TFLOP/s" if mfu is None else f"MFU {mfu:.1%}"
        text = (
            f"step {step}/{self._total}  loss {loss:.4g}  {_count(images_per_s)} images/s  {speed}  "
            f"data-wait {data_wait:.0%}"
        )
        if left := self._left(step):
            text += f"  ETA {left}"
        if self._bar is not None:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        self._unsaid = text
        if self._clock() - self._last_line >= LINE_EVERY:
            self._say()

    def note(self, text: str) -> None:
        """Print a line of its own, above the bar."""
        if not self._enabled:
            return
        with contextlib.suppress(OSError):  # a full disk below the log, a reader that has gone: no reason to end a run
            if self._bar is not None:
                self._bar.write(text, file=self._stream)
            else:
                print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the last state standing; safe to call twice."""
        if self._bar is not None:
            self._bar.refresh()
            self._bar.close()
            self._bar = None
            self._enabled = False
        if self._unsaid:
            self._say()

    def _say(self) -> None:
        with contextlib.suppress(OSError):  # as in `note`
            print(self._unsaid, file=self._stream, flush=True)
        self._unsaid = ""
        self._last_line = self._clock()

    def _left(self, step: int) -> str:
        """The time left; empty: not known yet."""
        now = self._clock()
        if self._first is None:
            self._first = step, now
        done, seconds = step - self._first[0], now - self._first[1]
        if step >= self._total:
            return "0:00"
        if done <= 0 or seconds <= 0:
            return ""
        return _duration((self._total - step) * seconds / done)


def _count(value: float) -> str:
    if not math.isfinite(value):
        return "?"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _duration(seconds: float) -> str:
    """3:07, 2:05:09 or 3d 04:10:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
