"""Parts of records of every source: damage, pixels of no class, captions that say something, names to be printed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import numpy as np

_SILENT = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories of control, format, surrogate and space


class DamagedRecord(Exception):
    """A record whose content is not what it should be. Reading it again gives the same: it is stepped over."""


def ignored(dtype: np.dtype) -> float:
    """What stands in a map where there is no image: the largest value of unsigned integers (255), else -1."""
    return np.iinfo(dtype).max if np.issubdtype(dtype, np.unsignedinteger) else -1


def has_text(caption: str) -> bool:
    """Whether there is more in a caption than white space and control characters."""
    return any(unicodedata.category(c) not in _SILENT for c in caption)


def left_out(reason: str, count: int, first: Sequence[str]) -> str:
    """A line of the log on what a source does not read: how many, and the names of the first ones."""
    more = " …" if count > len(first) else ""
    return f"left out: {count:,} {reason}: {', '.join(first)}{more}"
