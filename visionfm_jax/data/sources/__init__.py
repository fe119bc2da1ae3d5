"""Datasets with random access: one module per kind, one line each in `SOURCES`.

A kind's module is imported when a source of that kind is opened, so that nobody pays for the others.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.record import printable
from visionfm_jax.errors import DataError
from visionfm_jax.storage import read


class Source(Protocol):
    """A dataset that gives record i on demand, to any thread, and can be pickled for worker processes."""

    name: str  # for logs and errors: kind, path and split
    num_classes: int  # 0: no labels
    class_names: tuple[str, ...] | None  # None: the dataset does not say
    has_captions: bool
    most_captions: int  # that one image has; 0: no captions

    def __len__(self) -> int:
        """Number of records."""
        ...

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        """Record `index` in [0, len).

        Returns:
          "image", encoded bytes or uint8 (H, W, C); where there are classes, "label", int; where there are captions,
          "caption", str, or bytes as they are stored, or a tuple of those, several captions of the image; and what lies
          on the image: boxes, masks, maps, by the names that `data.sample.Sample` knows.

        Raises:
          IndexError: no such record.
          DamagedRecord: its content is not what it should be.
          OSError: the storage fails.
          DataError: the dataset has changed since it was opened.
        """
        ...

    def key(self, index: int) -> str:
        """Name by which a person finds record `index` again: a file, or the record's id."""
        ...

    def fingerprint(self) -> dict[str, str]:
        """What the records come from, wherever it lies now: part (a class folder, a tar, a file) -> size and digest.

        Two datasets with equal fingerprints, numbers of records and class names have the same record i; only what is
        overwritten by something of the same size may go unnoticed, where contents would have to be read for it.

        Raises:
          DataError: it cannot be read.
        """
        ...


def read_record(source: Source, index: int) -> Mapping[str, Any]:
    """Record `index` of a source; storage that fails is asked again for a minute.

    Raises:
      DamagedRecord: its content is not what it should be.
      DataError: the dataset has changed since it was opened, or this user may not read it.
      StorageError: the storage fails for longer.
    """
    return read(lambda: source[index], lambda: f"{source.name}: record {source.key(index)}")


SOURCES: dict[str, str] = {  # kind -> "module:name" below this package; what makes a source of a SourceConfig
    "tfds": "tfds:TfdsSource",
    "folder": "folder:FolderSource",
    "numpy": "archive:ArchiveSource",
    "bundled": "bundled:BundledSource",
    "tars": "tars:open_tars",
    "coco_captions": "captioned:open_coco",
    "visual_genome": "captioned:open_visual_genome",
}


def open_source(config: SourceConfig) -> Source:
    """Open a dataset and check that it is what `config` says.

    Raises:
      DataError: one line: the path is missing, empty or holds another format; no such kind or split; a missing key.
      StorageError: the storage fails.
    """
    if config.kind not in SOURCES:
        raise DataError(f"source kind {config.kind!r} does not exist; the kinds are {', '.join(SOURCES)}")
    if config.selection and config.kind != "tars":
        raise DataError(f"{config.kind} {config.path}: a selection chooses among tars; set selection='' or kind='tars'")
    for field in ("path", "split", "selection"):
        if "\0" in getattr(config, field):
            raise DataError(f"{field} = {getattr(config, field)!r}: no file has NUL in its name; set another")
    module, _, name = SOURCES[config.kind].partition(":")
    opener = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    source: Source = read(lambda: opener(config), lambda: printable(f"{config.kind} {config.path}"))
    if not len(source):
        raise DataError(f"{source.name}: holds no record; set another split or path")
    return source


def open_sources(configs: Sequence[SourceConfig], field: str) -> list[Source]:
    """`open_source` of each; errors name which of config.FIELD it is."""
    out = []
    for i, config in enumerate(configs):
        try:
            out.append(open_source(config))
        except DataError as error:
            raise DataError(f"config.{field}[{i}]: {error}") from error
    return out
