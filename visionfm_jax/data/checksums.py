"""Make checksums of the image files of a configuration, so that damaged files are noticed.

    visionfm data checksums --config=FILE.py [--config.FIELD=VALUE …]

Reads every file of the class folders, COCO and Visual Genome in `data.train` and `evals` once, and writes the checksums
to one file next to the data (in ~/.cache if that is not writable). Runs find this file and check every image that they
read. The command can be stopped and started again at any time: it then reads only new or changed files. Tars, Parquet,
TFDS and .npz files have checksums of their own, and so have remote stores (gs://, s3://, …).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from tqdm import tqdm

from visionfm_jax.config.arguments import Parser
from visionfm_jax.config.schema import Config, SourceConfig
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.checksums import RECORD, VERSION, Checksums, ImageFiles, newest, places
from visionfm_jax.data.sources.claim import claimed
from visionfm_jax.data.sources.kinds import KINDS
from visionfm_jax.data.sources.store import digest_of, write_table
from visionfm_jax.errors import ConfigError, DataError, entry_point
from visionfm_jax.storage import read, retry

CHUNK = 5_000  # files that are asked for at a time
KEPT = 300.0  # seconds after which the checksums so far are written
THREADS = 32  # that read: where storage is slow to answer, many are needed


def sources_of(config: Config) -> list[SourceConfig]:
    """The sources of a configuration that are loose files, each once.

    Raises:
      ConfigError: there are none.
    """
    named = [*config.data.train, *(s for e in config.evals for s in e.sources)]
    files = {repr(dataclasses.replace(s, weight=1.0)): s for s in named if s.loose_files and "://" not in s.path}
    if not files:
        kinds = " or ".join(name for name, cls in KINDS.items() if cls.loose_files)
        raise ConfigError(
            f"config.data.train and config.evals: no source is {kinds} on a disk; others have checksums of their own"
        )
    return list(files.values())


def make(config: SourceConfig) -> str:
    """Write the checksums of a source, and tell what was done.

    Raises:
      DataError, StorageError: a file cannot be read, or the checksums cannot be written.
    """
    level = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # that there are no checksums yet is known
    try:
        source: Any = open_source(config)
    finally:
        logging.set_verbosity(level)
    while True:
        with claimed(places(config), f"the checksums of {source.name}") as path:
            if path is not None:
                try:
                    read = _write(source, newest(config), path)
                except OSError as error:
                    raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space") from error
                return f"{source.name}: {len(source):,} files, {read:,} of them read: {path}"


def _write(source: ImageFiles, known: Checksums | None, path: Path) -> int:
    """Returns how many files were read."""
    total, read = len(source), 0
    new = np.zeros(total, RECORD)
    old = np.zeros(0, RECORD) if known is None else known.records
    pool = ThreadPoolExecutor(THREADS)
    try:
        with tqdm(total=total, desc=source.name, unit=" files", disable=not sys.stderr.isatty()) as bar:
            kept, kept_at = 0, time.monotonic()
            for start in range(0, total, CHUNK):
                rows = range(start, min(start + CHUNK, total))
                for i, (record, was_read) in zip(
                    rows, pool.map(lambda i: _record(source, i, known), rows), strict=True
                ):
                    new[i] = record
                    read += was_read
                    bar.update()
                if rows.stop == total:
                    _store(path, new, old, source.listing())
                elif read > kept and time.monotonic() - kept_at >= KEPT:
                    _store(path, new[: rows.stop], old, "")
                    kept, kept_at = read, time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
    return read


def _store(path: Path, new: np.ndarray, old: np.ndarray, listing: str) -> None:
    """Write RECORDs, sorted by name; of a file that is in both, the new one."""
    both = np.concatenate([new, old])
    both = both[np.unique(both["name"], return_index=True)[1]]
    meta = {"version": VERSION, "files": listing}
    retry(lambda: write_table(path, [both], lambda: meta), lambda: f"{path} cannot be written")


def _record(source: ImageFiles, index: int, known: Checksums | None) -> tuple[tuple[int, ...], bool]:
    """RECORD of a file, and whether it was read for it."""
    name = source.file(index)
    path = os.path.join(source.root, name)
    old = known.of(name) if known is not None else None

    def record() -> tuple[tuple[int, ...], bool]:
        with open(path, "rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            if old is not None and (state.st_size, state.st_mtime_ns) == (old["size"], old["stamp"]):
                return tuple(old.tolist()), False
            content = file.read()
        return (digest_of(name), len(content), state.st_mtime_ns, zlib.crc32(content)), True

    return read(record, lambda: path)


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.data.checksums") -> None:
    """Parse, read, print."""
    config, _ = Parser(program, __doc__).parse_with_config(argv)
    for source in sources_of(config):
        print(make(source), flush=True)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
