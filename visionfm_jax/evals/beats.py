"""Long computations between the predictions of an eval: they say that they go on, and learn when to stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

_BEAT: ContextVar[Callable[[bool], object]] = ContextVar("beat", default=lambda alike: None)


class Stopped(Exception):
    """An evaluation was cut off."""


def beat(alike: bool = True) -> None:
    """Call this every few seconds of a long computation; outside of a measurement it does nothing.

    Args:
      alike: every process comes here equally often, so that all can agree to stop here; if not, only a run of a single
        process stops here.

    Raises:
      Stopped: a stop was requested.
    """
    _BEAT.get()(alike)


@contextlib.contextmanager
def heard_by(listener: Callable[[bool], object]) -> Iterator[None]:
    """`beat` calls `listener(alike)` meanwhile."""
    before = _BEAT.set(listener)
    try:
        yield
    finally:
        _BEAT.reset(before)
