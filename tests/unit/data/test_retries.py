"""Storage that fails: for a moment, for long, and for ever."""

import errno

import pytest

from visionfm_jax.data.sources import retries
from visionfm_jax.errors import DataError, StorageError


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    seconds = []
    monkeypatch.setattr(retries.time, "sleep", seconds.append)
    return seconds


def failing(times: int, error: OSError):
    """Raises `error` as often, then gives "content"."""
    left = [times]

    def read() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return "content"

    return read


@pytest.mark.parametrize(("times", "waits"), [(0, []), (1, [1]), (6, [1, 2, 4, 8, 16, 32])])
def test_storage_that_fails_for_a_moment_is_asked_again(slept, times, waits):
    error = OSError(errno.EIO, "Input/output error")
    assert retries.retry(failing(times, error), lambda: "record 3") == "content"
    assert slept == waits


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), TimeoutError("no answer")])
def test_storage_that_fails_for_long_ends_the_run_for_another_try(slept, error):
    with pytest.raises(StorageError, match=r"^record 3 cannot be read: .*, 7 times in 63 s; check the storage, then"):
        retries.retry(failing(7, error), lambda: "record 3")
    assert sum(slept) == 63


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ELOOP])
def test_what_no_wait_mends_is_not_waited_for(slept, code):
    with pytest.raises(DataError, match=r"^record 3 cannot be read: .*; bring the file back or give this user access"):
        retries.retry(failing(1, OSError(code, "no")), lambda: "record 3")
    assert not slept
