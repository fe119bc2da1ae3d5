"""Datasets with random access: a configuration for each format in `kinds`, its reader in a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.kinds import KINDS as KINDS
from visionfm_jax.errors import DataError, printable
from visionfm_jax.storage import read


class Source(Protocol):
    """A dataset that gives record i on demand, to any thread, and can be pickled for worker processes."""

    name: str  # for logs and errors: kind, path and split
    num_classes: int  # 0: no labels
    class_names: tuple[str, ...] | None  # None: the dataset does not say
    has_captions: bool
    most_captions: int  # that one image has; 0: no captions
    # And where the classes are not those of whole images (`label`):
    # classes_of: tuple[str, ...], the fields of a record that hold them: "box_labels", with "masks" where these have
    # them, too; "class_map".
    # labels: int (N,), of all records, or of all objects in their order, where they are known without reading records.
    # things: tuple[bool, ...], for each class, where segments are of things and of stuff (Kirillov et al. 2019).

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


def open_source(config: SourceConfig) -> Source:
    """Open a dataset and check that it is what `config` says.

    Raises:
      DataError: one line: the path is missing, empty or holds another format; no such split; a missing key.
      StorageError: the storage fails.
    """
    for name, value in vars(config).items():
        if "\0" in str(value):
            raise DataError(f"{name} = {value!r}: no file has NUL in its name; set another")
    source = read(config.make, lambda: printable(f"{config.kind} {config.path}"))
    if not len(source):
        raise DataError(f"{source.name}: holds no record; set another split or path")
    return source


def open_images(word: str, split: str | None = None) -> Source:
    """The images of a dataset KIND:PATH, a kind of `KINDS`, of which captions are not read.

    Args:
      word: as people write it.
      split: of it; None: that which the kind has by default.

    Raises:
      DataError, StorageError: as `open_source`.
    """
    kind, _, path = word.partition(":")
    config: Any = KINDS[kind](path=path)
    if hasattr(config, "caption_key"):
        config.caption_key = ""
    if split is not None:
        config.split = split
    return open_source(config)


def open_sources(configs: Sequence[SourceConfig], field: str) -> list[Source]:
    """`open_source` of each; errors name which of config.FIELD it is."""
    out = []
    for i, config in enumerate(configs):
        try:
            out.append(open_source(config))
        except DataError as error:
            raise DataError(f"config.{field}[{i}]: {error}") from error
    return out
