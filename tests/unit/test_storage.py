"""Storage that fails: for a moment, for long, and for ever."""

import errno
import math
import os

import pytest

from visionfm_jax import storage
from visionfm_jax.errors import DataError, OutputError, StorageError, UserError


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    seconds = []
    monkeypatch.setattr(storage.time, "sleep", seconds.append)
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
    assert storage.read(failing(times, error), lambda: "record 3") == "content"
    assert slept == waits


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "Stale file handle"), TimeoutError("no answer")])
def test_storage_that_fails_for_long_ends_the_run_for_another_try(slept, error):
    with pytest.raises(StorageError, match=r"^record 3 cannot be read: .*, 7 times in 63 s; check the storage, then"):
        storage.read(failing(7, error), lambda: "record 3")
    assert sum(slept) == 63


def test_what_was_tried_within_is_not_tried_again_around_it(slept):
    tar = failing(99, OSError(errno.EIO, "Input/output error"))
    with pytest.raises(StorageError, match=r"^a tar cannot be read: [^,]*, 7 times in 63 s; [^,]*, then [^,]*$"):
        storage.read(lambda: storage.read(tar, lambda: "a tar"), lambda: "the source")
    assert sum(slept) == 63


@pytest.mark.parametrize("code", [errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.EISDIR, errno.ELOOP])
def test_what_no_wait_mends_is_not_waited_for(slept, code):
    with pytest.raises(DataError, match=r"^record 3 cannot be read: .*; restore the file or give this user access"):
        storage.read(failing(1, OSError(code, "no")), lambda: "record 3")
    assert not slept


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_writing_ends_at_once_where_no_wait_helps(slept, tmp_path, code):
    with pytest.raises(OutputError, match=r"^cannot write .*/a: no; free space there or choose another folder by"):
        storage.write(failing(1, OSError(code, "no")), tmp_path / "a")
    assert not slept


def test_writing_is_tried_again_and_then_left_to_the_next_start(slept, tmp_path, capsys):
    error = OSError(errno.EIO, "Input/output error")
    assert storage.write(failing(2, error), tmp_path / "a") == "content"
    assert capsys.readouterr().err.splitlines() == [
        f"visionfm_jax: cannot write {tmp_path}/a: {error}; trying again in {wait} s" for wait in (1, 2)
    ]
    with pytest.raises(StorageError, match=r"^cannot write .*/a: .*, 7 times in 63 s; check the storage, then"):
        storage.write(failing(7, error), tmp_path / "a")
    assert StorageError.exit_code == 71


def test_a_file_takes_its_place_once_it_is_on_disk(tmp_path, monkeypatch):
    path, synced = tmp_path / "a", []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (sync(file), synced.append(path.exists())))
    storage.write_text(path, "first")
    assert synced == [False]
    fail = failing(1, OSError(errno.EIO, "no"))
    monkeypatch.setattr(os, "fsync", lambda file: fail())
    with pytest.raises(OSError, match="no"):
        storage.write_text(path, "second")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "first")]
    assert storage.read_bytes(path) == b"first"
    assert storage.read_bytes(tmp_path / "b") is None


def test_asking_whether_a_file_can_be_written_leaves_all_as_it_is(tmp_path):
    (tmp_path / "old").write_text("kept")
    for name in ("old", "new"):
        storage.check_writable(str(tmp_path / name), "--json")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old", "kept")]
    with pytest.raises(UserError, match="No such file or directory; name a file that can be written"):
        storage.check_writable(str(tmp_path / "no" / "new"), "--json")


def test_every_turned_bit_of_a_sealed_line_is_noticed():
    value = {"step": 3, "losses": [0.1 + 0.2, 1e-300, math.inf], "name": 'é "crc32": \\'}
    line = storage.seal(value)
    assert storage.unseal(line) == value
    for i in range(8 * len(line)):
        turned = bytearray(line.encode())
        turned[i // 8] ^= 1 << i % 8
        with pytest.raises(ValueError):  # noqa: PT011  of the decoder, the parser or the checksum
            storage.unseal(turned.decode())
    for other in ("{}", "[]", '{"step": 3}', "[" * 100_000, ""):
        with pytest.raises(ValueError):  # noqa: PT011
            storage.unseal(other)
