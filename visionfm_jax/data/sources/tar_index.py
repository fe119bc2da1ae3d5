"""Where every picture and caption lies in a folder of tars, found once and kept as a file beside them.

Headers and captions are read, never pictures. A pair takes 16 bytes, which are mapped into memory, so that all
processes of a host share them: 1.2 billion pairs are a file of 19 GB and hardly any memory of a process.
"""

from __future__ import annotations

import concurrent.futures
import functools
import multiprocessing
import os
import sys
import tarfile
import types
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from absl import logging
from tqdm import tqdm

from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES
from visionfm_jax.data.sources.store import Store, read_table, write_table
from visionfm_jax.errors import DataError

BLOCK = 512  # bytes; every header and every content of a tar begins at a multiple
RECORD = np.dtype([("image", "<u4"), ("image_size", "<u4"), ("caption", "<u4"), ("caption_size", "<u4")])
"""Of a pair: where its contents begin, in blocks, and how many bytes they have; no caption is 0 and 0."""

NO_CAPTION, EMPTY, NOT_UTF8 = "no caption", "an empty caption", "a caption that is not UTF-8"
_NAMED = 3  # keys of skipped pictures that are kept, per tar and reason
_VERSION = 1
_PROCESSES_FROM = 16  # tars; for fewer, other processes take longer to start than to read
_REQUESTS = 32  # tars of a store that are read side by side
_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Index:
    """All pairs of a folder, tar by tar in order of name.

    Attributes:
      records: RECORD (N,).
      starts: int64 (T+1,); the pairs of tar t are records[starts[t] : starts[t + 1]].
      tars: of each tar `name`, `size`, `stamp`, `pairs`, `crc` (of its keys and records), and where they apply `cut`
        (the key at which it ends too early) and `skipped` (reason -> number of pictures and the first keys).
    """

    records: np.ndarray
    starts: np.ndarray
    tars: list[dict[str, Any]]
    path: Path

    @property
    def crc(self) -> int:
        """Of what the tars hold; equal on every host, and after a copy."""
        return zlib.crc32(repr([(tar["name"], tar["crc"]) for tar in self.tars]).encode())


def key_of(member: str) -> tuple[str, str]:
    """Key and suffix of a member: its file's name up to the first dot, and the rest in lower case."""
    key, _, suffix = member.rpartition("/")[2].partition(".")
    return key, suffix.lower()


def open_index(store: Store, suffix: str) -> Index:
    """The index of a folder's tars; those that are new or changed since the last time are read first.

    Args:
      store: the folder.
      suffix: of the members with captions, such as "txt"; empty: all pictures, without captions.

    Raises:
      DataError: no tar, a folder or tar that cannot be read, or no place for the index.
    """
    tars = {name: stat for name, stat in store.files().items() if name.endswith(".tar") and not name.startswith(".")}
    if not tars:
        raise DataError(f"{store.url}: holds no .tar file; set the folder that img2dataset wrote its shards into")
    name = f"visionfm_pairs_{suffix}.index" if suffix else "visionfm_pictures.index"
    beside, cache = Path(store.path(name)), store.cache(name)
    places = [beside, cache] if store.local else [cache]
    known = _best(places, tars)
    if not store.local and not _fresh(known, tars) and store.fetch(name, cache):
        known = _best(places, tars)
    if known is not None and _fresh(known, tars):
        return known
    index = _write(store, suffix, tars, known, places)
    if not store.local and not store.put(index.path, name):
        logging.info("%s: cannot be written, so the index is kept in %s only", store.url, index.path)
    return index


def read_index(path: Path) -> Index | None:
    """An index as it was written; None if there is none, or it is damaged or of another version."""
    try:
        records, meta = read_table(path, RECORD)
    except (OSError, ValueError):
        return None
    if meta.get("version") != _VERSION:
        return None
    starts = np.cumsum([0, *(tar["pairs"] for tar in meta["tars"])], dtype=np.int64)
    return Index(records, starts, meta["tars"], path) if starts[-1] == len(records) else None


def scan(store: Store, suffix: str, tar: tuple[str, tuple[int, str]]) -> tuple[np.ndarray, dict[str, Any]]:
    """The pairs of one tar, RECORD (n,), and its entry for `Index.tars`.

    Raises:
      DataError: it cannot be read.
    """
    name, (size, stamp) = tar
    try:
        with store.open(name) as file:
            pairs, cut, skipped = _scan(file, size, suffix)
    except Exception as error:  # every store has its own
        raise DataError(f"{store.path(name)}: cannot be read ({error}); check your access and the storage") from error
    records = np.array(list(pairs.values()), RECORD)
    entry: dict[str, Any] = {"name": name, "size": size, "stamp": stamp, "pairs": len(records)}
    entry["crc"] = zlib.crc32("\n".join(pairs).encode(), zlib.crc32(records.tobytes()))
    if cut is not None:
        entry["cut"] = cut
    if skipped:
        entry["skipped"] = {reason: [len(keys), keys[:_NAMED]] for reason, keys in skipped.items()}
    return records, entry


def keys(store: Store, name: str, records: np.ndarray) -> list[str]:
    """Keys of pairs of a tar, from the headers before their pictures.

    Raises:
      OSError: they cannot be read, or are no headers any more.
    """
    starts = ((records["image"].astype(np.int64) - 1) * BLOCK).tolist()
    try:
        return [
            key_of(tarfile.TarInfo.frombuf(header, "utf-8", "replace").name)[0]
            for header in store.read_many(name, starts, BLOCK)
        ]
    except tarfile.HeaderError as error:
        raise OSError(f"{name}: {error}; the file has changed") from error


def each(
    function: Callable[[_T], _R], tars: Sequence[_T], *, local: bool, title: str, jobs: int | None = None
) -> Iterator[_R]:
    """`map` over tars, in order: in `jobs` processes, or in threads where the time goes into waiting for a store."""
    jobs = jobs or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    bar = functools.partial(
        tqdm, total=len(tars), desc=title, unit=" tars", delay=2, leave=False, disable=not sys.stderr.isatty()
    )
    if local and (jobs == 1 or len(tars) < _PROCESSES_FROM):
        yield from bar(map(function, tars))
        return
    pool: concurrent.futures.Executor
    if local:
        pool = concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"))
    else:
        pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS)
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")  # spawned processes would import it: the whole trainer
    try:
        results = pool.map(function, tars)
    finally:
        sys.modules["__main__"] = main
    try:
        yield from bar(results)
    finally:
        pool.shutdown(cancel_futures=True)


def _scan(
    file: BinaryIO, size: int, suffix: str
) -> tuple[dict[str, tuple[int, int, int, int]], str | None, dict[str, list[str]]]:
    """Pairs by key in order of their first member, the key where the tar is cut, and skipped keys by reason."""
    images: dict[str, tuple[int, int]] = {}
    captions: dict[str, tuple[int, int]] = {}
    bad: dict[str, str] = {}  # key -> what is wrong with its caption
    cut, key = None, ""
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
            while (member := tar.next()) is not None:
                key, kind = key_of(member.name)
                if member.offset_data + member.size > size:
                    cut = key
                    break
                place = member.offset_data // BLOCK, member.size
                if not member.isfile() or max(place) >= 2**32:
                    continue
                if suffix and kind == suffix:
                    captions[key] = place
                    file.seek(member.offset_data)
                    bad[key] = _caption_error(file.read(member.size))
                elif f".{kind}" in IMAGE_SUFFIXES:
                    images[key] = place
            if cut is None:
                file.seek(tar.offset)
                if file.read(BLOCK) != bytes(BLOCK):  # no mark of the end: tarfile takes damage for it in silence
                    cut = key
    except tarfile.ReadError:
        cut = key
    pairs, skipped = {}, {}
    for key, image in images.items():
        reason = bad.get(key, NO_CAPTION) if suffix else ""
        if not reason:
            pairs[key] = (*image, *captions.get(key, (0, 0)))
        elif key != cut or key in captions:
            skipped.setdefault(reason, []).append(key)
    return pairs, cut, skipped


def _caption_error(content: bytes) -> str:
    try:
        return "" if content.decode().strip() else EMPTY
    except UnicodeDecodeError:
        return NOT_UTF8


def _best(places: Iterable[Path], tars: dict[str, tuple[int, str]]) -> Index | None:
    """The index that knows most of the tars as they are now."""
    found = [index for path in places if (index := read_index(path)) is not None]
    return max(found, key=lambda index: len(_known(index, tars)), default=None)


def _known(index: Index, tars: dict[str, tuple[int, str]]) -> dict[str, int]:
    """Name -> number in the index, of tars that have not changed."""
    return {tar["name"]: t for t, tar in enumerate(index.tars) if tars.get(tar["name"]) == (tar["size"], tar["stamp"])}


def _fresh(index: Index | None, tars: dict[str, tuple[int, str]]) -> bool:
    return index is not None and len(_known(index, tars)) == len(tars) == len(index.tars)


def _write(
    store: Store, suffix: str, tars: dict[str, tuple[int, str]], known: Index | None, places: Sequence[Path]
) -> Index:
    """Read the tars that are not known, and write an index to the first place that can be written."""
    old = _known(known, tars) if known is not None else {}
    todo = [tar for tar in tars.items() if tar[0] not in old]
    entries: list[dict[str, Any]] = []

    def pieces() -> Iterator[np.ndarray]:
        entries.clear()
        logging.info("%s: indexing %d of %d tars", store.url, len(todo), len(tars))
        read = each(functools.partial(scan, store, suffix), todo, local=store.local, title="indexing")
        for name in tars:
            if name in old:
                assert known is not None
                t = old[name]
                records, entry = known.records[known.starts[t] : known.starts[t + 1]], known.tars[t]
            else:
                records, entry = next(read)
            entries.append(entry)
            yield records

    reasons = []
    for path in places:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_table(path, pieces(), lambda: {"version": _VERSION, "tars": entries})
        except OSError as error:
            reasons.append(f"{path}: {error.strerror}")
            continue
        index = read_index(path)
        assert index is not None
        return index
    raise DataError(f"{store.url}: no place for the index of the tars ({'; '.join(reasons)}); make one writable")
