"""Class folders of images: PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE with split "".

Labels count the sorted class names. So that a split which lacks a class still gets the others' ids, the classes are
those of all splits that share a class with the one asked for; other folders beside the splits do not count.

A class folder that cannot be read is refused: without it other labels would change. Of what lies in class folders and
is no image file of a known kind, the log tells the number and names.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from absl import logging

from visionfm_jax.data.sources import checksums
from visionfm_jax.data.sources.fingerprint import digest, of_files
from visionfm_jax.data.sources.kinds import FolderConfig
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES, check_path, class_splits, describe, misfit, no_split
from visionfm_jax.data.sources.places import Place, RemotePath, scandir, store_of
from visionfm_jax.data.sources.record import left_out
from visionfm_jax.data.sources.store import side_by_side
from visionfm_jax.errors import DataError, printable

_NAMED = 5  # names of files that are not read, in a line of the log
_KINDS = 10  # reasons why files are not read that are counted apart


class FolderSource:
    """Image files, in order of class and name: shuffle them."""

    has_captions = False
    most_captions = 0

    def __init__(self, config: FolderConfig):
        self.name = describe(config)
        path = check_path(config)
        if not path.is_dir():
            raise misfit(config, "PATH/SPLIT/CLASS/FILE")
        if config.split and not (path / config.split).is_dir():
            if splits := class_splits(path):
                raise no_split(config, splits)
            raise misfit(config, "PATH/SPLIT/CLASS/FILE")
        place = path / config.split
        self.root = str(place)
        self.store = store_of(place)
        self.folders = _class_names(path, config.split)
        self.class_names: tuple[str, ...] | None = self.folders
        self.num_classes = len(self.folders)
        others: dict[str, list[str]] = {}
        if isinstance(place, RemotePath):  # many requests, side by side
            side_by_side(lambda name: [*(place / name).iterdir()], self.folders)
        files = [self._images(place / name, others) for name in self.folders]
        if not any(files):
            raise misfit(config, "PATH/SPLIT/CLASS/FILE" if config.split else "PATH/CLASS/FILE")
        for reason, names in others.items():
            logging.warning("%s: %s", self.name, left_out(reason, len(names), [printable(n) for n in names[:_NAMED]]))
        # Arrays, not lists: an index of millions of files travels to every worker process.
        self._files = np.array([file for names in files for file in names])
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])
        self.store.remember(map(self.file, range(len(self))))
        self._checksums = checksums.find(config, self)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes and its class."""
        image = checksums.read_file(self.store, self.file(index), self._checksums)
        return {"image": image, "label": int(self._labels[index])}

    @property
    def labels(self) -> np.ndarray:
        """(N,), of all records."""
        return self._labels

    def key(self, index: int) -> str:
        """CLASS/FILE."""
        return printable(self.file(index))

    def file(self, index: int) -> str:
        """Path of a record's file below `root`."""
        if not 0 <= index < len(self._files):
            raise IndexError(f"{self.name}: record {index} of {len(self._files)}")
        return os.path.join(self.folders[self._labels[index]], os.fsdecode(bytes(self._files[index])))

    def listing(self) -> str:
        """Digest of the files' names."""
        return digest(repr(self.folders).encode(), self._labels, self._files)

    def fingerprint(self) -> dict[str, str]:
        """Of each class folder."""
        ends = np.searchsorted(self._labels, np.arange(self.num_classes + 1))
        files = {n: (n, self._files[ends[i] : ends[i + 1]].tolist()) for i, n in enumerate(self.folders)}
        return of_files(self.store, files)

    def _images(self, folder: Place, others: dict[str, list[str]]) -> list[bytes]:
        """Names of the image files of a class, sorted; what else there is goes to `others`, by reason."""
        if not folder.is_symlink() and not folder.exists():  # a class of another split
            return []
        images = []
        with scandir(folder) as entries:
            for e in entries:
                if reason := _why_no_image(e):
                    if reason not in others and len(others) >= _KINDS:
                        reason = "files of other kinds"
                    others.setdefault(reason, []).append(f"{folder.name}/{e.name}")
                else:
                    images.append(os.fsencode(e.name))
        return sorted(images)


def _why_no_image(entry: os.DirEntry[str] | RemotePath) -> str:
    """What an entry of a class folder is; empty: an image file."""
    if _leads_nowhere(entry):
        return "broken links"
    if entry.is_dir():
        return "folders within class folders"
    if entry.name.startswith("."):
        return "files whose name begins with a dot"
    suffix = os.path.splitext(entry.name)[1].lower()
    if suffix not in IMAGE_SUFFIXES:
        return f"{printable(suffix)} files" if suffix else "files without an extension"
    return "" if entry.is_file() else "devices, pipes or sockets"


def _leads_nowhere(entry: os.DirEntry[str] | RemotePath) -> bool:
    """Whether it is a link to something that is not there, or a link in a circle."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def _folders(path: Place) -> list[str]:
    """Names of the folders in `path`, without hidden ones, sorted.

    Raises:
      DataError: a link leads nowhere, so that nobody knows whether it is a folder.
      OSError: the folder cannot be read.
    """
    with scandir(path) as entries:
        seen = [e for e in entries if not e.name.startswith(".")]
    if lost := [e.name for e in seen if _leads_nowhere(e)]:
        raise DataError(f"{printable(str(path / min(lost)))}: is a broken link; fix or remove it")
    return sorted(e.name for e in seen if e.is_dir())


def _class_names(path: Place, split: str) -> tuple[str, ...]:
    classes = set(_folders(path / split))
    if split and os.sep not in split:
        with scandir(path) as entries:
            others = sorted(e.name for e in entries if not e.name.startswith(".") and (e.is_symlink() or e.is_dir()))
        for other in others:
            try:
                names = set(_folders(path / other))
            except NotADirectoryError:
                continue
            except (OSError, DataError) as error:
                logging.warning("%s cannot be read (%s); its classes do not count", path / other, error)
                continue
            classes |= names if names & classes else set()
    return tuple(sorted(classes))
