"""Measure the work on folders of tars: pairs per second of one core, memory, and random reads.

    python benchmarks/curation.py index select keep --shards=10,1000 --pairs=200     # memory
    python benchmarks/curation.py index select keep --shards=10 --pairs=5000         # rates
    python benchmarks/curation.py reads --shards=10 --pairs=2000

Each kind of work runs in a new process, on one core, for each number of shards:

- index: the index of the tars is made;
- select: three conditions on columns of the parquets beside the tars;
- keep: of the pairs that a computed column leaves, the half that is best by another.

Printed are pairs per second of processor time, without the start of the process, and the most memory that it had: all
of it, and that without files mapped into memory. The tars have the same content, one file under many names.

`reads` compares random reads of records, picture and caption: from indexed tars; from ArrayRecord files with the same
records, as a TFDS dataset (`kind` "tfds"), with each record parsed as tf.train.Example and nothing else, and without
parsing, which gives bytes but no record. They alternate in rounds; above 1, the tars are faster. Files are in the page
cache, and time is that of the processor.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from halves import machine
from tar_index import write

from visionfm_jax.data import column_folder
from visionfm_jax.data.copies import copy_pairs
from visionfm_jax.data.select import select
from visionfm_jax.data.shards import Here
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.sources.selection import read_selection
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tar_index import keys, open_index
from visionfm_jax.data.sources.tars import TarPairs

READS, ROUNDS = 3000, 5


def make(folder: Path, shards: int, pairs: int, size: int, copy: Callable[[Path, Path], object] = os.link) -> None:
    """FOLDER/tars with parquets, and FOLDER/scores with computed columns."""
    tars, rng = folder / "tars", np.random.default_rng(0)
    tars.mkdir()
    write(tars / "00000.tar", pairs, size)
    table = {
        "key": [f"{i:09d}" for i in range(pairs)],
        "status": ["success"] * pairs,
        "caption": ["words " * 8] * pairs,
        "url": [f"https://example.com/pictures/{i}.jpg" for i in range(pairs)],
        "width": rng.integers(100, 800, pairs),
        "NSFW": rng.choice(["UNLIKELY", "UNSURE", "NSFW"], pairs),
        "pwatermark": rng.random(pairs),
    }
    pq.write_table(pa.table(table), tars / "00000.parquet")
    for t in range(1, shards):
        for kind in ("tar", "parquet"):
            copy(tars / f"00000.{kind}", tars / f"{t:05d}.{kind}")
    index, scores = open_index(Store(str(tars)), "txt"), column_folder.create(folder / "scores", {"command": "made"})
    names = keys(Store(str(tars)), "00000.tar", index.records[:pairs])
    for tar in index.tars:
        similarity, duplicate = rng.normal(0.28, 0.05, pairs).astype(np.float32), rng.random(pairs) < 0.3
        scores.write(tar, names, {"similarity": similarity, "duplicate": duplicate})


def do_index(folder: Path) -> int:
    """The index, made again."""
    for path in (folder / "tars").glob("*.index"):
        path.unlink()
    return len(open_index(Store(str(folder / "tars")), "txt", Here()).records)


def do_select(folder: Path) -> int:
    """Three columns of the parquets."""
    where = "width >= 200 and NSFW == 'UNLIKELY' and pwatermark < 0.8"
    return select(str(folder / "tars"), where, folder / "s.pairs", engine=Here())["pairs"]


def do_keep(folder: Path) -> int:
    """Two computed columns."""
    pairs = len(TarPairs(str(folder / "tars")))
    more = {"keep": pairs // 2, "columns": [folder / "scores"], "engine": Here()}
    return select(str(folder / "tars"), "not duplicate", folder / "k.pairs", **more)["pairs"]


WORK: dict[str, Callable[[Path], int]] = {"index": do_index, "select": do_select, "keep": do_keep}
"""What is done with a folder of `make`; each gives the number of pairs."""


def memory(what: str) -> float:
    """Of this process, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what + ":")) / 1024


def measure(name: str, folder: Path) -> dict[str, Any]:
    """In a process of its own: pairs, seconds of the processor, MiB."""
    most, ended = [0.0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.02):
            most[0] = max(most[0], memory("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.process_time()
    pairs = WORK[name](folder)
    seconds = time.process_time() - start
    ended.set()
    watcher.join()
    return {"work": name, "pairs": pairs, "seconds": seconds, "peak_mib": memory("VmHWM"), "own_mib": most[0]}


def work(names: list[str], shards: list[int], pairs: int, size: int) -> list[dict[str, Any]]:
    """Measure each kind of work on each number of shards."""
    found = []
    for count in shards:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), count, pairs, size)
            tars = count * (Path(folder) / "tars" / "00000.tar").stat().st_size
            for name in names:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    result = pool.submit(measure, name, Path(folder)).result() | {"shards": count}
                found.append(result)
                rate = result["pairs"] / result["seconds"]
                print(
                    f"{name:8} {count:5,} tars of {pairs:,} pairs: {rate:10,.0f} pairs/s, most memory "
                    f"{result['peak_mib']:.0f} MiB, {result['own_mib']:.0f} without mapped files",
                    flush=True,
                )
            index = next((Path(folder) / "tars").glob("*.index")).stat().st_size
            print(f"the index has {index / tars:.3%} of the bytes of the tars", flush=True)
    return found


def reads(shards: int, pairs: int, size: int) -> list[dict[str, float]]:
    """Records per second of each reader, round by round."""
    from array_record.python.array_record_data_source import ArrayRecordDataSource
    from tensorflow_datasets.proto.tf_example_generated_pb2 import Example

    class Parsed(ArrayRecordDataSource):
        def __getitem__(self, index: int) -> dict[str, Any]:
            fields = Example.FromString(super().__getitem__(index)).features.feature
            return {name: fields[name].bytes_list.value[0] for name in ("image", "caption")}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make(folder, shards, pairs, size, shutil.copy)
        tars, out = TarPairs(str(folder / "tars")), folder / "all.pairs"
        select(tars.store.url, "width > 0", out)
        copy_pairs(tars, read_selection(str(out), tars.index), folder / "tfds", "arrayrecord")
        files = sorted(map(str, (folder / "tfds").glob("*array_record-*")))
        sources = {
            "tars": tars, "TFDS": open_source(TfdsConfig(path=str(folder / "tfds"))),
            "ArrayRecord": Parsed(files), "unparsed": ArrayRecordDataSource(files),
        }  # fmt: skip
        order = np.random.default_rng(0).permutation(len(tars))[:READS].tolist()
        rounds = []
        for _ in range(ROUNDS):
            speeds = {}
            for name, source in sources.items():
                start = time.process_time()
                for i in order:
                    source[i]
                speeds[name] = len(order) / (time.process_time() - start)
            rounds.append(speeds)
            print("  ".join(f"{name} {speed:,.0f}/s" for name, speed in speeds.items()), flush=True)
        for name in list(sources)[1:]:
            ratio = statistics.median(speeds["tars"] / speeds[name] for speeds in rounds)
            print(f"tars / {name}: {ratio:.2f}")
        return rounds


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", nargs="+", choices=[*WORK, "reads"])
    parser.add_argument("--shards", default="10", help="numbers of tars, joined by commas (%(default)s)")
    parser.add_argument("--pairs", type=int, default=1000, help="pairs of a tar (%(default)s)")
    parser.add_argument("--size", type=int, default=20_000, help="bytes of a picture (%(default)s)")
    arguments = parser.parse_args()
    shards = [int(number) for number in arguments.shards.split(",")]
    results: list[Any] = []
    if names := [name for name in arguments.work if name != "reads"]:
        results += work(names, shards, arguments.pairs, arguments.size)
    if "reads" in arguments.work:
        results += reads(shards[0], arguments.pairs, arguments.size)
    packages = {name: version(name) for name in ("visionfm_jax", "pyarrow", "numpy", "array_record")}
    about = {"machine": machine(), "python": sys.version.split()[0], "versions": packages, "date": str(date.today())}
    print(json.dumps({"command": " ".join(sys.argv), "results": results, **about}))


if __name__ == "__main__":
    main()
