"""Images that a table names, with captions or labels: a CSV, TSV or JSONL file.

PATH.csv and PATH.tsv have names of columns in the first line; each line of PATH.jsonl is an object. `image_key` is the
column with the path of the image, below `root` (the table's folder, if it is empty), or a URL. Rows of one image are
its captions, and so is a list of texts in JSONL. Labels are numbers from 0 on, or names, which are sorted.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from visionfm_jax.data.sources.captioned import CaptionedFiles
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import TableConfig
from visionfm_jax.data.sources.layout import describe, misfit
from visionfm_jax.data.sources.places import place_of
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.store import Store
from visionfm_jax.errors import DataError, printable

_SUFFIXES = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".ndjson": ""}
_LONGEST = 2**24  # characters of a field


class TableSource(CaptionedFiles):
    """Images in order of their first row: shuffle them.

    Raises:
      DataError: no such table or column, a row that cannot be read, or an image that is not there.
    """

    def __init__(self, config: TableConfig):
        self.name = describe(config)
        rows: dict[str, list[dict[str, Any]]] = {}
        root = config.root or os.path.dirname(config.path) or "."
        for where, row in _rows(config):
            rows.setdefault(_below(self.name, where, str(row[config.image_key]), root), []).append(row)
        labels = {file: own[0].get(config.label_key) for file, own in rows.items()} if config.label_key else {}
        images = ((file, _texts(self.name, own, config.caption_key)) for file, own in rows.items())
        super().__init__(config, images, root)
        if config.label_key:
            self._set_labels([labels[self.file(i)] for i in range(len(self))])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The image's bytes, its captions, a tuple of str, and its class, as far as there are any.

        Raises:
          DamagedRecord: the URL of the image leads nowhere.
        """
        record = super().__getitem__(index)
        return record | ({"label": int(self._labels[index])} if self.num_classes else {})

    def image(self, index: int) -> bytes:
        """The file's bytes, or the URL's."""
        if "://" not in (file := self.file(index)):
            return super().image(index)
        folder, _, name = file.rpartition("/")
        try:
            return _store(folder).content(name)
        except (FileNotFoundError, PermissionError, DataError) as error:
            raise DamagedRecord(f"the URL cannot be read: {printable(str(error))}") from error

    def fingerprint(self) -> dict[str, str]:
        """As `CaptionedFiles`, and of the labels."""
        labels = {"labels": digest(self._labels)} if self.num_classes else {}
        return labels | super().fingerprint()

    def _set_labels(self, values: list[Any]) -> None:
        numbers = [_number(value) for value in values]
        if all(number is not None for number in numbers):
            self._labels = np.array(numbers, np.int32)
            self.num_classes = int(self._labels.max(initial=-1)) + 1
        else:
            self.class_names = tuple(sorted({str(value) for value in values}))
            place = {name: i for i, name in enumerate(self.class_names)}
            self._labels = np.array([place[str(value)] for value in values], np.int32)
            self.num_classes = len(place)


def _number(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else None


def _rows(config: TableConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a row stands, for people, and its values by column."""
    path = place_of(config.path)
    if path.suffix not in _SUFFIXES:
        raise misfit(config, "a .csv, .tsv or .jsonl file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{describe(config)}: the path does not exist; set the path of the table") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{describe(config)}: is not UTF-8 ({error}); write it again as UTF-8") from error
    found = 0
    for line, row in _of_csv(text, _SUFFIXES[path.suffix]) if _SUFFIXES[path.suffix] else _of_jsonl(text):
        found += 1
        where = f"line {line}"
        if not isinstance(row, dict):
            raise DataError(f"{describe(config)}: {where} {row}; correct it")
        lacking = [key for key in (config.image_key, config.label_key) if key and row.get(key) in (None, "")]
        lacking += [key for key in (config.caption_key,) if key and found == 1 and key not in row]
        if lacking:
            columns = ", ".join(printable(str(name)) for name in row)
            remedy = 'correct it, or set image_key, label_key and caption_key ("": none) to columns that are there'
            raise DataError(f"{describe(config)}: {where} has no {lacking[0]!r} but {columns}; {remedy}")
        yield where, row
    if not found:
        raise DataError(f"{describe(config)}: has no row; set another path")


def _of_csv(text: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    """Number of a row's last line, and its values, or what is wrong with it."""
    csv.field_size_limit(_LONGEST)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        for row in reader:
            if row:
                same = len(row) == len(names)
                yield reader.line_num, dict(zip(names, row, strict=True)) if same else _uneven(row, names)
    except csv.Error as error:
        yield reader.line_num, f"is no row ({error})"


def _uneven(row: list[str], names: list[str]) -> str:
    return f"has {len(row)} values, and there are {len(names)} columns"


def _of_jsonl(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                row = f"is no JSON ({error})"
            yield number, row if isinstance(row, dict | str) else "is no object of JSON"


def _texts(name: str, rows: list[dict[str, Any]], key: str) -> list[str]:
    """The captions of an image, each once."""
    found: dict[str, None] = {}
    for row in rows if key else ():
        value = row.get(key)
        for text in value if isinstance(value, list) else [value]:
            if text is not None and not isinstance(text, str):
                raise DataError(f"{name}: a {key!r} is {printable(str(text))[:80]!r} and no text; set caption_key")
            found |= {text or "": None}
    return list(found)


def _below(name: str, where: str, file: str, root: str) -> str:
    """The path of an image below the root, or its URL."""
    if "://" in file:
        if file.partition("://")[0].lower() not in ("http", "https", "s3", "gs", "gcs", "hf", "memory"):
            raise DataError(f"{name}: {where} names {printable(file)}; write a path, or an http, s3, gs or hf URL")
        return file
    if os.path.isabs(file) and "://" not in root:
        file = os.path.relpath(file, os.path.abspath(os.path.expanduser(root)))
    file = os.path.normpath(file)
    if file.split("/")[0] == ".." or os.path.isabs(file):
        raise DataError(
            f"{name}: {where} names {printable(file)}, which is not below {root}; set root to a folder above"
        )
    return file


@functools.lru_cache(maxsize=1024)
def _store(folder: str) -> Store:
    return Store(folder)
