"""Selections of pairs of a folder of tars: a bit for each, written by `data.select` and read by `tars.TarPairs`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.data.sources.store import read_table, write_table
from visionfm_jax.data.sources.tar_index import Index
from visionfm_jax.errors import DataError, printable

_KIND = "selection 2"


@dataclass(frozen=True)
class Selection:
    """Chosen pairs, a tar after the other.

    Attributes:
      bits: uint8; the pairs of tar t are the bits from byte first[t] on, packed as `np.packbits` does.
      first: int64 (T+1,).
      counts: int64 (T,), chosen pairs.
    """

    bits: np.ndarray
    first: np.ndarray
    counts: np.ndarray

    def nth(self, tar: int, k: int) -> int:
        """Number, among all pairs of a tar, of its k-th chosen one."""
        return int(np.flatnonzero(np.unpackbits(self.bits[self.first[tar] : self.first[tar + 1]]))[k])


def write_selection(path: Path, index: Index, where: str, chosen: Iterable[np.ndarray]) -> None:
    """Write what was chosen.

    Args:
      path: file.
      index: of the tars.
      where: the condition, for people.
      chosen: for each tar, bool (pairs,).

    Raises:
      OSError: the file cannot be written.
    """
    counts: list[int] = []

    def pieces() -> Iterable[np.ndarray]:
        for bits in chosen:
            counts.append(int(bits.sum()))
            yield np.packbits(bits)

    def meta() -> dict[str, Any]:
        tars = [
            [t["name"], t["size"], t["crc"], t["pairs"], count] for t, count in zip(index.tars, counts, strict=True)
        ]
        return {"kind": _KIND, "where": where, "tars": tars}

    write_table(path, pieces(), meta)


def read_selection(path: str, index: Index) -> Selection:
    """A selection from these very tars.

    Raises:
      DataError: there is no such file, or the tars are not those that it was made from.
    """
    again = "run visionfm data select again"
    try:
        bits, meta = read_table(Path(path).expanduser(), np.uint8, verify=True)
        tars = meta.get("tars")
        if meta.get("kind") != _KIND or not isinstance(tars, list) or not all(map(_is_entry, tars)):
            raise ValueError("the file is of another kind or version")
        names, pairs, counts = ([tar[i] for tar in tars] for i in (0, 3, 4))
        first = [0, *accumulate(-(-n // 8) for n in pairs)]
        if (
            names != sorted(set(names))
            or first[-1] != len(bits)
            or counts != [int(np.bitwise_count(bits[a:b]).sum()) for a, b in pairwise(first)]
        ):
            raise ValueError("the file contradicts itself")
    except FileNotFoundError:
        raise DataError(f"selection {path}: no such file; make it with visionfm data select") from None
    except (OSError, ValueError) as error:
        raise DataError(f"selection {path}: cannot be read ({error}); {again}") from error
    then = {name: (size, crc, pairs) for name, size, crc, pairs, _ in tars}
    now = {tar["name"]: (tar["size"], tar["crc"], tar["pairs"]) for tar in index.tars}
    for what, names in (
        ("changed", [name for name in then if name in now and then[name] != now[name]]),
        ("vanished", [name for name in then if name not in now]),
        ("came", [name for name in now if name not in then]),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise DataError(f"selection {path}: {printable(names[0])}{more} {what} after it was made; {again}")
    return Selection(bits, np.array(first, np.int64), np.array(counts, np.int64))


def _is_entry(tar: Any) -> bool:
    """Whether it is what `write_selection` keeps of a tar."""
    return (
        isinstance(tar, list)
        and len(tar) == 5
        and isinstance(tar[0], str)
        and all(type(number) is int and 0 <= number < 2**63 for number in tar[1:])
    )
