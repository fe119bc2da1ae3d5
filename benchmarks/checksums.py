"""Measure the cost of comparing image files with their checksums: read a class folder without and with them.

    python benchmarks/checksums.py --size=50000

Prints microseconds of one core per file, with the files in the page cache. --entries adds checksums of files that do
not exist, to imitate a large dataset: looking up one of many takes longer.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tar_index import best

from visionfm_jax.data import checksums
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.checksums import RECORD, Checksums
from visionfm_jax.data.sources.kinds import FolderConfig


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000, help="bytes per file (%(default)s)")
    parser.add_argument("--files", type=int, default=1000, help="files to read (%(default)s)")
    parser.add_argument("--entries", type=int, default=14_000_000, help="total number of checksums (%(default)s)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "class").mkdir()
        for i in range(arguments.files):
            (Path(folder) / f"class/{i:06d}.jpg").write_bytes(rng.bytes(arguments.size))
        config = FolderConfig(path=folder, split="")
        bare = open_source(config)
        checksums.make(config)
        path = Path(folder) / "visionfm.checksums"
        others = np.zeros(max(0, arguments.entries - arguments.files), RECORD)
        others["name"] = rng.integers(2**64, size=len(others), dtype=np.uint64)
        checksums._store(path, Checksums(path).records, others, bare.listing())  # type: ignore[attr-defined]
        compared = open_source(config)
        rows = rng.permutation(arguments.files).tolist()
        opening = best(lambda: Checksums(path), 1) / 1e6
        without, with_ = (best(lambda s=s: [s[i] for i in rows], len(rows)) for s in (bare, compared))
    print(f"{arguments.size:,} bytes a file, {arguments.entries:,} checksums:")
    print(f"a file read {without:.0f} us, compared {with_:.0f} us; the checksums opened in {opening:.2f} s")


if __name__ == "__main__":
    main()
