"""Work over many images in parts: a folder of files, of which the finished ones stand when the work is stopped.

    x/index.json                     what all of them depend on
    x/part-00000.SUFFIX, …           each of `ROWS` images, or texts, in order

Several processes share the parts: process i of n makes every n-th one from i on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from visionfm_jax.errors import ConfigError, DataError, UserError, printable
from visionfm_jax.storage import read, remove_unfinished, replacing

ROWS = 4096  # of a part
ABOUT = "index.json"
# Of files that people may mean, and that are not written, so that no folder gets such a name by mistake.
OTHER_FORMS = {".csv", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".pkl", ".png", ".pt", ".tsv", ".txt"}


def is_file(out: str | Path, forms: Sequence[str]) -> bool:
    """Whether `out` names one file, which ends in one of `forms`; else it is a folder of parts."""
    return Path(out).suffix in forms and not Path(out).is_dir()


def check_out(out: str, forms: Sequence[str]) -> None:
    """Refuse a file that ends in none of `forms`.

    Raises:
      ConfigError: it is one.
    """
    path = Path(out)
    if not out or (path.is_file() and not is_file(out, forms)) or path.suffix in OTHER_FORMS - set(forms):
        one_file = f"a file {' or '.join(forms)}, or " if forms else ""
        raise ConfigError(f"--out={printable(out)}: name {one_file}a folder{' for many images' if forms else ''}")


def missing(
    folder: Path, names: Sequence[str], about: dict[str, Any], share: tuple[int, int], suffix: str, what: str = "images"
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The parts that are still to be written: the file of each, and the names in it.

    Args:
      folder: of the parts; it is made.
      names: of all images, or the texts.
      about: what the parts depend on, in plain values; a folder of other work is not continued.
      share: (i, n): those of process i of n.
      suffix: of the files.
      what: the names are of: images or texts.

    Raises:
      ConfigError: the folder holds parts of other images, or of other work.
      UserError: it cannot be written.
    """
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    about = {**about, what: len(names), "names": digest, "rows": ROWS}
    about = json.loads(json.dumps(about))  # as it is read back
    if (there := _about(folder)) is not None and there != about:
        different = ", ".join(name for name in {**about, **there} if there.get(name) != about.get(name))
        raise ConfigError(
            f"--out={printable(str(folder))}: holds an index that differs in {different}; name another folder, or "
            "remove it"
        )
    if there is None:
        write(folder / ABOUT, lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
    index, count = share
    for number in range(index, _count(len(names)), count):
        part = names[number * ROWS : (number + 1) * ROWS]
        if not (path := folder / _name(number, suffix)).exists():
            yield path, part
            print(f"{number * ROWS + len(part):,} of {len(names):,} {what}")


def complete(folder: Path, suffix: str) -> list[Path]:
    """All parts of finished work.

    Raises:
      DataError: parts are missing.
      OSError, ValueError, KeyError, TypeError: the folder is of something else.
    """
    about = json.loads((folder / ABOUT).read_bytes())
    count = -(-int(about.get("images", about.get("texts"))) // int(about["rows"]))
    names = [_name(number, suffix) for number in range(count)]
    if lost := [name for name in names if not (folder / name).is_file()]:
        raise DataError(
            f"--index={printable(str(folder))}: {len(lost):,} of {count:,} parts are missing, such as {lost[0]}; "
            "run the same command again, which makes them"
        )
    return [folder / name for name in names]


def write(path: Path, make: Callable[[BinaryIO], Any]) -> None:
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


def _count(names: int) -> int:
    return -(-names // ROWS)


def _name(number: int, suffix: str) -> str:
    return f"part-{number:05}{suffix}"


def _about(folder: Path) -> dict[str, Any] | None:
    """What the parts in a folder say of themselves; None: there are none, and the folder may take some."""
    path, unfinished = folder / ABOUT, f".{ABOUT}."  # of another process, that has just begun or that died
    others = folder.is_dir() and not all(file.name.startswith(unfinished) for file in folder.iterdir())
    if path.is_file():  # looked for last, as another process may just have written it
        try:
            return dict(json.loads(read(path.read_bytes, lambda: str(path))))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"--out={printable(str(folder))}: {ABOUT} in it is damaged; name another folder"
            ) from error
    if others:
        raise ConfigError(f"--out={printable(str(folder))}: is a folder of other files; name a new one")
    return None
