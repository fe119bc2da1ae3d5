"""Lists of text, one entry a line: prompts and names of classes, of this package (`data/text`) or the user's own."""

from __future__ import annotations

import functools
import json
from importlib import resources
from pathlib import Path
from typing import Any

from visionfm_jax.errors import DataError


@functools.cache
def benchmarks() -> dict[str, dict[str, list[str]]]:
    """By set: its `prompts`, and `classes` where labels or folders are only numbers."""
    return json.loads((resources.files("visionfm_jax.data.text") / "benchmarks.json").read_text("utf-8"))


def _of_benchmarks() -> dict[str, tuple[str, ...]]:
    """SET_prompts and SET_classes."""
    return {f"{name}_{what}": tuple(x) for name, lists in benchmarks().items() for what, x in lists.items()}


def list_names() -> list[str]:
    """The shipped lists."""
    files = resources.files("visionfm_jax.data.text").iterdir()
    return sorted([*(f.name.removesuffix(".txt") for f in files if f.name.endswith(".txt")), *_of_benchmarks()])


def read_lines(name: str | Any) -> tuple[str, ...]:
    """The lines of a shipped list or of a UTF-8 text file, without blanks around them; at least one.

    Args:
      name: of a shipped list ("imagenet_prompts", "imagenet_classes", "food101_prompts", …), or a path, also a `Path`.
    Raises:
      DataError: no such list or file, a file that cannot be read as text, one without lines, or with a blank one.
    """
    if name in _of_benchmarks():
        return _of_benchmarks()[name]
    shipped = list_names()
    if name in shipped:
        file = resources.files("visionfm_jax.data.text") / f"{name}.txt"
    else:
        file = Path(name) if isinstance(name, str) else name
    try:
        text = file.read_text("utf-8-sig")
    except FileNotFoundError:
        raise DataError(
            f"{name!r} is neither a shipped list nor a file; name one of {', '.join(shipped)}, or a text file's path"
        ) from None
    except (OSError, ValueError) as error:  # also bytes that are no UTF-8
        raise DataError(f"{name}: cannot be read as UTF-8 text ({error}); give a plain text file") from None
    lines = tuple(line.strip() for line in text.removesuffix("\n").split("\n"))
    if "" in lines:
        where = f"line {lines.index('') + 1} is blank" if text.strip() else "no text in it"
        raise DataError(f"{name}: {where}; every line is one entry; put one on each")
    return lines
