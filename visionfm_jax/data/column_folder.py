"""What was computed of the pairs of a folder of tars: a folder with a Parquet file for each tar, a row for each pair.

    about.json       what made it: the command and its settings
    NNNNN.parquet    of NNNNN.tar: `key`, and the columns, in the order of the index of the tars

Each file says of which tar it is, by what the index knows of it, and by which settings it was made: columns of another
crawl, or of another model, are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from visionfm_jax.errors import ConfigError, DataError, complain, one_line, printable
from visionfm_jax.storage import read, remove_unfinished, replacing, write_text, writing

ABOUT, META, KEY = "about.json", b"visionfm", "key"


@dataclass(frozen=True)
class ColumnFolder:
    """Columns of pairs, a file for each tar.

    Attributes:
      path: of the folder.
      about: the command, and the settings that its columns depend on.
    """

    path: Path
    about: dict[str, Any]

    def file(self, tar: str) -> Path:
        """NNNNN.tar -> the file with its columns."""
        return self.path / (tar.removesuffix(".tar") + ".parquet")

    def is_whole(self, tar: dict[str, Any]) -> bool:
        """Whether the columns of a tar, an entry of `Index.tars`, are there; what is damaged is to be made again.

        Raises:
          DataError, StorageError: they cannot be read now.
        """
        path = self.file(tar["name"])
        if not path.exists():
            return False
        try:
            table = read(lambda: _read(path, None), lambda: printable(str(path)))
        except (ValueError, pa.ArrowException) as error:
            complain(f"{printable(str(path))} is damaged ({one_line(error)}): it is made again")
            return False
        return (table.schema.metadata or {}).get(META) == self._of(tar)

    def write(self, tar: dict[str, Any], keys: Sequence[str], columns: dict[str, Any]) -> None:
        """Write the columns of a tar, whole or not at all.

        Args:
          tar: its entry in `Index.tars`.
          keys: of its pairs.
          columns: name -> an array of as many values.

        Raises:
          UserError: they cannot be written.
        """
        path = self.file(tar["name"])
        table = pa.table({KEY: pa.array(list(keys), pa.string()), **columns})
        table = table.replace_schema_metadata({META: self._of(tar)})
        with writing(f"--out: {printable(str(path))}"):
            remove_unfinished(path)
            with replacing(path) as part:
                pq.write_table(table, part, compression="zstd", write_page_checksum=True)

    def read(self, tar: dict[str, Any], names: Sequence[str] | None = None) -> pa.Table:
        """Columns of a tar, those of `names` or all, a row for each pair in the order of the index.

        Raises:
          DataError: they are missing, damaged, or of another tar.
          StorageError: they cannot be read now.
        """
        path = self.file(tar["name"])
        where, again = printable(str(path)), f"run visionfm {self.about.get('command', 'data')} again"
        try:
            table = read(lambda: _read(path, names), lambda: where)
        except DataError:
            raise DataError(f"{where}: is missing; {again}, which makes what is missing") from None
        except (pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{where}: cannot be read ({one_line(error)}); remove it and {again}") from error
        if (table.schema.metadata or {}).get(META) != self._of(tar) or len(table) != tar["pairs"]:
            raise DataError(
                f"{where}: is of another {printable(tar['name'])}, or made otherwise; {again} on these tars"
            )
        return table

    def _of(self, tar: dict[str, Any]) -> bytes:
        settings = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        return json.dumps([tar["name"], tar["pairs"], tar["crc"], settings]).encode()


def create(path: Path, about: dict[str, Any], flag: str = "--out") -> ColumnFolder:
    """A folder to write to: a new one, or one that the same command with the same settings has begun.

    Args:
      path: of the folder.
      about: "command", such as "data score", and its settings, in plain values.
      flag: that names the folder, for people.

    Raises:
      ConfigError: it holds something else.
      UserError: it cannot be written.
    """
    about = json.loads(json.dumps(about))
    with writing(f"{flag}={printable(str(path))}"):
        path.mkdir(parents=True, exist_ok=True)
        there = _about(path)
        if there is None and any(file.suffix in (".parquet", ".tar") for file in path.iterdir()):
            raise ConfigError(f"{flag}={printable(str(path))}: is a folder of other files; name a new one")
        if there is None:
            remove_unfinished(path / ABOUT)
            write_text(path / ABOUT, json.dumps(about, indent=1) + "\n")
    if there is not None and there != about:
        names = [name for name in {**about, **there} if there.get(name) != about.get(name)]
        different = ", ".join(f"{name}{_change(there.get(name), about.get(name))}" for name in names)
        raise ConfigError(
            f"{flag}={printable(str(path))}: was made with another {different}; name another folder, or remove it"
        )
    return ColumnFolder(path, about)


def _change(old: Any, new: Any) -> str:
    """Of settings that are a word or a number."""
    return "" if isinstance(old, dict | list) or isinstance(new, dict | list) else f" ({old}, not {new})"


def open_folder(path: Path) -> ColumnFolder:
    """A folder to read from.

    Raises:
      DataError: it is none.
    """
    if (about := _about(path)) is None:
        raise DataError(
            f"--columns={printable(str(path))}: has no {ABOUT}; name a folder that visionfm data score or data dedup "
            "has written"
        )
    return ColumnFolder(path, about)


def columns_of(folder: ColumnFolder, tar: dict[str, Any]) -> list[str]:
    """The names of the columns of a tar, without the key.

    Raises:
      DataError: as `ColumnFolder.read`.
    """
    return [name for name in folder.read(tar).column_names if name != KEY]


def _read(path: Path, names: Sequence[str] | None) -> pa.Table:
    with open(path, "rb") as file:  # an error of the system stays one
        content = pa.BufferReader(file.read())
    try:
        wanted = None if names is None else list(names)
        return pq.read_table(content, columns=wanted, page_checksum_verification=True)
    except OSError as error:  # what pyarrow raises of a wrong checksum: no wait would help
        raise ValueError(one_line(error)) from error


def _about(path: Path) -> dict[str, Any] | None:
    try:
        content = read(lambda: _content(path / ABOUT), lambda: str(path / ABOUT))
        found = None if content is None else json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{printable(str(path))}: {ABOUT} in it is damaged; name another folder") from error
    if found is not None and not isinstance(found, dict):
        raise ConfigError(f"{printable(str(path))}: {ABOUT} in it is of something else; name another folder")
    return found


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
