"""A CRC-32 of each image file of a dataset, in one file beside them, for loose files have no checksum of their own.

`visionfm data checksums` makes it, once; a source that finds it compares every file that it reads. A file
is found by a digest of its name, so that the order does not matter, and files that come later are the only ones to be
read then. It takes 28 bytes a file, in every process that reads images. It is no part of a dataset's fingerprint, so
that it may be made, or made again, in the midst of a run.
"""

from __future__ import annotations

import bisect
import urllib.parse
import zlib
from collections.abc import Iterable, Sized
from pathlib import Path
from typing import Protocol

import numpy as np
from absl import logging

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.store import Store, cached, digest_of, read_table
from visionfm_jax.errors import DataError

COMMAND = "visionfm data checksums"
VERSION = 1
RECORD = np.dtype([("name", "<u8"), ("size", "<u8"), ("stamp", "<i8"), ("crc", "<u4")])
"""Of a file: `digest_of` its name; size in bytes and time of change in ns, by which it is known whether it must be read
again; CRC-32. Sorted by the first."""


class ImageFiles(Sized, Protocol):
    """A source whose records are files; its configuration says so by `loose_files`."""

    name: str
    root: str  # the folder they are in

    def file(self, index: int) -> str:
        """Path of a record's file, below `root`."""
        ...

    def listing(self) -> str:
        """Digest of all names."""
        ...


class Checksums:
    """The checksums of a dataset; cheap to pickle.

    Raises:
      OSError: there is no such file, or it cannot be read.
      DataError: it is damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.records, meta = read_table(path, RECORD, verify=True, mapped=False)
            if meta.get("version") != VERSION:
                raise ValueError("the file is of another version")
        except ValueError as error:
            raise DataError(f"{path}: cannot be used ({error}); delete it, then run {COMMAND} again") from error
        self.listing = meta.get("files")  # of the source whose files are all in here
        self._names = self.records["name"]

    def __reduce__(self) -> tuple[type[Checksums], tuple[Path]]:
        return Checksums, (self.path,)

    def of(self, name: str) -> np.void | None:
        """RECORD of a file, if it is in here."""
        digest = digest_of(name)
        place = bisect.bisect_left(self._names, digest)
        return self.records[place] if place < len(self._names) and self._names[place] == digest else None

    def lacks(self, names: Iterable[str]) -> np.ndarray:
        """The places in `names` of the files that are not in here, in order."""
        return np.flatnonzero(~np.isin(np.fromiter(map(digest_of, names), np.uint64), self._names))

    def verify(self, name: str, content: bytes) -> None:
        """Compare the content of a file; one that is not in here passes.

        Raises:
          DamagedRecord: it is another.
        """
        record = self.of(name)
        if record is not None and zlib.crc32(content) != record["crc"]:
            raise DamagedRecord(
                f"it differs from its checksum in {self.path}: the file is damaged, or was changed on purpose; "
                f"if so, run {COMMAND} again"
            )


def places(config: SourceConfig) -> list[Path]:
    """Where the checksums of a source may be: beside the data, or in this user's cache."""
    split = urllib.parse.quote(config.split, safe="")
    folder = Path(config.path).expanduser().absolute()
    name = f"visionfm_{split}.checksums" if split else "visionfm.checksums"
    return [folder / name, cached(folder.as_uri(), name)]


def newest(config: SourceConfig) -> Checksums | None:
    """The checksums of a source, if there are any.

    Raises:
      DataError: they are damaged.
    """
    there = [path for path in places(config) if path.exists()]
    return Checksums(max(there, key=lambda path: path.stat().st_mtime_ns)) if there else None


def find(config: SourceConfig, source: ImageFiles) -> Checksums | None:
    """`newest`; the log says whether there are any, and which files lack one.

    Raises:
      DataError: they are damaged.
    """
    if "://" in config.path:  # stores have checksums of their own
        return None
    found = newest(config)
    if found is None:
        logging.warning(
            "%s: its files have no checksums, so a flipped bit may go unnoticed; %s makes them",
            source.name, COMMAND,
        )  # fmt: skip
        return None
    if found.listing == source.listing():
        logging.info("%s: its %d files are compared with %s", source.name, len(source), found.path)
        return found
    missing = found.lacks(map(source.file, range(len(source))))
    if len(missing):
        logging.warning(
            "%s: %d of %d files have no checksum in %s, the first is %s; run %s again",
            source.name, len(missing), len(source), found.path, source.file(int(missing[0])), COMMAND,
        )  # fmt: skip
    return found


def read_file(store: Store, name: str, checksums: Checksums | None) -> bytes:
    """The content of a file, compared with its checksum if there is one.

    Raises:
      OSError: it cannot be read.
      DamagedRecord: it differs.
    """
    content = store.content(name)
    if checksums is not None:
        checksums.verify(name, content)
    return content
