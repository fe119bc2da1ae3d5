"""Measure the cost of the checksums in the index of tars: read only the headers of a tar, and all of it.

    python benchmarks/tar_index.py --size=50000

Prints microseconds of one core per pair. The tar is in the page cache; otherwise the storage determines the time.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tars import TarPairs


def write(path: Path, pairs: int, size: int) -> None:
    """A tar as img2dataset streams it."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w|") as tar:
        for i in range(pairs):
            for suffix, content in (("jpg", rng.bytes(size)), ("json", b"{}" * 300), ("txt", b"words " * 8)):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size, info.mtime = len(content), 1700000000.25
                tar.addfile(info, io.BytesIO(content))


def headers(path: Path) -> None:
    """Every member's name and place."""
    with path.open("rb", buffering=0) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar_index.key_of(member.name)


def best(work: Callable[[], object], pairs: int) -> float:
    """Microseconds a pair, the shortest of five times."""
    seconds = []
    for _ in range(5):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds) / pairs * 1e6


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=50_000, help="bytes per image (%(default)s)")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs in the tar (%(default)s)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "00000.tar")
        write(path, arguments.pairs, arguments.size)
        stat = path.stat()
        tar = (path.name, (stat.st_size, str(stat.st_mtime_ns)))
        bare = best(lambda: headers(path), arguments.pairs)
        whole = best(lambda: tar_index.scan(Store(folder), "txt", tar), arguments.pairs)
        source = TarPairs(folder)
        contents = [source[i] for i in range(0, arguments.pairs, 10)]
        read = best(lambda: [source[i] for i in range(0, arguments.pairs, 10)], len(contents))
        pairs = [(record["image"], record["caption"].encode()) for record in contents]
        check = best(lambda: [tar_index.checksum(*pair) for pair in pairs], len(pairs))
    print(f"{arguments.size:,} bytes a picture: headers {bare:.0f} us, whole {whole:.0f} us ({whole / bare:.2f}x)")
    print(f"a record read: {read:.0f} us, of which its checksum {check:.0f} us")


if __name__ == "__main__":
    main()
