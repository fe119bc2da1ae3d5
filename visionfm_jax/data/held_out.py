"""Signatures of the images that a model will be measured on, and which training pairs show one of them.

Of each image its mirror image counts, too. The signatures of a dataset are computed once, and kept in a file.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.data import signatures
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.near import Among
from visionfm_jax.data.shards import Engine, map_shards
from visionfm_jax.data.sources import KINDS, Source, open_images, read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.store import read_table, write_table
from visionfm_jax.errors import ConfigError, DataError, printable
from visionfm_jax.storage import read, remove_unfinished, writing

HELD_OUT = np.dtype([*signatures.SIGNATURE.descr, ("record", "<u4"), ("mirrored", "?")])
"""Of an image or its mirror image: signature, and the number of the record."""
_RECORDS = 512  # that are hashed in one piece


class Match(NamedTuple):
    """The held-out image that a pair shows: its dataset and record, its name, and whether it is mirrored."""

    word: str
    record: int
    name: str
    mirrored: bool


@functools.lru_cache(maxsize=8)
def opened(word: str) -> Source:
    """A dataset KIND:PATH, or KIND:PATH@SPLIT, of images; SPLIT may be empty, where class folders lie in PATH.

    Raises:
      ConfigError: there is no such kind.
      DataError: it cannot be opened.
    """
    kind, colon, path = word.partition(":")
    if not colon or kind not in KINDS:
        raise ConfigError(f"--against={printable(word)}: is no KIND:PATH of a dataset; kinds are {', '.join(KINDS)}")
    path, split = (path, None) if "@" not in path or Path(path).exists() else path.rsplit("@", 1)
    return open_images(f"{kind}:{path}", split)


def write_signatures(word: str, path: Path, engine: Engine) -> dict[str, Any]:
    """Write the signatures of a dataset's images, unless they are there.

    Returns:
      Its "records", and "unreadable", the names of those that cannot be read.

    Raises:
      UserError: it cannot be opened, nothing of it can be read, or `path` cannot be written.
    """
    source = opened(word)
    of = {"word": word, "fingerprint": source.fingerprint(), "records": len(source)}
    with contextlib.suppress(ValueError):  # it is damaged: it is made again
        meta = read(lambda: read_table(path, HELD_OUT, verify=True)[1], lambda: str(path)) if path.exists() else {}
        if {name: meta.get(name) for name in of} == of:
            return meta
    pieces = [range(i, min(i + _RECORDS, len(source))) for i in range(0, len(source), _RECORDS)]
    found = list(map_shards(functools.partial(_signatures, word), pieces, engine, title=printable(word)))
    names = [name for _, piece in found for name in piece]
    rows = np.concatenate([rows for rows, _ in found])
    missing = sorted(set(range(len(source))) - set(rows["record"].tolist()))
    if not len(rows):
        raise DataError(f"--against={printable(word)}: none of {len(source):,} images can be read; check the path")
    meta = of | {"names": names, "unreadable": [names[record] for record in missing]}
    with writing(f"--out: {printable(str(path))}"):
        remove_unfinished(path)
        write_table(path, [rows], lambda: meta)
    return meta


def _signatures(word: str, records: range) -> tuple[np.ndarray, list[str]]:
    """HELD_OUT of images and their mirror images, and the names of all records."""
    source, found, names = opened(word), [], []
    for record in records:
        names.append(f"{word}#{record} {source.key(record)}")
        try:
            small, _ = signatures.shrunk(read_record(source, record)["image"])
        except (DamagedImage, DamagedRecord):
            continue
        for mirrored, pixels in enumerate((small, small[:, ::-1])):
            found.append((*signatures.of_pixels(pixels).item(), record, mirrored))
    return np.array(found, HELD_OUT), names


class HeldOut:
    """The held-out images of several datasets.

    Args:
      paths: files of `write_signatures`.
    """

    def __init__(self, paths: Sequence[Path]):
        tables = [read_table(path, HELD_OUT, verify=False, mapped=False) for path in paths]
        rows = np.concatenate([rows for rows, _ in tables])
        self._of = np.repeat(np.arange(len(tables)), [len(rows) for rows, _ in tables])
        told = rows["hash"] != signatures.FLAT  # a picture of one colour shows nothing
        self._rows, self._of = rows[told], self._of[told]
        self._metas = [meta for _, meta in tables]
        self._among = Among(self._rows)

    def matches(self, rows: np.ndarray) -> list[Match | None]:
        """Of each picture, SIGNATURE (N,), the nearest held-out image that it is a copy of."""
        return [None if i < 0 else self._match(i) for i in self._among.nearest(rows).tolist()]

    def _match(self, i: int) -> Match:
        meta, row = self._metas[self._of[i]], self._rows[i]
        record = int(row["record"])
        return Match(meta["word"], record, meta["names"][record], bool(row["mirrored"]))
