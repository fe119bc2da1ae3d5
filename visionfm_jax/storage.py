"""Files on storage that fails for a moment or for good: tried again, written whole or not at all, and checked.

What fails for a moment (a server that is restarted, a network that is overloaded) is asked again with longer and longer
waits, then ends the program so that a scheduler starts it again; what no wait changes is an error for people at once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import json
import os
import secrets
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from visionfm_jax.errors import DataError, OutputError, StorageError, UserError, complain

WAITS = (1, 2, 4, 8, 16, 32)  # seconds before each further try: a minute in all
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_LASTING = {
    *FULL, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ESPIPE
}  # fmt: skip
_LASTING_KINDS = (FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError)
# For errors that come as text alone, as TensorStore's do.
_FULL_TEXTS = tuple(map(os.strerror, FULL))
_PASSING_TEXTS = tuple(
    os.strerror(getattr(errno, name))
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "EINTR", "EBUSY", "ECONNRESET", "ECONNABORTED", "ECONNREFUSED",
        "ENOTCONN", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH", "ENETRESET", "EREMOTEIO",
    )
)  # fmt: skip
CHECKSUM = "crc32"  # of a sealed line: that of the text before this entry
_T = TypeVar("_T")


class _LastError(StorageError):
    """The last try has failed too: who tries around it does not begin again."""


def check_writable(path: str, flag: str) -> None:
    """Before the minutes of work whose result goes to `path`, as `flag` asks; no file stays that was not there.

    Raises:
      UserError: it cannot be written.
    """
    try:
        with open(path, "a") if Path(path).exists() else tempfile.TemporaryFile(dir=Path(path).resolve().parent):
            pass
    except OSError as error:
        raise UserError(f"{flag}={path}: {error.strerror}; name a file that can be written") from error


def retry(act: Callable[[], _T], failed: Callable[[], str]) -> _T:
    """What `act` returns; it is called again, after longer and longer waits, while storage fails for a moment.

    Args:
      act: may raise OSError, or StorageError where it has judged itself that the cause may pass.
      failed: what has failed, for people, as "FILE cannot be read"; called when something went wrong only.

    Raises:
      OSError: one that no wait changes, as it came.
      StorageError: the last try failed too.
    """
    for wait in (*WAITS, None):
        try:
            return act()
        except (OSError, StorageError) as error:
            if _is_lasting(error):
                raise
            if wait is None:
                raise _LastError(
                    f"{failed()}: {error}, {len(WAITS) + 1} times in {sum(WAITS)} s; check the storage, then start the "
                    "same command again"
                ) from error
            announce(f"{failed()}: {error}", wait)
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def read(act: Callable[[], _T], name: Callable[[], str]) -> _T:
    """As `retry`, of reading what `name` gives for people.

    Raises:
      DataError: it is gone, or this user may not read it.
      StorageError: the last try failed too.
    """
    try:
        return retry(act, lambda: f"{name()} cannot be read")
    except OSError as error:
        raise DataError(
            f"{name()} cannot be read: {error}; restore the file or give this user access, then start again"
        ) from error


def read_bytes(path: Path) -> bytes | None:
    """The content of a file of a run folder; None: there is no such file.

    Raises:
      DataError, StorageError: as `read`.
    """

    def content() -> bytes | None:
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        return None

    return read(content, lambda: str(path))


def write(act: Callable[[], _T], path: Path) -> _T:
    """As `retry`, of writing a file of the run folder.

    Raises:
      OutputError: no space, or no permission.
      StorageError: the last try failed too.
    """
    try:
        return retry(act, lambda: f"cannot write {path}")
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError, lost: str = "") -> OutputError:
    """The error for people; `lost` says what it costs."""
    return OutputError(
        f"cannot write {path}: {error.strerror or error}; {lost}free space there or choose another folder by "
        "config.workdir"
    )


def not_written(where: str, error: OSError) -> UserError:
    """The error for people, of a place that they have named; of a full disk that of `unwritable`."""
    kind = OutputError if error.errno in FULL else UserError
    remedy = "free space there, or name another place" if kind is OutputError else "name a place that can be written"
    return kind(f"{where}: {error.strerror or error}; {remedy}")


@contextlib.contextmanager
def writing(where: str) -> Iterator[None]:
    """What is written in it to a place that people have named, such as "--out=FOLDER".

    Raises:
      UserError: it cannot be.
    """
    try:
        yield
    except OSError as error:
        raise not_written(where, error) from error


def announce(failure: str, wait: float) -> None:
    """Say that there will be another try."""
    complain(f"{failure}; trying again in {wait:g} s")


def is_passing(text: str) -> bool:
    """Whether an error that says this may pass by itself."""
    return any(sign in text for sign in _PASSING_TEXTS)


def is_full(text: str) -> bool:
    """Whether an error that says this is of a full disk."""
    return any(sign in text for sign in _FULL_TEXTS)


def _is_lasting(error: OSError | StorageError) -> bool:
    return isinstance(error, (*_LASTING_KINDS, _LastError)) or getattr(error, "errno", None) in _LASTING


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path`, which takes its place once it is on disk, if all went well.

    Nobody ever sees half a file, whoever else writes it at the same time, also after the machine has lost power. The
    file is locked, where the file system has locks, for as long as its process lives: see `remove_unfinished`.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with part.open("xb") as file:
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield part
            with part.open("r+b") as written:
                os.fsync(written.fileno())
            part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which takes its place with all that is in it, if all went well.

    `path` is not there, or an empty folder; those above it are made.

    Raises:
      OSError: it cannot be written, or somebody else has filled `path` in the meantime.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    part.mkdir()
    try:
        yield part
        for file in part.iterdir():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
        part.replace(path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def remove_unfinished(path: Path) -> None:
    """Remove what processes that have died left of `path` (`replacing`), and nothing of one that was stopped."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{16 * '[0-9a-f]'}"):
        with contextlib.suppress(OSError), part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all.

    Raises:
      OSError: it cannot be written.
    """
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, behind the end of a line that was cut off while it was written.

    Raises:
      OSError: it cannot be written.
    """
    with open(path, "a+b") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode() + b"\n")


def seal(value: Mapping[str, Any]) -> str:
    """A line of JSON, `value` with a checksum of itself as the last entry; of at least one entry."""
    return _sealed(json.dumps(value).removesuffix("}"))


def unseal(line: str) -> dict[str, Any]:
    """What `seal` was given.

    Raises:
      ValueError: it is something else.
    """
    try:
        value = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    body = line.rpartition(f', "{CHECKSUM}": ')[0]
    if not isinstance(value, dict) or line != _sealed(body):
        raise ValueError("its checksum differs")
    del value[CHECKSUM]
    return value


def _sealed(body: str) -> str:
    return f'{body}, "{CHECKSUM}": "{zlib.crc32(body.encode()):08x}"}}'
