"""Pairs a second and core of each pass of `visionfm data dedup`, and what they make of 5.85 billion pairs.

    python benchmarks/dedup.py

Pictures are JPEG of 256 pixels, scenes of `data.sources.scenes`. Hashes of the search are random, of natural pictures'
falling spectrum, a tenth of them copies of others; those of the whole web are so dense that a block of 9 bits has
millions of rows, which is tried with rows that share a block. Embeddings are random, around 500 themes, a tenth of
them near to others; of the whole web each is compared with more centres, which is measured, and in larger clusters,
whose time follows from that of one comparison. Other programs on the machine make all of it slower.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before numpy is imported: matrix products of one core

import numpy as np
from PIL import Image

from visionfm_jax.data import duplicates, signatures, similar
from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.near import BLOCKS, Among, edges
from visionfm_jax.data.sources.kinds import ScenesConfig
from visionfm_jax.data.sources.scenes import ScenesSource
from visionfm_jax.data.sources.tars import TarPairs

PICTURES, ROWS, DENSE, HELD_OUT, TAR = 1_000, 500_000, 300_000, 100_000, 10_000
EMBEDDINGS, WIDTH, THRESHOLD, CLUSTER = 50_000, 512, 0.95, 2**14
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


def embeddings(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int16 (N, E), whose last tenth is near to others; and to which, int64 (N / 10,).

    The others lie around 500 themes, in a falling spectrum, as those of a trained model do.
    """
    copies = EMBEDDINGS // 10
    scale = 1 / np.sqrt(1 + np.arange(WIDTH))
    themes = rng.standard_normal((500, WIDTH))
    rows = scale * (
        themes[rng.integers(0, 500, EMBEDDINGS - copies)] + rng.standard_normal((EMBEDDINGS - copies, WIDTH))
    )
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    of, cosines = rng.integers(0, len(rows), copies), rng.uniform(0.951, 0.99, (copies, 1))
    other = rng.standard_normal((copies, WIDTH))
    other -= (other * rows[of]).sum(1, keepdims=True) * rows[of]
    other /= np.linalg.norm(other, axis=1, keepdims=True)
    near = cosines * rows[of] + np.sqrt(1 - cosines**2) * other
    return similar.rounded(np.concatenate([rows, near]).astype(np.float16)), of


def nearest(vectors: np.ndarray, clusters: int, rng: np.random.Generator) -> np.ndarray:
    """The clusters of embeddings, int64 (N, 2), as the passes find them."""
    sample = vectors[rng.choice(len(vectors), clusters * duplicates.SAMPLE, replace=False)]
    return similar.nearest(vectors, similar.centres_of(sample, clusters, rng), 2)


def compare(vectors: np.ndarray, rng: np.random.Generator) -> None:
    """Find the near pairs among embeddings."""
    clusters = -(-len(vectors) // duplicates.CLUSTER)
    near = nearest(vectors, clusters, rng)
    for cluster in range(clusters):
        similar.edges(vectors[(near == cluster).any(1)], THRESHOLD, lambda a, b: np.ones(len(a), bool))


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
        shard = source.index.shards[0]
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
    vectors, of = embeddings(rng)
    times[f"embeddings among {EMBEDDINGS:,}"] = seconds(lambda: compare(vectors, rng)) / EMBEDDINGS
    centres, some = rng.permutation(np.tile(vectors, (2, 1)))[: duplicates.CLUSTERS], vectors[:CLUSTER]
    one_comparison = seconds(lambda: similar.edges(some, THRESHOLD, lambda a, b: a < 0)) / (CLUSTER**2 / 2)
    assigned = seconds(lambda: similar.nearest(some, centres, similar.NEAREST)) / CLUSTER
    compared = similar.NEAREST**2 * LAION / len(centres) / 2
    times[f"embeddings among {LAION:.3g}"] = assigned + compared * one_comparison
    for what, one in times.items():
        hours = LAION * one / MACHINES / CORES / 3600
        print(
            f"{what:28} {one * 1e6:8.1f} µs a pair, {1 / one:10,.0f} pairs/s and core; "
            f"{LAION:.3g} pairs on {MACHINES} machines of {CORES} cores: {hours:.2f} h"
        )
    row, tables = duplicates.ROW.itemsize, len(BLOCKS) + 1
    both = similar.NEAREST * (duplicates.HEAD.itemsize + 2 * WIDTH)
    for what, size in (("rows", row * tables), ("embeddings", both)):
        total = LAION * size
        print(f"files of {what}: {size:,} bytes a pair, {total / 1e12:.1f} TB, {total / MACHINES / 1e9:.0f} GB each")
    for clusters in (7, 64, 512):
        near = nearest(vectors, clusters, rng)
        mine, theirs = near[-len(of) :], near[of]
        one, two = ((mine[:, :n, None] == theirs[:, None, :n]).any((1, 2)).mean() for n in (1, 2))
        print(f"near embeddings that share one of {clusters} clusters: {one:.2%} the nearest, {two:.2%} one of two")
    print(f"signatures: {signatures.SIGNATURE.itemsize + 12} bytes a pair and its key, before compression")
    return 0


if __name__ == "__main__":
    sys.exit(main())
