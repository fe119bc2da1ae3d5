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
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from visionfm_jax import parts
from visionfm_jax.errors import DataError, printable
from visionfm_jax.storage import read

FORMS = (".npz", ".parquet")

Embed = Callable[[Sequence[str]], np.ndarray]


def write_index(
    out: Path, names: Sequence[str], embed: Embed, about: dict[str, Any], share: tuple[int, int], what: str = "images"
) -> None:
    """Embed images, or texts, into `out`, by its name a file or a folder.

    Args:
      out: a file of one of `FORMS`, or a folder.
      names: of the images, or the texts.
      embed: (n,) names to (n, E).
      about, share, what: as of `parts.missing`, for a folder.

    Raises:
      ConfigError: the folder holds an index of other images or of another model.
      UserError: it cannot be written.
    """
    if out.suffix == ".npz":
        rows = embed(names)
        parts.write(out, lambda file: np.savez(file, embedding=rows, name=np.array(names)))
    elif out.suffix == ".parquet":
        _write_part(out, names, embed)
    else:
        for path, some in parts.missing(out, names, about, share, ".parquet", what):
            _write_part(path, some, embed)


def read_index(path: str) -> tuple[list[str], np.ndarray]:
    """The names (N,) and rows (N, E), float32, of a file or folder that `write_index` has written.

    Raises:
      DataError: it is none, or parts are missing.
      StorageError: it cannot be read now.
    """
    where = Path(path)
    try:
        files = parts.complete(where, ".parquet") if where.is_dir() else [where]
        found = [read(functools.partial(_read_part, file), lambda: path) for file in files]
        widths = {rows.shape[1:] for _, rows in found}
        if len(widths) == 1 and len(next(iter(widths))) == 1 and all(len(n) == len(r) > 0 for n, r in found):
            return [name for names, _ in found for name in names], np.concatenate([rows for _, rows in found])
        why = f"its rows are of shapes {sorted({rows.shape for _, rows in found})[:3]}"
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, pa.ArrowException) as error:
        why = str(error).partition("\n")[0]
    raise DataError(f"--index={printable(path)}: is no index of visionfm embed: {why}; make it again")


def _write_part(path: Path, names: Sequence[str], embed: Embed) -> None:
    rows = np.ascontiguousarray(embed(names), np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    safe = [name.encode(errors="surrogateescape").decode(errors="replace") for name in names]
    table = pa.table({"name": pa.array(safe, pa.string()), "embedding": values})
    made = io.BytesIO()
    parquet.write_table(table, made, compression="none")
    parts.write(path, lambda file: file.write(made.getvalue()))


def _read_part(path: Path) -> tuple[list[str], np.ndarray]:
    if path.suffix == ".parquet":
        table = parquet.read_table(path, columns=["name", "embedding"]).combine_chunks()
        rows = table["embedding"].combine_chunks()
        if isinstance(rows, pa.ChunkedArray):
            rows = rows.chunk(0)
        flat = rows.flatten().to_numpy(zero_copy_only=False)
        return table["name"].to_pylist(), flat.astype(np.float32, copy=False).reshape(len(table), -1)
    with np.load(path, allow_pickle=False) as arrays:
        names, rows = arrays["name"].tolist(), arrays["embedding"]
    if rows.dtype != np.float32:
        raise ValueError(f"its rows are {rows.dtype}")
    return list(map(str, names)), rows
