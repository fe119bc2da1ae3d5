"""Class folders of images: PATH/SPLIT/CLASS/FILE, or PATH/CLASS/FILE with split "".

Labels count the sorted class names. So that a split which lacks a class still gets the others' ids, the classes are
those of all splits that share a class with the one asked for; other folders beside the splits do not count.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.fingerprint import of_files
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES, check_path, class_splits, describe, misfit, no_split


class FolderSource:
    """Image files, in order of class and name: shuffle them."""

    has_captions = False
    most_captions = 0

    def __init__(self, config: SourceConfig):
        self.name = describe(config)
        path = check_path(config)
        if not path.is_dir():
            raise misfit(config, "PATH/SPLIT/CLASS/FILE")
        if config.split and not (path / config.split).is_dir():
            if splits := class_splits(path):
                raise no_split(config, splits)
            raise misfit(config, "PATH/SPLIT/CLASS/FILE")
        self._root = str(path / config.split)
        self.class_names: tuple[str, ...] | None = _class_names(path, config.split)
        self.num_classes = len(self.class_names)
        files = [_images(os.path.join(self._root, name)) for name in self.class_names]
        if not any(files):
            raise misfit(config, "PATH/SPLIT/CLASS/FILE" if config.split else "PATH/CLASS/FILE")
        # Arrays, not lists: an index of millions of files travels to every worker process.
        self._files = np.array([file for names in files for file in names])
        self._labels = np.repeat(np.arange(len(files), dtype=np.int32), [len(names) for names in files])

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes and its class."""
        with open(os.path.join(self._root, self.key(index)), "rb") as file:
            return {"image": file.read(), "label": int(self._labels[index])}

    def key(self, index: int) -> str:
        """CLASS/FILE."""
        if not 0 <= index < len(self._files):
            raise IndexError(f"{self.name}: record {index} of {len(self._files)}")
        assert self.class_names is not None
        return os.path.join(self.class_names[self._labels[index]], os.fsdecode(bytes(self._files[index])))

    def fingerprint(self) -> dict[str, str]:
        """Of each class folder."""
        assert self.class_names is not None
        ends = np.searchsorted(self._labels, np.arange(self.num_classes + 1))
        files = {n: (n, self._files[ends[i] : ends[i + 1]].tolist()) for i, n in enumerate(self.class_names)}
        return of_files(self._root, files)


def _folders(path: Path) -> list[str]:
    """Names of the folders in `path`, without hidden ones, sorted."""
    with os.scandir(path) as entries:
        return sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())


def _images(folder: str) -> list[bytes]:
    """Names of the image files in `folder`, sorted; none if there is no such folder."""
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        names = [
            e.name
            for e in entries
            if os.path.splitext(e.name)[1].lower() in IMAGE_SUFFIXES and not e.name.startswith(".") and e.is_file()
        ]
    return sorted(map(os.fsencode, names))


def _class_names(path: Path, split: str) -> tuple[str, ...]:
    classes = set(_folders(path / split))
    if split and os.sep not in split:
        for other in _folders(path):
            names = set(_folders(path / other))
            classes |= names if names & classes else set()
    return tuple(sorted(classes))
