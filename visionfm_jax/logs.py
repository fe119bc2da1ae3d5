"""Logs of other packages."""

from __future__ import annotations

import contextlib
import functools
import logging as standard_logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator

from absl import logging


def quiet_logs() -> None:
    """Warnings and worse only, and nothing from inside Orbax: what goes wrong there comes as an error, in our words.

    After the first array that it cannot read or write, Orbax abandons those of all other arrays, and each would
    print a page when it is collected. Nobody else here uses asyncio.
    """
    handler = standard_logging.StreamHandler()
    handler.setFormatter(logging.PythonFormatter())
    standard_logging.basicConfig(handlers=[handler], force=True)
    logging.set_verbosity(logging.WARNING)
    inside = f"{os.sep}orbax{os.sep}", f"{os.sep}asyncio{os.sep}"
    logging.get_absl_logger().addFilter(_not_of_orbax)
    standard_logging.getLogger("asyncio").setLevel(standard_logging.CRITICAL)

    def unraisable(info: sys.UnraisableHookArgs) -> None:
        if info.exc_type is KeyboardInterrupt:  # Ctrl-C came within a callback, which lets nothing out: once more
            threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT)).start()
            return
        where = info.exc_traceback.tb_frame.f_code.co_filename if info.exc_traceback else ""
        if not any(part in where for part in inside):
            sys.__unraisablehook__(info)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")


@contextlib.contextmanager
def without_orbax() -> Iterator[None]:
    """Nothing that Orbax logs, in programs whose logs are others'."""
    logger = logging.get_absl_logger()
    hide = functools.partial(_not_of_orbax)  # not the one of `quiet_logs`, which stays
    logger.addFilter(hide)
    try:
        yield
    finally:
        logger.removeFilter(hide)


def _not_of_orbax(record: standard_logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
