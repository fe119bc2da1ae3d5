"""Image files that a list names, below one folder: what the sources of such lists share."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources import checksums
from visionfm_jax.data.sources.fingerprint import digest, of_files
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES, describe
from visionfm_jax.data.sources.places import Place, store_of
from visionfm_jax.data.sources.record import left_out
from visionfm_jax.data.sources.store import Store, side_by_side
from visionfm_jax.errors import DataError, printable

_NAMED = 5  # files in a line of the log


class ListedFiles:
    """Image files below `root`, in the order of a list: shuffle them.

    Args:
      config: of the source, for errors and checksums.
      root: folder, or its URL.
      files: paths below it.

    Raises:
      DataError: a path leads elsewhere, or a file is not there.
    """

    num_classes = 0
    class_names: tuple[str, ...] | None = None
    has_captions = False
    most_captions = 0

    def __init__(self, config: SourceConfig, root: str | Place, files: Sequence[str]):
        self.name, self.root = describe(config), str(root)
        self.store = store_of(root)
        for file in files:
            if os.path.isabs(file) or ".." in file.split("/") or "\0" in file or not _encodable(file):
                raise DataError(f"{self.name}: {printable(file)!r} is no file of this folder; fix the list of images")
        self._files = np.array([os.fsencode(file) for file in files], np.bytes_)
        check_files(self.name, self.store, [os.fsdecode(bytes(file)) for file in self._files])
        self._checksums = checksums.find(config, self)

    def __len__(self) -> int:
        return len(self._files)

    def image(self, index: int) -> bytes:
        """The file's bytes."""
        return checksums.read_file(self.store, self.file(index), self._checksums)

    def key(self, index: int) -> str:
        """Path below the folder."""
        return printable(self.file(index))

    def file(self, index: int) -> str:
        """Path of a record's file below `root`."""
        if not 0 <= index < len(self._files):
            raise IndexError(f"{self.name}: record {index} of {len(self._files)}")
        return os.fsdecode(bytes(self._files[index]))

    def listing(self) -> str:
        """Digest of the files' names."""
        return digest(self._files)

    def fingerprint(self) -> dict[str, str]:
        """Of each thousand images."""
        starts = range(0, len(self), 1000)
        return of_files(self.store, {f"images from {i:,} on": ("", self._files[i : i + 1000].tolist()) for i in starts})

    def unlisted(self) -> list[str]:
        """Image files in the same folders that the list does not name, sorted."""
        keys = {os.fsdecode(bytes(file)) for file in self._files}
        return sorted(k for k in there(self.store, keys) - keys if os.path.splitext(k)[1].lower() in IMAGE_SUFFIXES)

    def log(self, left: Mapping[str, Sequence[str]]) -> None:
        """Write to the log what is left out: names by reason."""
        for reason, names in left.items():
            if names:
                logging.warning("%s: %s", self.name, left_out(reason, len(names), [*map(printable, names[:_NAMED])]))


def check_files(name: str, store: Store, keys: Sequence[str], what: str = "images") -> None:
    """That all files of a list are below a folder, which remembers them.

    Raises:
      DataError: some are not.
    """
    keys = [key for key in keys if "://" not in key]  # of a URL nobody knows until it is read
    found = there(store, set(keys))
    if missing := [key for key in keys if key not in found]:
        raise DataError(
            f"{name}: {len(missing)} of {len(keys)} {what} are missing, the first is "
            f"{printable(store.path(missing[0]))}; unpack the {what} there"
        )
    store.remember(keys)


def there(store: Store, keys: set[str]) -> set[str]:
    """What is in the folders of `keys`: these are listed, for asking after each file takes minutes on a network."""
    folders = sorted({os.path.dirname(key) for key in keys})
    names = map(store.names, folders) if store.local else side_by_side(store.names, folders)
    return {os.path.join(folder, name) for folder, found in zip(folders, names, strict=True) for name in found}


def read_json(
    config: SourceConfig,
    path: Place,
    parse: Callable[[Any], Any],
    needed: str,
    slim: Callable[[dict[str, Any]], Any] | None = None,
) -> Any:
    """What `parse` makes of a JSON file, each of whose objects `slim` replaces.

    Raises:
      DataError: the file is no JSON, or `parse` does not find in it what is needed.
      OSError: it cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=slim)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{describe(config)}: {path} is not valid JSON ({error}); copy or unpack it again") from error
    try:
        return parse(content)
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has another layout ({error})"
        raise DataError(f"{describe(config)}: {path} {what}; it needs {needed}") from error


def _encodable(name: str) -> bool:
    """Whether it holds no lone surrogate, which JSON may and names of files may not."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False
