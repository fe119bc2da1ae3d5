"""A bound on the memory that threads of a process hold at the same time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class Budget:
    """A semaphore that counts bytes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._held = 0

    @contextlib.contextmanager
    def hold(self, count: int, limit: int) -> Iterator[None]:
        """Wait until `count` more bytes are at most `limit` in all; one who alone needs more than that goes alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + count <= limit)
            self._held += count
        try:
            yield
        finally:
            with self._changed:
                self._held -= count
                self._changed.notify_all()
