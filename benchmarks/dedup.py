"""Pairs a second and core of each pass of `visionfm data dedup`, and what they make of 5.85 billion pairs.

    python benchmarks/dedup.py

Pictures are JPEG of 256 pixels, scenes of `data.sources.scenes`. Hashes of the search are random, of natural pictures'
falling spectrum, a tenth of them copies of others; those of the whole web are so dense that a block of 9 bits has
millions of rows, which is tried with rows that share a block. Other programs on the machine make all of it slower.
"""

from __future__ import annotations

import argparse
import io
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from visionfm_jax.data import duplicates, signatures
from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.near import BLOCKS, Among, edges
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.data.sources.scenes import ScenesSource
from visionfm_jax.data.sources.tars import TarPairs

PICTURES, ROWS, DENSE, HELD_OUT, TAR = 1_000, 500_000, 300_000, 100_000, 10_000
LAION, MACHINES, CORES = 5.85e9, 64, 64


def seconds(work: Callable[[], object]) -> float:
    """CPU time that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def rows_like_pictures(count: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of `duplicates.ROW`, a tenth of them copies."""
    rows = np.zeros(count, duplicates.ROW)
    rows["row"], rows["colours"] = np.arange(count), rng.integers(0, 256, (count, 4, 4, 3))
    low = rng.standard_normal((count, 64)) / (1 + np.arange(64) % 8 + np.arange(64) // 8)
    low[:, 0] = 9
    bits = low > np.partition(low, 31)[:, 31:32]
    rows["hash"] = np.packbits(bits, axis=1).view(">u8")[:, 0]
    copies = count // 10
    of = rng.integers(0, count - copies, copies)
    changed = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (4, copies), np.uint64))
    rows["hash"][-copies:], rows["colours"][-copies:] = rows["hash"][of] ^ changed, rows["colours"][of]
    return rows


def write_tar(path: Path) -> None:
    """A tar of pictures of 256 pixels with captions."""
    scenes = ScenesSource(ScenesConfig(path="noto", scenes=100))
    with tarfile.open(path, "w") as tar:
        for i in range(PICTURES):
            buffer = io.BytesIO()
            Image.fromarray(scenes[i % 100]["image"]).resize((256, 256)).save(buffer, "JPEG", quality=95)
            for name, content in ((f"{i}.jpg", buffer.getvalue()), (f"{i}.txt", b"a drawing of some things")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def main() -> int:
    """Measure, print."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rng, times = np.random.default_rng(0), {}
    with tempfile.TemporaryDirectory() as folder:
        write_tar(Path(folder) / "00000.tar")
        source = TarPairs(folder)
        out = Path(folder) / "out"
        signed = duplicates.signatures_in(out)
        signed.path.mkdir(parents=True)
        job = duplicates.Job(source.store, "image", signed, ColumnFolder(out, {}), None, out, 1, 1, ())
        shard = source.index.tars[0], np.array(source.index.records)
        times["signatures"] = seconds(lambda: duplicates.sign(job, shard)) / PICTURES

    def search(rows: np.ndarray, tables: int) -> None:
        for table in range(tables):
            edges(rows, table, lambda a, b: np.ones(len(a), bool))

    rows = rows_like_pictures(ROWS, rng)
    times[f"search among {ROWS:,}"] = seconds(lambda: search(rows, len(BLOCKS))) / ROWS
    rows = rows_like_pictures(DENSE, rng)
    shared = rows["hash"] & np.uint64(~BLOCKS[0] & 2**64 - 1)
    rows["hash"] = shared | (rows["hash"][0] & np.uint64(BLOCKS[0]))
    like = DENSE * 2 ** BLOCKS[0].bit_count()
    times[f"search among {like:,}"] = len(BLOCKS) * seconds(lambda: search(rows, 1)) / DENSE
    among = Among(rows_like_pictures(2 * HELD_OUT, rng))
    asked = rows_like_pictures(TAR, rng)
    times[f"against {HELD_OUT:,} images"] = seconds(lambda: among.nearest(asked)) / TAR
    for what, one in times.items():
        hours = LAION * one / MACHINES / CORES / 3600
        print(
            f"{what:28} {one * 1e6:8.1f} µs a pair, {1 / one:10,.0f} pairs/s and core; "
            f"{LAION:.3g} pairs on {MACHINES} machines of {CORES} cores: {hours:.2f} h"
        )
    row, tables = duplicates.ROW.itemsize, len(BLOCKS) + 1
    on_disk = LAION * row * tables
    print(
        f"files of rows: {row * tables} bytes a pair, {on_disk / 1e12:.1f} TB, {on_disk / MACHINES / 1e9:.0f} GB each"
    )
    print(f"signatures: {signatures.SIGNATURE.itemsize + 12} bytes a pair and its key, before compression")
    return 0


if __name__ == "__main__":
    sys.exit(main())
