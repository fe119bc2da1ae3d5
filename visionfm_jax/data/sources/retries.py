"""Reading from storage that fails for a moment: a server that is restarted, a network that is overloaded."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from absl import logging

from visionfm_jax.errors import DataError, StorageError

WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try: a minute in all
_LASTING = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)  # no wait changes these
_LASTING_CODES = {errno.ELOOP, errno.ENAMETOOLONG}
_T = TypeVar("_T")


def retry(read: Callable[[], _T], name: Callable[[], str]) -> _T:
    """What `read` returns; it is called again, after longer and longer waits, while it raises a passing OSError.

    Args:
      read: to be called, without side effects.
      name: of what is read, for people; called when something went wrong only.

    Raises:
      DataError: it is gone, or this user may not read it.
      StorageError: the last try failed too.
    """
    for wait in WAITS:
        try:
            return read()
        except OSError as error:
            _raise_if_lasting(error, name)
            logging.warning("%s cannot be read (%s); trying again in %d s", name(), error, wait)
            time.sleep(wait)
    try:
        return read()
    except OSError as error:
        _raise_if_lasting(error, name)
        raise StorageError(
            f"{name()} cannot be read: {error}, {len(WAITS) + 1} times in {sum(WAITS)} s; check the storage, then "
            "start the same command again"
        ) from error


def _raise_if_lasting(error: OSError, name: Callable[[], str]) -> None:
    if isinstance(error, _LASTING) or error.errno in _LASTING_CODES:
        raise DataError(
            f"{name()} cannot be read: {error}; bring the file back or give this user access, then start again"
        ) from error
