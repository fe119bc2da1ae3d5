"""Folders on a disk or in any store that fsspec knows (gs://, s3://, https://, hf://, memory://): listed, and read
whole or at any offset.

What a store answers is the error of a file: one that a wait may mend (5xx, 429, a cut connection, no answer in time) is
an OSError that `storage.retry` waits for, one that it does not (404, 403, no credentials) is FileNotFoundError or
PermissionError. Stores keep connections open between requests, and what was read of one in `disk_cache`.

An http server gives no listing of a folder. There it is the file `LISTING` in it, or a pattern names the files:
https://HOST/{00000..00199}.tar.

Also the one file format of indices and selections: an array of records, then JSON, so that the array can be written
piece by piece and mapped into memory by every process, however large it is.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import io
import itertools
import json
import os
import re
import stat
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import fsspec
import fsspec.asyn
import numpy as np
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from visionfm_jax import storage
from visionfm_jax.data.sources import disk_cache
from visionfm_jax.errors import DataError, one_line, printable
from visionfm_jax.storage import replacing

LISTING = "files.txt"  # of an http server: of each file in the folder and below it a line PATH, tab, SIZE, tab, TIME
MAKE_LISTING = r"find . -type f -printf '%P\t%s\t%T@\n' > files.txt"
REQUESTS = 32  # that wait for a store side by side
CONNECTIONS = 128  # to one store that a process holds at most
ANSWER = 60.0  # seconds without a byte after which a request has failed
SLOWEST = 2**18  # bytes/s on the whole below which a connection is given up
_MAGIC = b"visionf2"
_TAIL = struct.Struct("<IIQ8s")  # CRC-32 of the array, CRC-32 and length of the JSON, _MAGIC
_BLOCK = 8 * 2**20  # bytes a store is asked for at once when a file is read from end to end
_MOST_LISTED = 2_000_000  # files in folders whose listing is kept
_CHANGES = ("ETag", "etag", "mtime", "LastModified", "Last-Modified", "updated", "created", "blob_id")
_AGAIN = (408, 425, 429)  # of http's errors 4xx those that may pass
_NO_ACCESS = (  # errors of clients, by name, for these packages may not be there
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "DefaultCredentialsError", "RefreshError",
    "GatedRepoError",
)  # fmt: skip
_PLACE = np.dtype([("name", "<u8"), ("size", "<i8"), ("stamp", "<u4")])
_S = TypeVar("_S")
_R = TypeVar("_R")


class Entry(NamedTuple):
    """What a listing says."""

    is_dir: bool
    size: int  # bytes
    stamp: str  # that changes with the content; "": not known


class Store:
    """A folder; its methods may be called by any thread, and it travels to other processes.

    Args:
      url: a path, or PROTOCOL://PATH; of tars also a pattern of their names, such as {00000..00199}.tar.

    Raises:
      DataError: no such protocol or folder, or a package that it needs is not installed.
    """

    def __init__(self, url: str):
        self.url = url
        folder, self.pattern = _parted(url)
        try:
            if "://" in folder:
                self._fs, self._root = fsspec.url_to_fs(folder, **_options(folder))
            else:
                self._fs, self._root = LocalFileSystem(), os.path.abspath(os.path.expanduser(folder or "."))
        except (ImportError, ValueError) as error:
            raise DataError(f"{url}: cannot be opened ({error}); install the package, or write another path") from error
        if hasattr(self._fs, "retries"):
            self._fs.retries = 1  # `storage.retry` asks again, and says so
        self.local = isinstance(self._fs, LocalFileSystem)
        self._known = np.zeros(0, _PLACE)
        self._listed: dict[str, dict[str, Entry]] = {}
        self._above: tuple[Store, str] | None = None
        self._lock = threading.Lock()

    def within(self, folder: str) -> Store:
        """A folder in this one, of a remote store, which shares its listings."""
        store = Store(f"{self.url.rstrip('/')}/{folder}")
        store._above = self, folder
        return store

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "known": self._known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["url"])
        self._known = state["known"]

    @property
    def _is_http(self) -> bool:
        return self.url.startswith(("http://", "https://"))

    def path(self, name: str) -> str:
        """A file's path in its file system."""
        return f"{self._root.rstrip('/')}/{name}" if name else self._root

    # --- what is there ---

    def files(self) -> dict[str, tuple[int, str]]:
        """Name -> size in bytes and a stamp that changes with the content; sorted by name, folders left out.

        Raises:
          DataError: the folder is missing or cannot be read, or lacks a file of the pattern.
          OSError: the storage fails.
        """
        try:
            found = self._named(self.pattern) if self.pattern and self._is_http else self._files()
        except FileNotFoundError:
            raise DataError(f"{self.url}: the path does not exist; set the dataset's path") from None
        except NotADirectoryError:
            raise DataError(f"{self.url}: is a file; set the path of the folder with the .tar files") from None
        except PermissionError as error:
            raise DataError(
                f"{self.url}: cannot be read ({one_line(error)}); check the path and your access"
            ) from error
        if self.pattern:
            names = _expanded(self.url, self.pattern)
            if missing := [name for name in names if name not in found]:
                more = f"{len(missing)} of {len(names)} files are missing, the first is {missing[0]}"
                raise DataError(f"{self.url}: {more}; copy them there, or correct the pattern")
            found = {name: found[name] for name in names}
        return dict(sorted(found.items()))

    def _files(self) -> dict[str, tuple[int, str]]:
        if self.local:
            with os.scandir(self._root) as entries:
                stats = [(e.name, self._stat(e)) for e in entries]
            return {n: (s.st_size, str(s.st_mtime_ns)) for n, s in stats if s and stat.S_ISREG(s.st_mode)}
        with self._lock:
            self._listed.clear()
        found = {name: entry[1:] for name, entry in self._list("").items() if not entry.is_dir}
        if not found and not self.listing(""):
            raise FileNotFoundError
        return found

    def _named(self, pattern: str) -> dict[str, tuple[int, str]]:
        """The files of a pattern, each asked after."""

        def state(name: str) -> tuple[str, tuple[int, str]]:
            info = storage.retry(lambda: self._ask("info", self.path(name)), lambda: self.path(name))
            if info.get("size") is None:
                raise DataError(f"{self.path(name)}: the server does not say its size; use one that does, or copy it")
            return name, (int(info["size"]), _stamp(info))

        return dict(side_by_side(state, _expanded(self.url, pattern)))

    def _stat(self, entry: os.DirEntry[str]) -> os.stat_result | None:
        try:
            return entry.stat()
        except OSError as error:
            if not entry.name.endswith(".tar"):  # nobody asks for it
                return None
            what = f"{self.path(printable(entry.name))}: is a broken link ({error.strerror})"
            raise DataError(f"{what}; fix or remove it") from error

    def listing(self, folder: str) -> dict[str, Entry]:
        """What is in a folder of a remote store, by name; empty: there is no such folder. It is asked for once.

        Raises:
          DataError, OSError, StorageError: it cannot be read.
        """
        if self._above:
            above, place = self._above
            return above.listing(f"{place}/{folder}" if folder else place)
        if (found := self._listed.get(folder)) is None:
            try:
                found = storage.retry(lambda: self._list(folder), lambda: f"{self.path(folder)} cannot be listed")
            except FileNotFoundError:
                found = {}
            with self._lock:
                self._listed[folder] = found
                while len(self._listed) > 1 and sum(map(len, self._listed.values())) > _MOST_LISTED:
                    self._listed.pop(next(iter(self._listed)))
        return found

    def _list(self, folder: str) -> dict[str, Entry]:
        if self._is_http:
            return self._tree().get(folder, {})
        path = self.path(folder)
        infos = self._ask("ls", path, detail=True, refresh=True)
        inside = [(info["name"].rstrip("/").rpartition("/")[2], info) for info in infos]
        own = self._fs._strip_protocol(path).rstrip("/")  # a marker of the folder, or a file that has its name
        return {
            name: Entry(info["type"] == "directory", int(info["size"] or 0), _stamp(info))
            for name, info in sorted(inside, key=lambda one: one[0])
            if info["name"].rstrip("/") != own
        }

    def _tree(self) -> dict[str, dict[str, Entry]]:
        """All folders of an http server, as `LISTING` says."""
        try:
            content = self._ask("cat_file", self.path(LISTING))
        except FileNotFoundError:
            where = f"{self.url}: an http server does not list its files, and there is no {LISTING} that does"
            raise DataError(f"{where}; make it there: {MAKE_LISTING}") from None
        tree: dict[str, dict[str, Entry]] = {"": {}}
        for number, line in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
            path, *more = line.rstrip("\n").split("\t")
            if len(more) != 2 or not more[0].isdecimal() or path.startswith("/") or ".." in path.split("/"):
                where = f"{self.path(LISTING)}: line {number} is not PATH, tab, SIZE, tab, TIME"
                raise DataError(f"{where}; make it again: {MAKE_LISTING}")
            folder, _, name = path.rpartition("/")
            if name in tree.get(folder, {}):
                raise DataError(f"{self.path(LISTING)}: line {number} names {printable(path)!r} again; remove it")
            tree.setdefault(folder, {})[name] = Entry(False, int(more[0]), more[1])
            while folder:
                inner, (folder, _, name) = folder, folder.rpartition("/")
                tree.setdefault(folder, {})[name] = Entry(True, 0, "")
                tree.setdefault(inner, {})
        with self._lock:
            self._listed.update(tree)
        return tree

    def kind(self) -> Entry | None:
        """What lies at the URL itself: a folder or a file; None: nothing."""
        if self._is_http:
            return Entry(True, 0, "") if self.listing("") else None
        try:
            info = storage.retry(lambda: self._ask("info", self._root), lambda: f"{self.url} cannot be read")
        except FileNotFoundError:
            return None
        return Entry(info["type"] == "directory", int(info.get("size") or 0), _stamp(info))

    def names(self, folder: str) -> list[str]:
        """Names in a folder, without broken links; none: there is no such folder."""
        if not self.local:
            return list(self.listing(folder))
        if not os.path.isdir(path := os.path.join(self._root, folder)):
            return []
        with os.scandir(path) as entries:
            return [e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)]

    def sizes(self, folder: str, names: Sequence[str]) -> np.ndarray:
        """int64 (N,), bytes of files in a folder.

        Raises:
          OSError: one of them is not there.
        """
        if self.local:
            path = os.path.join(self._root, folder)
            sizes = (0 if "://" in name else os.stat(os.path.join(path, name)).st_size for name in names)  # 0: a URL's
            return np.fromiter(sizes, np.int64, len(names))
        out = np.zeros(len(names), np.int64)
        for i, name in enumerate(names):
            if "://" not in name:  # of a URL its size is not asked for
                out[i] = self._entry(f"{folder}/{name}" if folder else name).size
        return out

    def _entry(self, name: str) -> Entry:
        folder, _, file = name.rpartition("/")
        if (found := self.listing(folder).get(file)) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name))
        return found

    def remember(self, names: Iterable[str]) -> None:
        """Keep of files of a remote store, as they are listed, what `content` and the cache need: 20 bytes of each."""
        if not self.local:
            self.remember_all((name, *self._entry(name)[1:]) for name in names)

    def remember_all(self, files: Iterable[tuple[str, int, str]]) -> None:
        """As `remember`, of (name, size, stamp)."""
        if self.local:
            return
        rows = [(digest_of(name), size, zlib.crc32(stamp.encode()) if stamp else 0) for name, size, stamp in files]
        both = np.concatenate([self._known, np.array(rows, _PLACE)])
        self._known = both[np.unique(both["name"], return_index=True)[1]]

    def _place(self, name: str) -> tuple[int, int] | None:
        """Size and stamp of a file that is remembered."""
        digest = np.uint64(digest_of(name))
        i = int(np.searchsorted(self._known["name"], digest))
        if i == len(self._known) or self._known["name"][i] != digest:
            return None
        return int(self._known["size"][i]), int(self._known["stamp"][i])

    # --- what is in it ---

    def content(self, name: str) -> bytes:
        """A file, whole.

        Raises:
          OSError: it cannot be read.
          DataError: it has another size than when it was remembered.
        """
        if self.local:
            with open(os.path.join(self._root, name), "rb", buffering=0) as file:  # one read of all of it
                return file.read()
        place = self._place(name)
        return self._ask("cat_file", self.path(name)) if place is None else self.read(name, 0, place[0])

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
            place = self._place(name)
            kept = place is not None and place[1] and not isinstance(self._fs, MemoryFileSystem)
            key = f"{self._fs.unstrip_protocol(self.path(name))} {place} {start} {stop}" if kept else ""
            if (data := disk_cache.get(key)) is None:
                data = self._range(self.path(name), start, stop)
                if len(data) == stop - start:
                    disk_cache.put(key, data)
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
        path = self.path(name)

        def read(start: int) -> bytes:
            """Asked for again by itself: of thousands of requests one fails now and then."""
            return storage.retry(lambda: self._range(path, start, start + length), lambda: path)

        return side_by_side(read, starts)

    def open(self, name: str, size: int | None = None, keep: bool = False) -> BinaryIO:
        """A file to be read with seeks; a store's in large blocks, for a request takes longer than skipped data.

        Args:
          name: of the file.
          size: in bytes, if it is known.
          keep: what is read, in the cache on disk; else what is read once does not push the rest out of it.
        """
        if self.local:
            return open(self.path(name), "rb", buffering=0, opener=_open_at_once)
        if size is None and (place := self._place(name)):
            size = place[0]
        if size is None:
            size = storage.retry(lambda: self._ask("size", self.path(name)), lambda: self.path(name))
        return io.BufferedReader(_Blocks(self, name, size, keep), 2**16)

    def _range(self, path: str, start: int, stop: int) -> bytes:
        """Fewer bytes where the file ends."""
        if start == stop:
            return b""
        try:
            data = self._ask("cat_file", path, start=start, end=stop, bytes_wanted=stop - start)
        except OSError as error:
            if error.errno == errno.EINVAL:  # 416: it ends before
                return b""
            raise
        if len(data) > stop - start:
            raise DataError(f"{path}: the server gives no parts of files; use one that knows Range, or copy the files")
        return data

    def _ask(self, method: str, *arguments: Any, bytes_wanted: int = 0, **more: Any) -> Any:
        """What a method of the file system returns.

        Raises:
          OSError: as this module says.
        """
        try:
            if method == "cat_file" and self._fs.async_impl:
                seconds = ANSWER + bytes_wanted / SLOWEST if bytes_wanted else 10 * ANSWER
                return fsspec.asyn.sync(self._fs.loop, self._fs._cat_file, *arguments, **more, timeout=seconds)
            return getattr(self._fs, method)(*arguments, **more)
        except TimeoutError as error:
            raise OSError(errno.ETIMEDOUT, one_line(error) if str(error) else "no answer in time") from error
        except (DataError, OSError):
            raise
        except Exception as error:  # every store has its own
            raise _as_os_error(error) from error

    # --- what is put beside it ---

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
        return cached(self._fs.unstrip_protocol(self._root) + (f"/{self.pattern}" if self.pattern else ""), name)


class _Blocks(io.RawIOBase):
    """A file of a store, read in blocks, each of which is asked for again when storage fails for a moment."""

    def __init__(self, store: Store, name: str, size: int, keep: bool):
        self._size, self._path = size, store.path(name)
        self._read = functools.partial(store.read, name) if keep else functools.partial(store._range, self._path)
        self._at, self._first, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def _whole(self, start: int, stop: int) -> bytes:
        """A block; a shorter answer, such as the page of a login, is no end of the file, whose size is known."""
        block = self._read(start, stop)
        if len(block) != stop - start:
            raise OSError(errno.EIO, f"{len(block):,} bytes came of the {stop - start:,} from {start:,} on")
        return block

    def readinto(self, buffer: Any) -> int:
        if not 0 <= self._at - self._first < len(self._block) and self._at < self._size:
            start, stop = self._at, min(self._at + _BLOCK, self._size)
            self._block = storage.retry(lambda: self._whole(start, stop), lambda: self._path)
            self._first = start
        offset = self._at - self._first
        piece = self._block[offset : offset + len(buffer)] if offset >= 0 else b""
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


def side_by_side(function: Callable[[_S], _R], items: Iterable[_S]) -> list[_R]:
    """`function` of each item, in order, by threads that wait for storage."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(function, items))


def _parted(url: str) -> tuple[str, str]:
    """A folder, and the pattern of names of tars in it; "": the URL has none."""
    folder, slash, name = url.rpartition("/")
    return (folder + slash, name) if name.endswith(".tar") and re.search(r"\{.*\}", name) else (url, "")


def _expanded(url: str, pattern: str) -> list[str]:
    """The names that a pattern stands for, as a shell's braces: {00..12} are numbers of equal width, {a,b} either.

    Raises:
      DataError: it names a file twice, or far too many.
    """
    choices: list[Sequence[str]] = []
    for part in re.split(r"(\{[^{}]*\})", pattern):
        if numbers := re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", part):
            first, last = numbers.groups()
            choices.append([f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)])
        else:
            choices.append(part[1:-1].split(",") if part[:1] == "{" else [part])
    if np.prod([float(len(choice)) for choice in choices]) > 10_000_000:
        raise DataError(f"{url}: the pattern stands for more than 10,000,000 files; correct it")
    names = ["".join(parts) for parts in itertools.product(*choices)]
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise DataError(f"{url}: the pattern names {twice} twice; correct it")
    return names


def _options(url: str) -> dict[str, Any]:
    """How a client of a store waits, and how many connections it keeps."""
    protocol = url.partition("://")[0]
    if protocol in ("s3", "s3a"):
        client = {"connect_timeout": 10, "read_timeout": ANSWER, "max_pool_connections": CONNECTIONS}
        return {"config_kwargs": {**client, "retries": {"max_attempts": 0}}, "use_listings_cache": False}
    if protocol in ("http", "https"):
        import aiohttp  # of fsspec[http]

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=ANSWER)
        return {"client_kwargs": {"timeout": timeout}, "use_listings_cache": False}
    return {"use_listings_cache": False} if protocol in ("gs", "gcs") else {}


def _as_os_error(error: Exception) -> OSError:
    """What a client raises, as the error of a file."""
    found = (getattr(error, "status", 0), getattr(error, "code", 0))
    status = next((s for s in (*found, getattr(getattr(error, "response", 0), "status_code", 0)) if _is_status(s)), 0)
    text = one_line(error) if str(error) else type(error).__name__
    if status in (404, 410):
        return FileNotFoundError(errno.ENOENT, text)
    if status == 416:
        return OSError(errno.EINVAL, text)
    if (400 <= status < 500 and status not in _AGAIN) or type(error).__name__ in _NO_ACCESS:
        return PermissionError(errno.EACCES, text)
    return OSError(text)


def _is_status(value: Any) -> bool:
    return isinstance(value, int) and 400 <= value < 600


def digest_of(name: str) -> int:
    """64 bits: two of 14 million files share them once in 180,000 datasets; one would then be called damaged."""
    return int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "little")


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


def is_table(path: Path) -> bool:
    """Whether a file ends as those of `write_table`."""
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - len(_MAGIC)))
        return file.read() == _MAGIC


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # else a named pipe waits for its writer


def _stamp(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in _CHANGES if info.get(key)), "")
