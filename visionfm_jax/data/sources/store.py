"""Folders on a disk or in any store that fsspec knows (gs://, s3://, hf://, memory://), read at any offset.

Also the one file format of indices and selections: an array of records, then JSON, so that the array can be written
piece by piece and mapped into memory by every process, however large it is.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from visionfm_jax.errors import DataError, one_line, printable
from visionfm_jax.storage import replacing

_MAGIC = b"visionf2"
_TAIL = struct.Struct("<IIQ8s")  # CRC-32 of the array, CRC-32 and length of the JSON, _MAGIC
_BLOCK = 8 * 2**20  # bytes a store is asked for at once when a file is read from end to end
_CHANGES = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated", "created")  # what stores call it


class Store:
    """A folder; its methods may be called by any thread.

    Args:
      url: a path, or PROTOCOL://PATH.

    Raises:
      DataError: no such protocol or folder, or a package that it needs is not installed.
    """

    def __init__(self, url: str):
        self.url = url
        try:
            self._fs, self._root = fsspec.url_to_fs(os.path.expanduser(url))
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: cannot be opened ({error}); install the package, or write another path") from error
        self.local = isinstance(self._fs, LocalFileSystem)

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.url,)

    def path(self, name: str) -> str:
        """A file's path in its file system."""
        return f"{self._root.rstrip('/')}/{name}"

    def files(self) -> dict[str, tuple[int, str]]:
        """Name -> size in bytes and a stamp that changes with the content; sorted by name, folders left out.

        Raises:
          DataError: the folder is missing or cannot be read.
          OSError: the storage fails.
        """
        try:
            if self.local:
                with os.scandir(self._root) as entries:
                    stats = [(e.name, self._stat(e)) for e in entries]
                found = {n: (s.st_size, str(s.st_mtime_ns)) for n, s in stats if s and stat.S_ISREG(s.st_mode)}
            else:
                infos = [i for i in self._fs.ls(self._root, detail=True, refresh=True) if i["type"] == "file"]
                found = {i["name"].rpartition("/")[2]: (int(i["size"]), _stamp(i)) for i in infos}
        except FileNotFoundError:
            raise DataError(f"{self.url}: the path does not exist; set the dataset's path") from None
        except NotADirectoryError:
            raise DataError(f"{self.url}: is a file; set the path of the folder with the .tar files") from None
        except (DataError, OSError):
            raise
        except Exception as error:  # every store has its own
            raise DataError(
                f"{self.url}: cannot be read ({one_line(error)}); check the path and your access"
            ) from error
        return dict(sorted(found.items()))

    def _stat(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        try:
            return entry.stat()
        except OSError as error:
            if not entry.name.endswith(".tar"):  # nobody asks for it
                return None
            what = f"{self.path(printable(entry.name))}: is a broken link ({error.strerror})"
            raise DataError(f"{what}; fix or remove it") from error

    def read(self, name: str, start: int, stop: int) -> bytes:
        """Bytes [start, stop) of a file.

        Raises:
          OSError: they cannot be read.
          DataError: the file is shorter.
        """
        if self.local:
            file = _open_at_once(self.path(name), os.O_RDONLY)
            try:
                data = os.pread(file, stop - start, start)
            finally:
                os.close(file)
        else:
            try:
                data = self._fs.cat_file(self.path(name), start=start, end=stop)
            except OSError:
                raise
            except Exception as error:
                raise OSError(f"{name}: {one_line(error)}") from error
        if len(data) != stop - start:
            missing = f"{len(data):,} of the {stop - start:,} bytes from {start:,} on"
            raise DataError(f"{self.path(name)}: has only {missing}; it was cut or changed meanwhile; start again")
        return data

    def read_many(self, name: str, starts: Sequence[int], length: int) -> list[bytes]:
        """`length` bytes from each start: one open file, or requests side by side.

        Raises:
          OSError: one of them cannot be read.
        """
        if self.local:
            with open(self.path(name), "rb", buffering=0, opener=_open_at_once) as file:
                return [os.pread(file.fileno(), length, start) for start in starts]
        try:
            ends = [start + length for start in starts]
            return self._fs.cat_ranges([self.path(name)] * len(ends), list(starts), ends, on_error="raise")
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{name}: {one_line(error)}") from error

    def open(self, name: str) -> BinaryIO:
        """A file to be read with seeks; a store's in large blocks, for a request takes longer than skipped data."""
        if self.local:
            return open(self.path(name), "rb", buffering=0, opener=_open_at_once)
        return self._fs.open(self.path(name), "rb", block_size=_BLOCK)

    def fetch(self, name: str, path: Path) -> bool:
        """Copy a file of the folder to a local path, if there is one."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                self._fs.get_file(self.path(name), str(part))
        except Exception:
            return False
        return True

    def put(self, path: Path, name: str) -> bool:
        """Copy a local file into the folder, if this user may."""
        try:
            self._fs.put_file(str(path), self.path(name))
        except Exception:
            return False
        return True

    def cache(self, name: str) -> Path:
        """Where this user keeps `name` when it cannot be beside the data."""
        return cached(self._fs.unstrip_protocol(self._root), name)


def cached(url: str, name: str) -> Path:
    """Where this user keeps what is to be beside the data at `url`, when it cannot be there."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "visionfm_jax" / hashlib.sha256(url.encode()).hexdigest()[:16] / name


def write_table(path: Path, pieces: Iterable[np.ndarray], meta: Callable[[], dict[str, Any]]) -> None:
    """Write the pieces of an array end to end, then what `meta` gives once all are written, as JSON.

    Raises:
      OSError: the folder is missing or cannot be written, before any piece was taken; or the disk is full.
    """
    crc = 0
    with replacing(path) as part, part.open("wb") as file:
        for piece in pieces:
            data = np.ascontiguousarray(piece).tobytes()
            crc = zlib.crc32(data, crc)
            file.write(data)
        text = json.dumps(meta(), separators=(",", ":")).encode()
        file.write(text + _TAIL.pack(crc, zlib.crc32(text), len(text), _MAGIC))


def read_table(path: Path, dtype: Any, *, verify: bool, mapped: bool = True) -> tuple[np.ndarray, dict[str, Any]]:
    """The array of such a file and its `meta`.

    Args:
      path: the file.
      dtype: of the array.
      verify: read the array, and compare its checksum; else only that of `meta` is compared.
      mapped: map the array into memory, which all processes of a host then share; False: read it, as must be where the
        file may be replaced meanwhile, for on NFS the pages of a replaced file are gone.

    Raises:
      OSError: there is none, or it cannot be read.
      ValueError: it is no such file, of another version, or damaged.
    """
    with open(path, "rb") as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _TAIL.size))
        tail = file.read()
        crc, text_crc, length, magic = _TAIL.unpack(tail) if len(tail) == _TAIL.size else (0, 0, 0, b"")
        size = end - _TAIL.size - length
        dtype = np.dtype(dtype)
        if magic != _MAGIC or size < 0 or size % dtype.itemsize:
            raise ValueError("the file is damaged, or of another kind or version")
        count = size // dtype.itemsize
        file.seek(0)
        array = np.memmap(file, dtype, "r", shape=(count,)) if mapped and size else np.fromfile(file, dtype, count)
        file.seek(size)
        text = file.read(length)
    if zlib.crc32(text) != text_crc:
        raise ValueError("the file is damaged: its checksum differs")
    try:
        meta = json.loads(text)
    except RecursionError:
        meta = None
    if not isinstance(meta, dict):
        raise ValueError("the file does not say what it holds")
    if verify and zlib.crc32(array) != crc:
        raise ValueError("the file is damaged: its checksum differs")
    return array, meta


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a named pipe waits for its writer


def _stamp(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _CHANGES if info.get(key)), "")
