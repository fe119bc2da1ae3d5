"""Processes that work for this one."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import sys
import threading
import traceback
import types
from collections.abc import Iterator

_STARTING = threading.Lock()  # there is one `__main__` for all threads


@contextlib.contextmanager
def no_main() -> Iterator[None]:
    """Processes that are spawned in it do not import the main module again, that is the whole trainer."""
    with _STARTING:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def portable(error: Exception) -> Exception:
    """The error, or its text where another process cannot unpickle it."""
    with contextlib.suppress(Exception):
        if type(pickle.loads(pickle.dumps(error))) is type(error):
            return error
    return RuntimeError("".join(traceback.format_exception(error)))


def end_with_parent() -> None:
    """Called in a spawned process: it ends when its parent does, however that ends.

    Nothing else would end it while it works; one of Grain holds both ends of the pipe through which it gets its work.
    """
    threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
