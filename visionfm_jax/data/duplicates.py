"""Which pairs of a folder of tars are copies of better ones, in passes over files that each fit into memory.

1. `sign`: of each tar, the signatures of its pictures and captions (`data.signatures`), kept in --out/signatures.
2. `spread`: of some tars together, these rows, for each block of the hash sorted by its value, into buckets.
3. `find`: of each bucket, which rows are copies of which better ones (`data.near`).
4. With embeddings, `sample` and `spread_embeddings` put each pair into files by its nearest clusters, and
   `find_similar` finds in each which embeddings are near (`data.similar`).
5. `choose`: which of these pairs are kept. In order from the best to the worst, a pair is dropped where it is a copy of
   one that is kept. So every dropped pair is a copy of the kept one that it is named with, however long the chain of
   copies of copies around it. The best are those of the largest score, then of the most pixels, then the first. Two
   kept pairs may be copies all the same, where the worse has more than `near.MOST` better copies.
6. `look_up`: of some tars together, what is written of the kept pairs in them, for each pair that is dropped for one,
   sorted by the tars of the dropped pairs.
7. `gather`: of some tars together, what was looked up for the pairs that are dropped of them, tar by tar.
8. `write`: of each tar, its columns.

So every signature is read once by each of 2, 4, 6 and 8, wherever the copies lie. The files of 6 take about 95 bytes
for each dropped pair, and those of 7 as many, if keys have 11 characters.

Memory: of 1 and 8 that of a tar's rows; of 2, 6 and 7 `ROWS` rows, or a tar's; of 3 as many on average, and at least
those of one value of a block (a 512th of all, 88 bytes each); of 4 an eighth of `ROWS` embeddings, or a tar's, where
those of a larger cluster lie in a file and are compared block by block, and in the process that was started the sample
that the centres are found of, `SAMPLE` embeddings for each; of 5, in that process, 17 bytes for each found copy of
another, and up to 133 more while it chooses (by tracemalloc, of a million); there are at most `near.MOST` for a pair
and block or cluster. Before 6 it holds 37 bytes for each dropped pair. Of a picture with many equal copies, to the bit,
one takes part. Held-out images take 900 bytes each in every process of 8.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import shutil
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from visionfm_jax.data import signatures, similar
from visionfm_jax.data.column_folder import KEY, ColumnFolder
from visionfm_jax.data.held_out import HeldOut
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.near import BLOCKS, edges
from visionfm_jax.data.shards import Engine, map_shards
from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.store import Store, read_table, write_table
from visionfm_jax.data.sources.tar_index import Index, Shard
from visionfm_jax.data.sources.tars import pair_in
from visionfm_jax.errors import printable
from visionfm_jax.storage import read, read_bytes, remove_unfinished, replacing, write_text, writing

BY = (
    "image",
    "caption",
    "pair",
)  # what makes a pair a duplicate: a near-copy of the picture, an equal caption, or both
WHY = (*BY, "similar")  # why one is dropped: that, or a near embedding where the pictures are no near-copies
ROWS = 2**21  # pairs that are in memory at once
EMBEDDED = 8  # times fewer are, where their embeddings are, too
CLUSTER, CLUSTERS = 2**13, 2**16  # embeddings of a cluster, in the mean; and the most clusters
SAMPLE, TARS = 16, 256  # embeddings for each cluster that its centre is found from, and the most tars that they are of
CAPTION = len(BLOCKS)  # number of the table by captions, behind those by blocks of the hash
SIMILAR = CAPTION + 1  # and of that by clusters of embeddings
TOP = 10  # captions that are reported
GROUPS, ABOUT = "groups", "about.json"
VERSION = 1  # of the files in `Job.work`, and of what decides on their content: constants, `near`, `similar`
ROW = np.dtype(
    [
        *signatures.SIGNATURE.descr,
        ("embedding", "<u8"),
        ("caption", "<u8"),
        ("row", "<u8"),
        ("score", "<f4"),
        ("pixels", "<u4"),
    ]
)  # the first four fields, 72 bytes, tell pairs apart; `embedding` is its digest, 0 where none is compared
HEAD = np.dtype([("cluster", "<u4"), ("row", ROW)])  # of an embedding in a file of clusters
EDGE = np.dtype([("worse", "<u8"), ("better", "<u8"), ("distance", "u1")])
DUPLICATE = np.dtype([("row", "<u8"), ("kept", "<u8")])
KEPT = pa.schema(
    [
        ("row", pa.uint64()),
        ("name", pa.string()),
        ("hash", pa.uint64()),
        ("colours", pa.binary(ROW["colours"].itemsize)),
        ("caption", pa.uint64()),
    ]
)  # of a dropped pair: its row, and of the kept pair TAR/KEY and signature
EQUAL = 255  # as the distance of an edge: no other edge of this row is noted, as all are those of the better one
FARTHER = signatures.DISTANCE + 1  # as the distance of equal embeddings; others add the thousandths that they lack
Placed = tuple[dict[str, Any], int]  # the entry of a tar in the index, and the number of its first pair


@dataclass(frozen=True)
class Similar:
    """How embeddings are compared.

    Attributes:
      threshold: the least cosine of those of copies.
      width: of an embedding.
      rows: embeddings that are in memory at once.
      clusters: that are looked for.
      buckets: files of clusters that they are spread into.
      groups: of tars that are spread together.
    """

    threshold: float
    width: int
    rows: int
    clusters: int
    buckets: int
    groups: int

    @property
    def dtype(self) -> np.dtype:
        """Of an embedding in a file of clusters."""
        return np.dtype([("head", HEAD), ("vector", "<i2", (self.width,))])


@dataclass(frozen=True)
class Job:
    """What every step knows.

    Attributes:
      store: of the tars.
      by: one of `BY`.
      signatures, columns: what is written of each tar.
      scores: folder with the column `similarity`, and `image_embedding` for `similar`; None: pairs have none.
      work: folder of files between the passes.
      buckets: that each table is spread into.
      groups: of tars that are spread together.
      held_out: files of signatures of held-out images.
      similar: None: embeddings are not compared.
      caption_part: of a caption file, as of `tar_index.captions_of`; a pair's captions are compared together.
    """

    store: Store
    by: str
    signatures: ColumnFolder
    columns: ColumnFolder
    scores: ColumnFolder | None
    work: Path
    buckets: int
    groups: int
    held_out: tuple[Path, ...]
    similar: Similar | None = None
    caption_part: str = ""

    @property
    def tables(self) -> list[int]:
        """Numbers of the tables; the captions are counted whatever makes a duplicate."""
        return [CAPTION] if self.by == "caption" else [*range(len(BLOCKS)), CAPTION]


def find_duplicates(
    index: Index,
    store: Store,
    columns: ColumnFolder,
    by: str,
    scores: ColumnFolder | None,
    held_out: Sequence[Path],
    engine: Engine,
    threshold: float | None = None,
    caption_part: str = "",
) -> Iterator[dict[str, Any]]:
    """Write the columns of all tars; of each, in order, what `counted` counts.

    Args:
      index, store: of the tars.
      columns: folder to write to.
      by: one of `BY`.
      scores: folder with the column `similarity`; of copies, the best-scored is kept.
      held_out: files of signatures of held-out images.
      engine: that does the work.
      threshold: the least cosine of embeddings, `image_embedding` in `scores`, of copies; None: they are not compared.
      caption_part: of a caption file, as of `tar_index.captions_of`.

    Raises:
      UserError: one line: a tar or file of scores cannot be read, or the columns cannot be written.
    """
    out = columns.path
    groups, of_pictures = _grouped(index, ROWS), signatures_in(out)
    buckets = -(-len(index.records) // ROWS)
    compared = _similar(index, scores, threshold) if scores and threshold else None
    held, work = tuple(held_out), out / "work"
    job = Job(store, by, of_pictures, columns, scores, work, buckets, len(groups), held, compared, caption_part)
    with writing(f"--out: {printable(str(out))}"):
        of_pictures.path.mkdir(exist_ok=True)
    for _ in map_shards(functools.partial(sign, job), index.shards, engine, title="signatures", unit=" tars"):
        pass
    duplicates = _read_groups(out)
    if duplicates is None:
        duplicates = _find(job, index, groups, engine)
        finished = False
    else:
        finished = all(map_shards(columns.is_whole, index.tars, engine, title="looking for columns", unit=" tars"))
    if not finished:
        _tell_kept(job, groups, duplicates, engine)
    del duplicates
    parts = [Part(tar, first, g, i) for g, group in enumerate(groups) for i, (tar, first) in enumerate(group)]
    yield from map_shards(functools.partial(write, job), parts, engine, title="writing", unit=" tars")
    shutil.rmtree(job.work, ignore_errors=True)


def _find(job: Job, index: Index, groups: list[list[Placed]], engine: Engine) -> np.ndarray:
    """The duplicates, from signatures and embeddings, which are written, too."""
    _begin(job)
    for _ in map_shards(functools.partial(spread, job), list(enumerate(groups)), engine, title="spreading"):
        pass
    pieces = [(table, bucket) for table in job.tables for bucket in range(job.buckets)]
    for _ in map_shards(functools.partial(find, job), pieces, engine, title="finding copies"):
        pass
    if job.similar:
        _find_clusters(job, job.similar, index, engine)
        smaller, spread_them = _grouped(index, job.similar.rows), functools.partial(spread_embeddings, job)
        for _ in map_shards(spread_them, list(enumerate(smaller)), engine, title="spreading embeddings"):
            pass
        files = [(SIMILAR, bucket) for bucket in range(job.similar.buckets)]
        for _ in map_shards(functools.partial(find_similar, job), files, engine, title="finding near embeddings"):
            pass
        pieces += files
    found, captions = _collect(job, pieces)
    duplicates = choose(found)
    _write_table(job.columns.path / GROUPS, [duplicates], captions)
    shutil.rmtree(job.work, ignore_errors=True)  # the largest files, before others are written
    return duplicates


def _tell_kept(job: Job, groups: list[list[Placed]], duplicates: np.ndarray, engine: Engine) -> None:
    """Bring what is written of each kept pair to the pairs that are dropped for it."""
    _begin(job)
    _sort_by_kept(job, groups, duplicates)
    for _ in map_shards(functools.partial(look_up, job), list(enumerate(groups)), engine, title="looking up copies"):
        pass
    for _ in map_shards(functools.partial(gather, job), list(enumerate(groups)), engine, title="gathering copies"):
        pass


def _begin(job: Job) -> None:
    """An empty `work`, or the one that this version has begun with the same settings."""
    compared = dataclasses.asdict(job.similar) if job.similar else None
    about = json.dumps({"version": VERSION, "rows": ROWS, "similar": compared})
    if read_bytes(job.work / ABOUT) == about.encode():
        return
    with writing(f"--out: {printable(str(job.work))}"):
        if job.work.exists():
            shutil.rmtree(job.work)
        job.work.mkdir()
        write_text(job.work / ABOUT, about)


def signatures_in(out: Path) -> ColumnFolder:
    """Where `sign` writes."""
    return ColumnFolder(out / "signatures", {"command": "data dedup", "signatures": 1})


def read_groups(out: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The duplicates, DUPLICATE (D,) in order of row, and what is known of captions: how many pairs "repeated" the
    caption of another, and the "top" ones, [number of pairs, row of one].
    """
    return read_table(out / GROUPS, DUPLICATE, verify=True)


def _read_groups(out: Path) -> np.ndarray | None:
    try:
        return read_groups(out)[0]
    except (OSError, ValueError):  # not yet, or damaged: it is made again
        return None


def _grouped(index: Index, most: int) -> list[list[Placed]]:
    """Tars that are spread together, of at most `most` pairs, or one."""
    groups: list[list[Placed]] = [[]]
    rows = 0
    for tar, first in zip(index.tars, index.starts.tolist(), strict=False):
        if groups[-1] and rows + tar["pairs"] > most:
            groups.append([])
            rows = 0
        groups[-1].append((tar, first))
        rows += tar["pairs"]
    return groups


def sign(job: Job, shard: Shard) -> None:
    """Write the signatures of a tar's pairs."""
    tar, records = shard
    if job.signatures.is_whole(tar):
        return
    name, part = str(shard), job.caption_part
    keys, columns = read(lambda: _signed(job.store, name, records, part), lambda: job.store.path(name))
    job.signatures.write(tar, keys, columns)


def _signed(store: Store, name: str, records: np.ndarray, part: str) -> tuple[list[str], dict[str, Any]]:
    rows = np.zeros(len(records), ROW)
    damage: list[str | None] = [None] * len(records)
    with store.open(name) as file:
        for i, record in enumerate(records.tolist()):
            try:
                picture, text = pair_in(file, record)
                rows[i]["caption"] = signatures.of_caption("\n".join(tar_index.captions_of(text, part)))
                small, rows[i]["pixels"] = signatures.shrunk(picture)
                rows[i]["hash"], rows[i]["colours"] = signatures.of_pixels(small).item()
            except (DamagedRecord, DamagedImage) as error:
                damage[i] = printable(str(error))
    columns = {name: pa.array(rows[name]) for name in ("hash", "caption", "pixels")}
    columns["colours"] = pa.array([row.tobytes() for row in rows["colours"]], pa.binary(ROW["colours"].itemsize))
    return tar_index.keys(store, name, records), columns | {"damage": pa.array(damage, pa.string())}


def rows_of(table: pa.Table) -> np.ndarray:
    """Of a table with columns that `sign` writes, or `KEPT`: ROW (N,), without what the table does not have."""
    rows = np.zeros(len(table), ROW)
    for name in {"hash", "caption", "pixels", "row"}.intersection(table.column_names):
        rows[name] = table[name].to_numpy()
    colours = table["colours"].combine_chunks().buffers()[1] or b""
    rows["colours"] = np.frombuffer(colours, np.uint8, rows["colours"].size).reshape(rows["colours"].shape)
    return rows


def _readable(table: pa.Table) -> np.ndarray:
    """Which pairs could be read, bool (N,), of what `sign` has written of a tar."""
    return table["damage"].is_null().to_numpy()


def spread(job: Job, group: tuple[int, list[Placed]]) -> None:
    """Write the rows of some tars: table by table, sorted by bucket."""
    number, shards = group
    path = job.work / f"rows-{number:06d}"
    if path.exists():
        return
    rows, starts = np.concatenate([_rows(job, tar, first)[0] for tar, first in shards]), [0]

    def tables() -> Iterator[np.ndarray]:
        for table in job.tables:
            # The value of the block, from its lowest bit on; buckets take turns at the values.
            low = BLOCKS[table] & -BLOCKS[table] if table != CAPTION else 1
            value = rows["caption"] if table == CAPTION else (rows["hash"] & np.uint64(BLOCKS[table])) // np.uint64(low)
            bucket = (value % np.uint64(job.buckets)).astype(np.int64)
            for count in np.bincount(bucket, minlength=job.buckets).tolist():
                starts.append(starts[-1] + count)
            yield rows[np.argsort(bucket, kind="stable")]

    _write_table(path, tables(), {"starts": starts})


def _rows(job: Job, tar: dict[str, Any], first: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of a tar's pairs that can be read: ROW (N,), which of them have an embedding, bool (N,), and these embeddings,
    int16 (K, E), where embeddings are compared.
    """
    signs = job.signatures.read(tar)
    rows, readable = rows_of(signs), _readable(signs)
    rows["row"] = first + np.arange(len(rows))
    if job.scores:
        scores = job.scores.read(tar, ["similarity"])["similarity"].to_numpy().astype(np.float32)
        rows["score"] = np.where(np.isnan(scores), -np.inf, scores)
    known, vectors = np.zeros(len(rows), bool), np.zeros((0, 0), np.int16)
    if job.scores and job.similar:
        vectors, known = similar.read_embeddings(job.scores, tar)
        vectors, known = vectors[readable[known]], known & readable
        rows["embedding"][known] = similar.digests(vectors)
    return rows[readable], known[readable], vectors


def find(job: Job, piece: tuple[int, int]) -> None:
    """Write the edges, from worse to better copies, of a bucket of a table."""
    table, bucket = piece
    path = _edges(job, piece)
    if path.exists():
        return
    rows = np.concatenate([_bucket(job, group, table, bucket) for group in range(job.groups)])
    rows = rows[np.lexsort(_best_first(rows))]
    meta: dict[str, Any] = {}
    if table == CAPTION:
        _, first, same, counts = np.unique(rows["caption"], return_index=True, return_inverse=True, return_counts=True)
        top = sorted(zip((-counts).tolist(), rows["row"][first].tolist(), strict=True))[:TOP]
        meta = {"repeated": int(counts[counts > 1].sum()), "top": [[-count, row] for count, row in top if count < -1]}
        found = [_equal(rows, first[same])] if job.by == "caption" else []
    else:
        first, same = _equals(rows, _told(job))
        found = [_equal(rows, first[same])] if table == 0 else []
        first = np.sort(first)
        unique = rows[first][rows["hash"][first] != signatures.FLAT]

        def accept(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            return a["caption"] == b["caption"] if job.by == "pair" else np.ones(len(a), bool)

        worse, better = (unique[i] for i in edges(unique, table, accept).T)
        found.append(_as_edges(worse, better, signatures.distances(worse["hash"], better["hash"])))
    _write_table(path, found, meta)


def _best_first(rows: np.ndarray) -> tuple[np.ndarray, ...]:
    """The keys, of which the last counts most, that sort rows from the best to the worst."""
    return rows["row"], -rows["pixels"].astype(np.int64), -rows["score"]


def _told(job: Job) -> int:
    """By how many of the first bytes of ROW pairs are told apart: with the caption or without."""
    return 72 if job.by == "pair" else 64


def _equals(rows: np.ndarray, told: int) -> tuple[np.ndarray, np.ndarray]:
    """The first of each of the different rows, told apart by so many bytes, int64 (D,), and which of these each row
    equals, int64 (N,).
    """
    whole = np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), rows.dtype.itemsize)
    values = np.ascontiguousarray(whole[:, :told]).view(f"V{told}")[:, 0]
    _, first, same = np.unique(values, return_index=True, return_inverse=True)
    return first, same


def _edges(job: Job, piece: tuple[int, int]) -> Path:
    return job.work / f"edges-{piece[0]}-{piece[1]:06d}"


def _bucket(job: Job, group: int, table: int, bucket: int) -> np.ndarray:
    rows, meta = read_table(job.work / f"rows-{group:06d}", ROW, verify=False)
    place = job.tables.index(table) * job.buckets + bucket
    return np.array(rows[meta["starts"][place] : meta["starts"][place + 1]])


def _equal(rows: np.ndarray, best: np.ndarray) -> np.ndarray:
    """The edges from each row to the best of those that equal it, if that is another."""
    others = best != np.arange(len(rows))
    return _as_edges(rows[others], rows[best[others]], EQUAL)


def _as_edges(worse: np.ndarray, better: np.ndarray, distance: np.ndarray | int) -> np.ndarray:
    found = np.zeros(len(worse), EDGE)
    found["worse"], found["better"], found["distance"] = worse["row"], better["row"], distance
    return found


def _similar(index: Index, scores: ColumnFolder, threshold: float) -> Similar:
    pairs, rows = len(index.records), max(1, ROWS // EMBEDDED)
    width = scores.read(index.tars[0], [similar.COLUMN]).schema.field(similar.COLUMN).type.list_size
    clusters = min(-(-pairs // CLUSTER), CLUSTERS)
    buckets, groups = min(-(-pairs * similar.NEAREST // rows), clusters), len(_grouped(index, rows))
    return Similar(threshold, width, rows, clusters, buckets, groups)


def _find_clusters(job: Job, compared: Similar, index: Index, engine: Engine) -> None:
    """Write the centres of the clusters."""
    path = job.work / "centres"
    if path.exists():
        return
    rng = np.random.default_rng(0)
    some = np.sort(rng.permutation(np.flatnonzero([tar["pairs"] for tar in index.tars]))[:TARS]).tolist()
    wanted = -(-compared.clusters * SAMPLE // len(some))
    pieces = [
        (index.tars[t], rng.choice(pairs := index.tars[t]["pairs"], min(wanted, pairs), replace=False)) for t in some
    ]
    found = list(map_shards(functools.partial(sample, job), pieces, engine, title="sampling embeddings", unit=" tars"))
    _write_table(path, [similar.centres_of(np.concatenate(found), compared.clusters, rng)], {})


def sample(job: Job, piece: tuple[dict[str, Any], np.ndarray]) -> np.ndarray:
    """The embeddings, int16 (K, E), of some of a tar's pairs, by their numbers."""
    assert job.scores
    tar, chosen = piece
    vectors, known = similar.read_embeddings(job.scores, tar)
    return vectors[np.isin(np.flatnonzero(known), chosen)]


def spread_embeddings(job: Job, group: tuple[int, list[Placed]]) -> None:
    """Write the rows and embeddings of some tars, each in the clusters that it is near to, sorted by these."""
    assert job.similar
    number, shards = group
    path = job.work / f"embeddings-{number:06d}"
    if path.exists():
        return
    centres = read_table(job.work / "centres", np.dtype([("vector", "<i2", (job.similar.width,))]), verify=True)[0]
    pieces, near = [], []
    for tar, first in shards:
        rows, known, vectors = _rows(job, tar, first)
        piece = np.zeros(len(vectors), job.similar.dtype)
        piece["head"]["row"], piece["vector"] = rows[known], vectors
        pieces.append(piece)
        near.append(similar.nearest(vectors, centres["vector"], similar.NEAREST))
    embedded, clusters = np.concatenate(pieces), np.concatenate(near)
    of, order = clusters.ravel(), np.argsort(clusters.ravel(), kind="stable")
    counts = np.bincount(of * job.similar.buckets // len(centres), minlength=job.similar.buckets)
    starts = [0, *np.cumsum(counts).tolist()]

    def buckets() -> Iterator[np.ndarray]:
        for places in np.split(order, starts[1:-1]):
            part = embedded[places // clusters.shape[1]]
            part["head"]["cluster"] = of[places]
            yield part

    _write_table(path, buckets(), {"starts": starts})


def _embedded(job: Job, group: int, bucket: int) -> np.ndarray:
    """A bucket of clusters of a group of tars, in a mapped file."""
    assert job.similar
    rows, meta = read_table(job.work / f"embeddings-{group:06d}", job.similar.dtype, verify=False)
    return rows[meta["starts"][bucket] : meta["starts"][bucket + 1]]


def find_similar(job: Job, piece: tuple[int, int]) -> None:
    """Write the edges, from worse to better copies, of near embeddings of a bucket of clusters."""
    assert job.similar
    path = _edges(job, piece)
    if path.exists():
        return
    groups = range(job.similar.groups)
    heads = np.concatenate([np.array(_embedded(job, group, piece[1])["head"]) for group in groups])
    order = np.lexsort((*_best_first(heads["row"]), heads["cluster"]))
    order = order[np.sort(_equals(heads[order], HEAD["cluster"].itemsize + _told(job))[0])]
    place = np.full(len(heads), -1)
    place[order] = np.arange(len(order))
    heads = heads[order]
    found = [np.zeros(0, EDGE)]
    with tempfile.TemporaryFile(dir=job.work) as file:
        shape = len(order), job.similar.width
        large = len(order) > 2 * job.similar.rows
        vectors = np.memmap(file, np.int16, "w+", shape=shape) if large else np.empty(shape, np.int16)
        for group in groups:
            part = _embedded(job, group, piece[1])
            here, place = place[: len(part)], place[len(part) :]
            vectors[here[here >= 0]] = part["vector"][here >= 0]
        bounds = np.flatnonzero(np.diff(heads["cluster"], prepend=-1, append=-1))
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            rows = heads["row"][start:stop]

            def accept(a: np.ndarray, b: np.ndarray, rows: np.ndarray = rows) -> np.ndarray:
                return rows["caption"][a] == rows["caption"][b] if job.by == "pair" else np.ones(len(a), bool)

            pairs, cosines = similar.edges(vectors[start:stop], job.similar.threshold, accept)
            lacks = np.clip((1000 * (1 - cosines)).astype(np.int64), 0, EQUAL - 1 - FARTHER)
            found.append(_as_edges(rows[pairs[:, 0]], rows[pairs[:, 1]], FARTHER + lacks))
    _write_table(path, found, {})


def _collect(job: Job, pieces: Sequence[tuple[int, int]]) -> tuple[np.ndarray, dict[str, Any]]:
    """All edges, and what is known of the captions."""
    found, repeated, top = [], 0, []
    for piece in pieces:
        edges_there, meta = read_table(_edges(job, piece), EDGE, verify=True, mapped=False)
        found.append(edges_there)
        repeated += meta.get("repeated", 0)
        top = sorted([*top, *meta.get("top", [])], key=lambda one: (-one[0], one[1]))[:TOP]
    return np.concatenate(found), {"repeated": repeated, "top": top}


def choose(found: np.ndarray) -> np.ndarray:
    """The pairs that are dropped, each with the nearest kept one that it is a copy of.

    Of two pairs with an edge one is dropped. Copies without one may both be kept: of a pair with more than `near.MOST`
    better copies in a table only the best are noted, and where all of these are dropped, it is kept, even beside a
    further copy that is kept.

    Args:
      found: EDGE (E,), from each worse pair to better ones.

    Returns:
      DUPLICATE (D,), in order of row.
    """
    equal, found = found[found["distance"] == EQUAL], found[found["distance"] != EQUAL]
    nodes, ends = np.unique(np.stack([found["worse"], found["better"]]), return_inverse=True)
    worse, better = ends.reshape(2, -1)
    kept, dropped = np.zeros(len(nodes), bool), np.zeros(len(nodes), bool)
    left = np.arange(len(found))
    while len(left):
        w, b = worse[left], better[left]
        waits = np.zeros(len(nodes), bool)
        waits[w] = True
        kept[b[~waits[b]]] = True  # no better copy of it is kept
        dropped[w[kept[b]]] = True
        left = left[~dropped[w] & ~dropped[b]]
    told = found[dropped[worse] & kept[better]]
    told = told[np.lexsort((told["better"], told["distance"], told["worse"]))]
    _, first = np.unique(told["worse"], return_index=True)
    near = np.zeros(len(first), DUPLICATE)
    near["row"], near["kept"] = told["worse"][first], told["better"][first]
    same = np.zeros(len(equal), DUPLICATE)
    same["row"], same["kept"] = equal["worse"], equal["better"]
    if len(near):
        place = np.minimum(np.searchsorted(near["row"], same["kept"]), len(near) - 1)
        same["kept"] = np.where(near["row"][place] == same["kept"], near["kept"][place], same["kept"])
    out = np.concatenate([near, same])
    return out[np.argsort(out["row"])]


def _sort_by_kept(job: Job, groups: list[list[Placed]], duplicates: np.ndarray) -> None:
    """Write the duplicates in order of the group of the kept pair, then of their row."""
    path = job.work / "by-kept"
    if path.exists():
        return
    firsts = [group[0][1] for group in groups]
    of = np.searchsorted(np.array(firsts, np.uint64), duplicates["kept"], side="right") - 1
    order = np.argsort(of, kind="stable")
    starts = [0, *np.cumsum(np.bincount(of, minlength=len(groups))).tolist()]
    pieces = (duplicates[order[start:stop]] for start, stop in itertools.pairwise(starts))
    _write_table(path, pieces, {"firsts": firsts, "starts": starts})


def look_up(job: Job, group: tuple[int, list[Placed]]) -> None:
    """Write `KEPT` of the duplicates whose kept pair is of some tars: a batch for each group of the dropped pairs."""
    number, shards = group
    path = job.work / f"kept-{number:06d}"
    if path.exists():
        return
    duplicates, meta = read_table(job.work / "by-kept", DUPLICATE, verify=False)
    wanted = duplicates[meta["starts"][number] : meta["starts"][number + 1]]
    tables = []
    for tar, _ in shards:
        table = job.signatures.read(tar, [KEY, "hash", "colours", "caption"])
        folder = tar["name"].removesuffix(".tar")
        tables.append(table.append_column("name", pc.binary_join_element_wise(folder, table[KEY], "/")))
    there = _batch_of(pa.concat_tables([table.replace_schema_metadata() for table in tables]))
    bounds = [*(bisect_left(wanted["row"], first) for first in meta["firsts"]), len(wanted)]

    def batches() -> Iterator[pa.RecordBatch]:
        for start, stop in itertools.pairwise(bounds):
            mine = wanted[start:stop]
            kept = there.take(pa.array(mine["kept"] - np.uint64(shards[0][1])))
            columns = [pa.array(mine["row"]), *(kept[name] for name in KEPT.names[1:])]
            yield pa.RecordBatch.from_arrays(columns, schema=KEPT)

    _write_batches(path, batches())


def gather(job: Job, group: tuple[int, list[Placed]]) -> None:
    """Write `KEPT` of the pairs that are dropped of some tars: a batch for each tar, in order of row."""
    number, shards = group
    path = job.work / f"dropped-{number:06d}"
    if path.exists():
        return
    told = pa.Table.from_batches(_read_batch(job.work / f"kept-{kept:06d}", number) for kept in range(job.groups))
    told = _batch_of(told.sort_by("row"))
    bounds = np.searchsorted(told["row"].to_numpy(), np.array([first for _, first in shards], np.uint64)).tolist()
    _write_batches(path, (told[start:stop] for start, stop in itertools.pairwise([*bounds, len(told)])))


def _batch_of(table: pa.Table) -> pa.RecordBatch:
    """A table in one piece, whatever its number of rows."""
    return pa.RecordBatch.from_arrays([column.combine_chunks() for column in table.columns], schema=table.schema)


def _write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with writing(f"--out: {printable(str(path))}"):
        remove_unfinished(path)
        with replacing(path) as part, pa.ipc.new_file(str(part), KEPT) as file:
            for batch in batches:
                file.write_batch(batch)


def _read_batch(path: Path, number: int) -> pa.RecordBatch:
    with pa.OSFile(str(path)) as file:  # not mapped: many of them are held at once
        return pa.ipc.open_file(file).get_batch(number)


class Part(NamedTuple):
    """A tar whose columns are written: its entry, its first row, the number of its group, and its place in that."""

    tar: dict[str, Any]
    first: int
    group: int
    place: int


def write(job: Job, part: Part) -> dict[str, Any]:
    """Write the columns of a tar's pairs; what `counted` counts."""
    tar = part.tar
    signs = job.signatures.read(tar)
    if not job.columns.is_whole(tar):
        rows, readable = rows_of(signs), _readable(signs)
        told = pa.Table.from_batches([_read_batch(job.work / f"dropped-{part.group:06d}", part.place)])
        kept = rows_of(told)
        dropped = kept["row"].astype(np.int64) - part.first
        duplicate = np.zeros(len(rows), bool)
        duplicate[dropped] = True
        kept_as: list[str | None] = [None] * len(rows)
        why: list[str | None] = [None] * len(rows)
        other = "caption" if job.by == "caption" else "similar"
        near = signatures.near(rows[dropped], kept).tolist()
        same = (rows["caption"][dropped] == kept["caption"]).tolist()
        for i, name, n, s in zip(dropped.tolist(), told["name"].to_pylist(), near, same, strict=True):
            kept_as[i], why[i] = name, "pair" if n and s else "image" if n else other
        columns = {
            "duplicate": pa.array(duplicate, pa.bool_(), mask=~readable),
            "duplicate_of": pa.array(kept_as, pa.string()),
            "why": pa.array(why, pa.string()),
        }
        if job.held_out:
            found = _held_out(job.held_out).matches(rows)
            names = [match.name if match and there else None for match, there in zip(found, readable, strict=True)]
            told = np.array([name is not None for name in names], bool)
            columns["contaminated"] = pa.array(told, pa.bool_(), mask=~readable)
            columns["contaminated_by"] = pa.array(names, pa.string())
        job.columns.write(tar, signs[KEY].to_pylist(), columns)
    return counted(signs, job.columns.read(tar))


_held_out = functools.lru_cache(maxsize=1)(HeldOut)


def counted(signs: pa.Table, columns: pa.Table) -> dict[str, Any]:
    """Of a tar: the numbers of `pairs`, of duplicates by `why`, and of those `contaminated`; `damage`, position and
    reason of those that cannot be read; `shown`, positions of the first contaminated ones.
    """
    reasons = signs["damage"].to_pylist()
    contaminated = columns["contaminated"].to_numpy() if "contaminated" in columns.column_names else np.zeros(0)
    why = columns["why"].to_pylist()
    positions = np.flatnonzero(contaminated == True)  # noqa: E712 -- None, of what cannot be read, is neither
    return {
        "pairs": len(columns),
        **{reason: why.count(reason) for reason in WHY},
        "contaminated": len(positions),
        "damage": [[i, reason] for i, reason in enumerate(reasons) if reason is not None],
        "shown": positions[:TOP].tolist(),
    }


def _write_table(path: Path, pieces: Iterator[np.ndarray] | Sequence[np.ndarray], meta: dict[str, Any]) -> None:
    with writing(f"--out: {printable(str(path))}"):
        remove_unfinished(path)
        write_table(path, pieces, lambda: meta)
