"""Work over many images in parts: a folder of files, of which the finished ones stand when the work is stopped.

    x/index.json                     what all of them depend on
    x/part-00000.SUFFIX, …           each of `ROWS` images, or texts, in order

Several processes share the parts: process i of n makes every n-th one from i on.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from visionfm_jax.errors import ConfigError, DataError, complain, one_line, printable
from visionfm_jax.storage import not_written, read, remove_unfinished, replacing

ROWS = 4096  # of a part
ABOUT = "index.json"
# Of files that people may mean, and that are not written, so that no folder gets such a name by mistake.
OTHER_FORMS = {".csv", ".json", ".jsonl", ".npy", ".npz", ".parquet", ".pkl", ".png", ".pt", ".tsv", ".txt"}


def is_file(out: str | Path, forms: Sequence[str]) -> bool:
    """Whether `out` names one file, which ends in one of `forms`; else it is a folder of parts."""
    return Path(out).suffix.lower() in forms and not Path(out).is_dir()


def check_out(out: str, forms: Sequence[str]) -> None:
    """Refuse a file that ends in none of `forms`.

    Raises:
      ConfigError: it is one.
      UserError: there can be no such file.
    """
    path = Path(out)
    try:
        wrong = (path.is_file() and not is_file(out, forms)) or path.suffix.lower() in OTHER_FORMS - set(forms)
    except OSError as error:  # a name that is too long
        raise not_written(f"--out={printable(out)}", error) from error
    if not out or wrong:
        one_file = f"a file {' or '.join(forms)}, or " if forms else ""
        raise ConfigError(f"--out={printable(out)}: name {one_file}a folder{' for many images' if forms else ''}")


def check_writable(out: Path) -> None:
    """Refuse a file, or a folder of parts, that cannot be written, before any work.

    Raises:
      UserError: it cannot be.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=out if out.is_dir() else out.parent):
            pass
    except OSError as error:
        raise not_written(f"--out={printable(str(out))}", error) from error


def utf8(name: str) -> str:
    """A file's name, which may be any bytes, as text that is stored."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def missing(
    folder: Path,
    names: Sequence[str],
    about: dict[str, Any],
    share: tuple[int, int],
    suffix: str,
    is_whole: Callable[[Path, Sequence[str]], bool],
    what: str = "images",
) -> Iterator[tuple[Path, Sequence[str]]]:
    """The parts that are still to be written, or are damaged: the file of each, and the names in it.

    Args:
      folder: of the parts; it is made.
      names: of all images, or the texts.
      about: what the parts depend on, in plain values; a folder of other work is not continued.
      share: (i, n): those of process i of n.
      suffix: of the files.
      is_whole: whether a file that is there has what belongs to these names; it may raise what reading raises.
      what: the names are of: images or texts.

    Raises:
      ConfigError: the folder holds parts of other images, or of other work.
      UserError: it cannot be written.
    """
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    about = {"about": about, what: len(names), "names": digest, "rows": ROWS}
    about = json.loads(json.dumps(about))  # as it is read back
    if (there := _about(folder)) is not None and there != about:
        now, then = ({**of, **_dict(of.get("about"))} for of in (about, there))
        different = ", ".join(name for name in {**now, **then} if name != "about" and then.get(name) != now.get(name))
        raise ConfigError(
            f"--out={printable(str(folder))}: holds an index that differs in {different}; name another folder, or "
            "remove it"
        )
    if there is None:
        write(folder / ABOUT, lambda file: file.write((json.dumps(about, indent=1) + "\n").encode()))
    index, count = share
    for number in range(index, _count(len(names)), count):
        part = names[number * ROWS : (number + 1) * ROWS]
        if not _is_whole(folder / _name(number, suffix), part, is_whole):
            yield folder / _name(number, suffix), part
            print(f"{number * ROWS + len(part):,} of {len(names):,} {what}")


def _is_whole(path: Path, names: Sequence[str], is_whole: Callable[[Path, Sequence[str]], bool]) -> bool:
    try:
        if not path.exists() or is_whole(path, names):
            return path.exists()
        why = "it is of other work"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, pa.ArrowException) as error:
        why = one_line(error)
    complain(f"{printable(str(path))} is damaged ({why}): it is made again")
    return False


def complete(folder: Path, suffix: str) -> list[Path]:
    """All parts of finished work.

    Raises:
      DataError: parts are missing.
      OSError, ValueError, KeyError, TypeError: the folder is of something else.
    """
    about = json.loads((folder / ABOUT).read_bytes())
    total, rows = about.get("images", about.get("texts")), about["rows"]
    if type(total) is not int or type(rows) is not int or min(total, rows) < 1:
        raise ValueError(f"{ABOUT} has {total!r:.20} in parts of {rows!r:.20}")
    there = {path.name for path in folder.iterdir() if path.is_file()}
    count = -(-total // rows)
    if (lost := next((n for n in range(count) if _name(n, suffix) not in there), None)) is not None:
        raise DataError(
            f"--index={printable(str(folder))}: parts are missing, such as {_name(lost, suffix)} of {count:,}; run the "
            "same command again, which makes them"
        )
    return [folder / _name(number, suffix) for number in range(count)]


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
        raise not_written(f"--out: {printable(str(path))}", error) from error


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


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
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"--out={printable(str(folder))}: {ABOUT} in it is damaged; name another folder"
            ) from error
    if others:
        raise ConfigError(f"--out={printable(str(folder))}: is a folder of other files; name a new one")
    return None
