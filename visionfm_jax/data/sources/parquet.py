"""Parquet with the images' bytes in it, as Hugging Face's datasets and img2dataset --output_format=parquet write it.

PATH is a file, or a folder of files NAME.parquet, also in folders within and in a store. A split is the files whose
name or folder begins with its name, as data/train-00000-of-00002.parquet; "" is all of them. An image is binary, or a
struct of `bytes` and `path`; a label an integer, whose names are in the metadata that Hugging Face writes; a caption
text, or a list of texts.

Parquet is compressed in row groups: a record costs the reading of its row group, of which the last ones stay in memory
(`KEPT` bytes). In random order, small row groups are read fast: the log says how large these are.
"""

from __future__ import annotations

import collections
import itertools
import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from absl import logging

from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import ParquetConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit, no_split
from visionfm_jax.data.sources.places import below, store_of
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.store import Store, side_by_side
from visionfm_jax.errors import DataError, one_line, printable

KEPT = 256 * 2**20  # bytes of row groups in the memory of a process
LARGE = 16 * 2**20  # bytes of a row group from which on random reading is slow
_SHOWN = 30  # names of columns in a message


class ParquetSource:
    """The rows of all files, in order of the files' names: shuffle them.

    Raises:
      DataError: no such files, one that cannot be read, or columns that are missing or of other types.
    """

    def __init__(self, config: ParquetConfig):
        self.name = describe(config)
        self._store, self._files = _files(config)
        self._store.remember(self._files)
        self._reset()
        metas = side_by_side(self._meta, range(len(self._files)))
        self._columns = {"image": config.image_key, **_label_and_caption(config, self.name, self._files[0], metas[0])}
        first = metas[0].schema.to_arrow_schema()
        for file, meta in zip(self._files, metas, strict=True):
            self._check(file, meta.schema.to_arrow_schema(), first)
        rows = [meta.row_group(g).num_rows for meta in metas for g in range(meta.num_row_groups)]
        self._starts = np.cumsum([0, *rows], dtype=np.int64)  # of row groups
        self._groups = np.cumsum([0, *(meta.num_row_groups for meta in metas)])  # of files
        self._crc = [digest(meta.serialized_size.to_bytes(8, "little"), *_places(meta)) for meta in metas]
        self.class_names = _class_names(metas[0], self._columns.get("label"))
        self.num_classes = 0
        if "label" in self._columns:
            self._set_classes(metas)
        self.has_captions = "caption" in self._columns
        self._several = self.has_captions and not _is_text(first.field(self._columns["caption"]).type)
        largest = max((_size(meta, g) for meta in metas for g in range(meta.num_row_groups)), default=0)
        if largest > LARGE:
            logging.warning(
                "%s: row groups of up to %.0f MB, of which one is read for each record in random order; write them "
                "smaller (row_group_size of pyarrow.parquet.write_table), or the records into tars",
                self.name, largest / 1e6,
            )  # fmt: skip

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded image, and its class and caption or captions, as far as there are any.

        Raises:
          DamagedRecord: the row group cannot be decoded, a value is missing, or the label is no class.
        """
        group, row = self._locate(index)
        table = self._group(group)
        record = {name: table[column][row].as_py() for name, column in self._columns.items()}
        if isinstance(record["image"], dict):
            record["image"] = record["image"].get("bytes")
        for name, value in record.items():
            if value is None or (name == "image" and not value):
                raise DamagedRecord(f"its {self._columns[name]!r} is empty")
        if "label" in record and not 0 <= record["label"] < self.num_classes:
            raise DamagedRecord(f"its label is {record['label']}, but there are {self.num_classes} classes")
        if self._several:
            record["caption"] = tuple(text for text in record["caption"] if text)
            if not record["caption"]:
                raise DamagedRecord(f"its {self._columns['caption']!r} is empty")
        return record

    @property
    def most_captions(self) -> int:
        """Most captions that one image has; where there are several, all are read for it, once."""
        if self._most is None:
            self._most = int(self.has_captions)
            if self._several:
                column = self._columns["caption"]
                tables = (self._read(g, [column])[column] for g in range(len(self._starts) - 1))
                self._most = max(max((len(value or ()) for value in table.to_pylist()), default=0) for table in tables)
        return self._most

    def key(self, index: int) -> str:
        """FILE[row]."""
        group, row = self._locate(index)
        file = int(np.searchsorted(self._groups, group, side="right")) - 1
        first = int(self._starts[self._groups[file]])
        return f"{printable(self._files[file])}[{int(self._starts[group]) - first + row}]"

    def fingerprint(self) -> dict[str, str]:
        """Of each file, by what its footer says of rows and bytes."""
        ends = self._starts[self._groups].tolist()
        rows = [b - a for a, b in itertools.pairwise(ends)]
        return {file: f"{n:,} rows, {crc}" for file, n, crc in zip(self._files, rows, self._crc, strict=True)}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("_lock", "_cache", "_bytes", "_most", "_metas")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def _reset(self) -> None:
        self._lock, self._bytes = threading.Lock(), 0
        self._cache: collections.OrderedDict[int, pa.Table] = collections.OrderedDict()
        self._metas: dict[int, pq.FileMetaData] = {}
        self._most: int | None = None

    def _locate(self, index: int) -> tuple[int, int]:
        """Row group of all, and row in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _group(self, group: int) -> pa.Table:
        """The columns that records have, of a row group."""
        with self._lock:
            if (table := self._cache.get(group)) is not None:
                self._cache.move_to_end(group)
                return table
        table = self._read(group, list(self._columns.values()))
        with self._lock:
            if group not in self._cache:
                self._cache[group] = table
                self._bytes += table.nbytes
            while self._bytes > KEPT and len(self._cache) > 1:
                self._bytes -= self._cache.popitem(last=False)[1].nbytes
        return table

    def _read(self, group: int, columns: list[str]) -> pa.Table:
        number = int(np.searchsorted(self._groups, group, side="right")) - 1
        meta = self._meta(number)
        try:
            with (
                self._store.open(self._files[number], keep=True) as content,
                pq.ParquetFile(content, metadata=meta, page_checksum_verification=True) as parquet,
            ):
                return parquet.read_row_group(group - int(self._groups[number]), columns=columns)
        except (pa.ArrowException, OSError, IndexError, KeyError, ValueError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise DamagedRecord(f"its row group cannot be read ({printable(one_line(error))})") from error

    def _meta(self, number: int) -> pq.FileMetaData:
        """The footer of a file, which is read once."""
        if number in self._metas:
            return self._metas[number]
        file = self._files[number]
        try:
            with self._store.open(file, keep=True) as content:
                self._metas[number] = pq.read_metadata(content)
                return self._metas[number]
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            where = f"{self.name}: {printable(self._store.path(file))}"
            why = printable(one_line(error))
            raise DataError(
                f"{where} is no Parquet file, or was cut short ({why}); download it again, or remove it"
            ) from error

    def _check(self, file: str, schema: pa.Schema, first: pa.Schema) -> None:
        """That a file has the columns of the first one, and that these serve."""
        where = f"{self.name}: {printable(self._store.path(file))}"
        for name, column in self._columns.items():
            there = ", ".join(schema.names[:_SHOWN])
            if column not in schema.names:
                raise DataError(f"{where} has no column {column!r}; set {name}_key to one of {there}")
            kind = schema.field(column).type
            if not _SERVES[name](kind):
                raise DataError(
                    f"{where}: column {column!r} is {kind}, and no {name}; set {name}_key to one of {there}"
                )
            if kind != first.field(column).type:
                raise DataError(
                    f"{where}: column {column!r} is {kind}, and {first.field(column).type} in "
                    f"{printable(self._files[0])}; write it again, or give them a folder each"
                )

    def _set_classes(self, metas: list[pq.FileMetaData]) -> None:
        """By the names of classes, or the least and largest label that the files' statistics tell."""
        column, seen = self._columns["label"], []
        for number, meta in enumerate(metas):
            place = next(i for i in range(meta.num_columns) if meta.schema.column(i).path == column)
            for g in range(meta.num_row_groups):
                found = meta.row_group(g).column(place).statistics
                if found is not None and found.has_min_max:
                    seen += [found.min, found.max]
                elif meta.row_group(g).num_rows:
                    values = self._read(int(self._groups[number]) + g, [column])[column].drop_null().to_numpy()
                    seen += [int(values.min()), int(values.max())] if len(values) else []
        least, largest = min(seen, default=0), max(seen, default=-1)
        self.num_classes = len(self.class_names) if self.class_names else largest + 1
        if least < 0 or largest >= self.num_classes or not self.num_classes:
            raise DataError(
                f"{self.name}: column {column!r} runs from {least} to {largest}, and there are {self.num_classes} "
                "classes; -1 stands for no label: set label_key='' or another split"
            )


def _files(config: ParquetConfig) -> tuple[Store, list[str]]:
    """Where the files are, and the paths of those of the split, sorted."""
    path = check_path(config)
    if path.is_file():
        if config.split:
            raise DataError(f"{describe(config)}: a single file has no splits; set split=''")
        return Store(config.path.rpartition("/")[0] or "."), [path.name]
    found = [file for file in below(path) if file.endswith(".parquet")]
    if not found:
        raise misfit(config, "a folder of .parquet files")
    files = [file for file in found if not config.split or config.split in _splits(file)]
    if not files:
        raise no_split(config, sorted({next(_splits(file)) for file in found}))
    return store_of(path), files


def _splits(file: str) -> Iterator[str]:
    """What a file may be a part of: the beginning of its name, and the folders that it is in."""
    *folders, name = file.removesuffix(".parquet").split("/")
    yield name.partition("-")[0]
    yield name
    yield from folders


def _label_and_caption(config: ParquetConfig, name: str, file: str, meta: pq.FileMetaData) -> dict[str, str]:
    """The two columns, as far as they are there.

    Raises:
      DataError: neither is, though captions are wanted, or not one that was asked for.
    """
    schema = meta.schema.to_arrow_schema()
    keys = {"label": config.label_key, "caption": config.caption_key}
    found = {what: key for what, key in keys.items() if key in schema.names and _SERVES[what](schema.field(key).type)}
    missing = {what: key for what, key in keys.items() if key and what not in found}
    asked = [what for what, key in missing.items() if key != getattr(ParquetConfig, f"{what}_key")]
    if asked or (not found and config.caption_key):
        what = " and ".join(f"no column {key!r} that is a {what}" for what, key in missing.items())
        fit = {w: [n for n in schema.names if _SERVES[w](schema.field(n).type)] for w in missing}
        rule = " or ".join(f"{w}_key to one of {', '.join(names[:_SHOWN])}" for w, names in fit.items() if names)
        bare = ", or caption_key='' for the images alone"
        raise DataError(f"{name}: {printable(file)} has {what}; set {rule or 'another path'}{bare}")
    return found


def _class_names(meta: pq.FileMetaData, label: str | None) -> tuple[str, ...] | None:
    """As Hugging Face writes them into a file's metadata."""
    try:
        features = json.loads((meta.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) and names else None


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_image(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_caption(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    return _is_text(kind) or (is_list and _is_text(kind.value_type))


_SERVES = {"image": _is_image, "label": pa.types.is_integer, "caption": _is_caption}


def _size(meta: pq.FileMetaData, group: int) -> int:
    """Bytes of a row group as it is stored."""
    part = meta.row_group(group)
    return sum(part.column(c).total_compressed_size for c in range(part.num_columns))


def _places(meta: pq.FileMetaData) -> Iterator[bytes]:
    """Where the columns of a file lie."""
    for g in range(meta.num_row_groups):
        part = meta.row_group(g)
        columns = [part.column(c) for c in range(part.num_columns)]
        yield repr([(c.data_page_offset, c.total_compressed_size, c.num_values) for c in columns]).encode()
