"""Short digests of what a dataset is made of, cheap at any size: a run that continues compares them."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from visionfm_jax.errors import DataError

_REQUESTS = 32  # groups of files asked after side by side: on a network, time goes into waiting


def digest(*parts: Any) -> str:
    """CRC-32 of bytes or contiguous arrays, end to end; against accidents, not forgers."""
    crc = 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"


def of_files(root: str, groups: Mapping[str, tuple[str, Sequence[bytes]]]) -> dict[str, str]:
    """How many files each group has, and a digest of their names and sizes, in order; contents are not read.

    Args:
      root: folder.
      groups: name -> folder below `root` and names of files in it.

    Raises:
      DataError: a file cannot be read.
    """

    def of(group: tuple[str, Sequence[bytes]]) -> str:
        folder, names = os.fsencode(os.path.join(root, group[0])), group[1]
        sizes = np.array([os.stat(os.path.join(folder, name)).st_size for name in names], np.int64)
        crc = digest(b"\0".join(names), sizes)
        return f"{len(names):,} file{'s' * (len(names) != 1)}, {crc}"

    try:
        with ThreadPoolExecutor(_REQUESTS) as pool:
            return dict(zip(groups, pool.map(of, groups.values()), strict=True))
    except OSError as error:
        path = os.fsdecode(error.filename or root)
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the storage and start again") from error
