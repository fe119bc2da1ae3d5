"""Embeddings of images or texts in files: all in one, or in parts, of which the finished ones stand when the work is
stopped.

    x.npz        arrays `name` (N,) and `embedding` (N, E), float32
    x.parquet    columns `name` and `embedding`, a list of E float32
    x/           part-00000.parquet, … (`visionfm_jax.parts`)

Rows of images that cannot be read are NaN.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from visionfm_jax import parts
from visionfm_jax.errors import DataError, one_line, printable
from visionfm_jax.evals.metrics import best
from visionfm_jax.storage import read

_T = TypeVar("_T")
FORMS = (".npz", ".parquet")
ABOUT = "visionfm"  # of a file, in its metadata: what the rows depend on, JSON

Embed = Callable[[Sequence[str]], np.ndarray]


class Part(NamedTuple):
    """Rows float32 (N, E) and the names (N,) of what they are of."""

    names: list[str]
    rows: np.ndarray


def write_index(
    out: Path, names: Sequence[str], embed: Embed, about: dict[str, Any], share: tuple[int, int], what: str = "images"
) -> None:
    """Embed images, or texts, into `out`, by its name a file or a folder.

    Args:
      out: a file of one of `FORMS`, or a folder.
      names: of the images, or the texts.
      embed: (n,) names to (n, E).
      about: what the rows depend on beside the images, in plain values.
      share, what: as of `parts.missing`, for a folder.

    Raises:
      ConfigError: the folder holds an index of other images or of another model.
      UserError: it cannot be written.
    """
    if not parts.is_file(out, FORMS):

        def is_whole(path: Path, some: Sequence[str]) -> bool:
            return _about(path) == about and _read_part(path).names == list(map(parts.utf8, some))

        for path, some in parts.missing(out, names, about, share, ".parquet", is_whole, what):
            _write_part(path, some, embed, about)
    elif out.suffix.lower() == ".npz":
        values = {"embedding": embed(names), "name": np.array(names), ABOUT: np.array(json.dumps(about))}
        parts.write(out, lambda file: np.savez(file, **values))
    else:
        _write_part(out, names, embed, about)


def open_index(path: str) -> tuple[dict[str, Any], Iterator[Part]]:
    """What an index that `write_index` has written depends on, and its parts, read when they are asked for.

    Raises:
      DataError: it is none, or parts are missing; also when a part is read.
      StorageError: it cannot be read now.
    """
    where = Path(path)

    def read_one(act: Callable[[], _T]) -> _T:
        try:
            return read(act, lambda: f"--index={printable(path)}")
        except (
            OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, RecursionError, zipfile.BadZipFile,
            pa.ArrowException,
        ) as error:  # fmt: skip
            why = str(error).partition("\n")[0]
            raise DataError(
                f"--index={printable(path)}: is no index of visionfm embed: {why}; make it again"
            ) from error

    files = read_one(lambda: parts.complete(where, ".parquet") if where.is_dir() else [where])
    about = read_one(lambda: _about(files[0]))

    def all_parts() -> Iterator[Part]:
        width = None
        for file in files:
            if read_one(functools.partial(_about, file)) != about:
                raise DataError(
                    f"--index={printable(path)}: {file.name} is of another model than {files[0].name}; make it again"
                )
            names, rows = read_one(functools.partial(_read_part, file))
            if rows.ndim != 2 or len(names) != len(rows) or not len(rows) or width not in (None, rows.shape[1]):
                shape = f"{len(names)} names and rows of shape {rows.shape}"
                raise DataError(f"--index={printable(path)}: is no index of visionfm embed: {shape}; make it again")
            width = rows.shape[1]
            yield Part(names, rows)

    return about, all_parts()


def search_index(found: Iterable[Part], query: np.ndarray, count: int) -> list[tuple[str, float]]:
    """The names and cosines of the `count` rows that fit a query (1, E) best; rows of NaN or of zeros fit none.

    One part is in memory at a time.

    Raises:
      ValueError: rows are not E wide.
    """
    best_ones: list[tuple[str, float]] = []
    for names, rows in found:
        if rows.shape[1] != query.shape[1]:
            raise ValueError(f"rows of {rows.shape[1]} numbers, and a query of {query.shape[1]}")
        (index,), (score,) = best(_unit(query), _unit(rows), count)
        best_ones += [(names[i], float(s)) for i, s in zip(index, score, strict=True) if np.isfinite(s)]
        best_ones = sorted(best_ones, key=lambda one: -one[1])[:count]
    return best_ones


def _unit(rows: np.ndarray) -> np.ndarray:
    """Of length 1; a row of zeros is NaN."""
    with np.errstate(invalid="ignore"):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _write_part(path: Path, names: Sequence[str], embed: Embed, about: dict[str, Any]) -> None:
    rows = np.ascontiguousarray(embed(names), np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    table = pa.table({"name": pa.array([*map(parts.utf8, names)], pa.string()), "embedding": values})
    table = table.replace_schema_metadata({ABOUT: json.dumps(about)})
    made = io.BytesIO()
    parquet.write_table(table, made, compression="none", write_page_checksum=True)
    parts.write(path, lambda file: file.write(made.getvalue()))


def _about(path: Path) -> dict[str, Any]:
    if path.suffix.lower() == ".parquet":
        return dict(json.loads(parquet.read_schema(path).metadata[ABOUT.encode()]))
    with np.load(path, allow_pickle=False) as arrays:
        return dict(json.loads(str(arrays[ABOUT])))


def _read_part(path: Path) -> Part:
    if path.suffix.lower() == ".parquet":
        content = io.BytesIO(path.read_bytes())
        try:
            table = parquet.read_table(content, columns=["name", "embedding"], page_checksum_verification=True)
        except OSError as error:  # what pyarrow raises of a wrong checksum: no wait would help
            raise ValueError(one_line(error)) from error
        rows = table["embedding"].combine_chunks()
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.chunk(0)
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        return Part(table["name"].to_pylist(), flat.astype(np.float32, copy=False).reshape(len(table), -1))
    with np.load(path, allow_pickle=False) as arrays:
        names, rows = arrays["name"].tolist(), arrays["embedding"]
    if rows.dtype != np.float32:
        raise ValueError(f"its rows are {rows.dtype}")
    return Part([*map(str, names)], rows)
