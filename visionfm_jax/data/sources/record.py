"""What records share, whatever they come from: damage, captions that say something, keys that can be printed."""

from __future__ import annotations

import unicodedata

_SILENT = {"Cc", "Cf", "Cs", "Zl", "Zp", "Zs"}  # Unicode's categories of control, format, surrogate and space


class DamagedRecord(Exception):
    """A record whose content is not what it should be. Reading it again gives the same: it is stepped over."""


def has_text(caption: str) -> bool:
    """Whether there is more in a caption than white space and control characters."""
    return any(unicodedata.category(c) not in _SILENT for c in caption)


def printable(name: str) -> str:
    """A name from someone else's file, as it may stand in one line of a log: control characters are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
