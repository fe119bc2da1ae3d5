"""Files and folders on a disk or in a store, with those methods of `pathlib.Path` that readers of datasets use."""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, BinaryIO

from visionfm_jax import storage
from visionfm_jax.data.sources.store import Entry, Store


class RemotePath:
    """A file or folder at or below the URL of a store: what `pathlib.Path` would be of it.

    It is answered from listings of whole folders (`Store.listing`), for asking after each file takes minutes.
    """

    def __init__(self, store: Store, below: PurePosixPath | None = None):
        self._store, self._below = store, below or PurePosixPath()

    def __str__(self) -> str:
        return f"{self._store.url.rstrip('/')}/{self._inside}" if self._inside else self._store.url

    def __truediv__(self, name: object) -> RemotePath:
        return RemotePath(self._store, PurePosixPath(os.path.normpath(self._below / str(name))))

    def __lt__(self, other: RemotePath) -> bool:
        return str(self) < str(other)

    @property
    def _inside(self) -> str:
        return "" if self._below == PurePosixPath() else str(self._below)

    @property
    def name(self) -> str:
        return self._below.name or self._store.url.rstrip("/").rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @property
    def path(self) -> str:
        return str(self)

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._store, self._below.parent)

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        return self._below.relative_to(other._below)

    def exists(self) -> bool:
        return self._entry() is not None

    def is_dir(self) -> bool:
        entry = self._entry()
        return entry is not None and entry.is_dir

    def is_file(self) -> bool:
        entry = self._entry()
        return entry is not None and not entry.is_dir

    def is_symlink(self) -> bool:
        return False

    def stat(self) -> Any:
        if (entry := self._entry()) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))
        return SimpleNamespace(st_size=entry.size)

    def iterdir(self) -> Iterator[RemotePath]:
        return (self / name for name in self._store.listing(self._inside))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        first, _, rest = pattern.partition("/")
        for entry in self.iterdir():
            if fnmatch.fnmatchcase(entry.name, first):
                yield from entry.glob(rest) if rest else (entry,)

    def read_bytes(self) -> bytes:
        folder, name = (self._store, self._inside) if self._inside else _at_root(self._store)
        return storage.retry(lambda: folder.content(name), lambda: f"{self} cannot be read")

    def read_text(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return io.TextIOWrapper(io.BytesIO(self.read_bytes()), encoding, errors).read()

    def open(self, mode: str = "rb") -> BinaryIO:
        del mode
        folder, name = (self._store, self._inside) if self._inside else _at_root(self._store)
        return folder.open(name)

    def _entry(self) -> Entry | None:
        if not self._inside:
            return self._store.kind()
        folder, _, name = self._inside.rpartition("/")
        return self._store.listing(folder).get(name)

    def store(self) -> Store:
        return self._store.within(self._inside) if self._inside else self._store


Place = Path | RemotePath


def place_of(path: str) -> Place:
    """What a path or URL names."""
    return RemotePath(Store(path)) if "://" in path else Path(path).expanduser()


def store_of(folder: Place | str) -> Store:
    """The store of a folder."""
    return folder.store() if isinstance(folder, RemotePath) else Store(str(folder))


def scandir(place: Place) -> contextlib.AbstractContextManager[Iterator[Any]]:
    """The entries of a folder, as `os.scandir` gives them."""
    return contextlib.nullcontext(place.iterdir()) if isinstance(place, RemotePath) else os.scandir(place)


def below(place: Place) -> list[str]:
    """Paths of the files in a folder and those within, sorted, without those whose name begins with a dot."""
    if isinstance(place, RemotePath):
        inner = ((e.name, below(e) if e.is_dir() else [""]) for e in place.iterdir())
        found = [f"{name}/{file}" if file else name for name, files in inner for file in files]
        return sorted(file for file in found if not os.path.basename(file).startswith("."))
    out = []
    for root, _, files in os.walk(place):
        folder = os.path.relpath(root, place)
        out += [file if folder == "." else f"{folder}/{file}" for file in files if not file.startswith(".")]
    return sorted(out)


def _at_root(store: Store) -> tuple[Store, str]:
    """The folder of a URL that names a file, and the file's name."""
    folder, _, name = store.url.rpartition("/")
    return Store(folder), name
