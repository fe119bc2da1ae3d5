"""Embeddings of images or texts in files: all in one, or in parts, of which the finished ones stand when the work is
stopped.

    x.npz        arrays `name` (N,) and `embedding` (N, E), float32
    x.parquet    columns `name` and `embedding`, a list of E float32
    x/           index.json, and part-00000.parquet, …, each of `ROWS` images in order

Rows of images that cannot be read are NaN.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from visionfm_jax.errors import ConfigError, DataError, UserError, printable
from visionfm_jax.storage import read, remove_unfinished, replacing

ROWS = 4096  # of a part
ABOUT = "index.json"
FORMS = (".npz", ".parquet")

Embed = Callable[[Sequence[str]], np.ndarray]


def check_name(out: str) -> None:
    """Refuse a file of another form.

    Raises:
      ConfigError: it is one.
    """
    if not out or (Path(out).suffix not in ("", *FORMS) and not Path(out).is_dir()):
        raise ConfigError(f"--out={printable(out)}: name a file {' or '.join(FORMS)}, or a folder for many images")


def write_index(
    out: Path, names: Sequence[str], embed: Embed, about: dict[str, Any], share: tuple[int, int], what: str = "images"
) -> None:
    """Embed images, or texts, into `out`, by its name a file or a folder.

    Args:
      out: as `check_name` takes it.
      names: of the images, or the texts.
      embed: (n,) names to (n, E).
      about: what the rows depend on, in plain values; a folder of other rows is not continued.
      share: (i, n): of a folder, the parts that process i of n makes.
      what: the rows are of: images or texts.

    Raises:
      ConfigError: the folder holds an index of other images or of another model.
      UserError: it cannot be written.
    """
    if out.suffix == ".npz":
        rows = embed(names)
        _write(out, lambda file: np.savez(file, embedding=rows, name=np.array(names)))
        return
    if out.suffix == ".parquet":
        _write_part(out, names, embed)
        return
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    about = {**about, what: len(names), "names": digest, "rows": ROWS}
    if (there := _about(out)) is not None and there != about:
        different = ", ".join(name for name in about if there.get(name) != about[name])
        raise ConfigError(
            f"--out={printable(str(out))}: holds an index that differs in {different or 'what it says'}; name another "
            "folder, or remove it"
        )
    if there is None:
        _write(out / ABOUT, lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
    index, count = share
    for number in range(index, parts_of(len(names)), count):
        part = names[number * ROWS : (number + 1) * ROWS]
        if not (path := out / _part(number)).exists():
            _write_part(path, part, embed)
            print(f"{number * ROWS + len(part):,} of {len(names):,} {what}")


def parts_of(images: int) -> int:
    """The number of parts of an index of so many images."""
    return -(-images // ROWS)


def read_index(path: str) -> tuple[list[str], np.ndarray]:
    """The names (N,) and rows (N, E), float32, of a file or folder that `write_index` has written.

    Raises:
      DataError: it is none, or parts are missing.
      StorageError: it cannot be read now.
    """
    where = Path(path)
    try:
        files = _parts(where) if where.is_dir() else [where]
        found = [read(functools.partial(_read_part, file), lambda: path) for file in files]
        widths = {rows.shape[1:] for _, rows in found}
        if len(widths) == 1 and len(next(iter(widths))) == 1 and all(len(n) == len(r) > 0 for n, r in found):
            return [name for names, _ in found for name in names], np.concatenate([rows for _, rows in found])
        why = f"its rows are of shapes {sorted({rows.shape for _, rows in found})[:3]}"
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, pa.ArrowException) as error:
        why = str(error).partition("\n")[0]
    raise DataError(f"--index={printable(path)}: is no index of visionfm embed: {why}; make it again")


def _part(number: int) -> str:
    return f"part-{number:05}.parquet"


def _about(folder: Path) -> dict[str, Any] | None:
    """What the index in a folder says of itself; None: there is none, and the folder may take one."""
    path = folder / ABOUT
    if path.is_file():
        try:
            return dict(json.loads(read(path.read_bytes, lambda: str(path))))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"--out={printable(str(folder))}: {ABOUT} in it is damaged; name another folder"
            ) from error
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"--out={printable(str(folder))}: is a folder of other files; name a new one")
    return None


def _parts(folder: Path) -> Iterator[Path]:
    """The parts of a complete index."""
    about = json.loads((folder / ABOUT).read_bytes())
    count = -(-int(about.get("images", about.get("texts"))) // int(about["rows"]))
    missing = [name for name in map(_part, range(count)) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"--index={printable(str(folder))}: {len(missing):,} of {count:,} parts are missing, such as {missing[0]}; "
            "run the same visionfm embed again, which makes them"
        )
    return (folder / _part(number) for number in range(count))


def _write_part(path: Path, names: Sequence[str], embed: Embed) -> None:
    rows = np.ascontiguousarray(embed(names), np.float32)
    values = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), rows.shape[1])
    safe = [name.encode(errors="surrogateescape").decode(errors="replace") for name in names]
    table = pa.table({"name": pa.array(safe, pa.string()), "embedding": values})
    made = io.BytesIO()
    parquet.write_table(table, made, compression="none")
    _write(path, lambda file: file.write(made.getvalue()))


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


def _write(path: Path, make: Callable[[BinaryIO], Any]) -> None:
    """Write a file, whole or not at all.

    Raises:
      UserError: it cannot be.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_unfinished(path)
        with replacing(path) as part, open(part, "wb") as file:
            make(file)
    except OSError as error:
        where = f"--out: {printable(str(path))}"
        raise UserError(f"{where}: {error.strerror or error}; name one that can be written") from error
