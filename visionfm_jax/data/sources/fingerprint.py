"""Short digests of what a dataset is made of, cheap at any size: a run that continues compares them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from visionfm_jax.data.sources.store import Store, side_by_side
from visionfm_jax.errors import DataError


def digest(*parts: Any) -> str:
    """CRC-32 of bytes or contiguous arrays, end to end; against accidents, not forgers."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def of_files(store: Store, groups: Mapping[str, tuple[str, Sequence[bytes]]]) -> dict[str, str]:
    """How many files each group has, and a digest of their names and sizes, in order; contents are not read.

    Args:
      store: the folder.
      groups: name -> a folder within, and names of files in it.

    Raises:
      DataError: a file cannot be read.
    """

    def of(group: tuple[str, Sequence[bytes]]) -> str:
        folder, names = group
        crc = digest(b"\0".join(names), store.sizes(folder, [*map(os.fsdecode, names)]))
        return f"{len(names):,} file{'s' * (len(names) != 1)}, {crc}"

    try:
        return dict(zip(groups, side_by_side(of, groups.values()), strict=True))
    except OSError as error:
        path = os.fsdecode(error.filename or store.url)
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the storage and start again") from error
