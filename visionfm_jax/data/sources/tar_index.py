"""The index of a folder of tars: where every picture and caption lies, found once and kept in a file beside them.

Every tar is read once, from end to end, for the checksums of its pictures and captions, by one process of those that
share the file's folder (`claim`); an interruption costs what was read in the last minute. A pair takes 20 bytes, which
are mapped into memory, so that all processes of a host share them: 1.2 billion pairs are a file of 24 GB and hardly
any memory of a process.
"""

from __future__ import annotations

import functools
import glob
import json
import re
import secrets
import tarfile
import time
import urllib.parse
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from absl import logging

from visionfm_jax import storage
from visionfm_jax.data.shards import Engine, Here, Local, Threads, map_shards
from visionfm_jax.data.sources.claim import claimed
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES
from visionfm_jax.data.sources.record import has_text
from visionfm_jax.data.sources.store import REQUESTS, Store, read_table, write_table
from visionfm_jax.errors import DataError, printable

LINES = "lines"  # in place of a field: each line is a caption
BLOCK = 512  # bytes; every header and every content of a tar begins at a multiple
_HEADERS = 3  # blocks: the header of a member, and a member before that has nothing but its name
RECORD = np.dtype([(field, "<u4") for field in ("image", "image_size", "caption", "caption_size", "crc")])
"""Of a pair: where its contents begin, in blocks, how many bytes they have, and `checksum` of both; no caption is
0 and 0."""

NO_CAPTION = "images without a caption"
EMPTY = "images with an empty caption"
NOT_UTF8 = "images with a caption that is not UTF-8"
NOT_JSON = "images whose JSON has no such text"
NO_PICTURE = "captions without an image"
SEVERAL = "keys with several images or captions"
NO_KEY = "files whose name begins with a dot or has no extension"
NO_FILE = "members that are links, or larger than 2 GiB"
OTHER = "files of other kinds, without an image of the same key"
_KINDS = 8  # extensions that are counted by name, per tar; the others are counted together
_NAMED = 3  # keys of what is left out that are kept, per tar and reason
_VERSION = 2
_PIECE = 2**20  # bytes that are read at once
_PROCESSES_FROM = 16  # tars; for fewer, other processes take longer to start than to read
_KEPT = 60.0  # seconds after which what was read is kept


class Shard(NamedTuple):
    """A tar: its entry in `Index.tars`, and the records of its pairs, RECORD (n,)."""

    tar: dict[str, Any]
    records: np.ndarray

    def __str__(self) -> str:
        return str(self.tar["name"])


@dataclass(frozen=True)
class Index:
    """The places of all pairs of a folder, tar by tar in order of name.

    Attributes:
      records: RECORD (N,).
      starts: int64 (T+1,); the pairs of tar t are records[starts[t] : starts[t + 1]].
      tars: of each tar `name`, `size`, `stamp`, `pairs`, `crc` (of its keys and records), and where they apply `cut`
        (the key at which it ends too early) and `skipped` (what is left out -> their number and the first keys).
    """

    records: np.ndarray
    starts: np.ndarray
    tars: list[dict[str, Any]]
    path: Path

    @property
    def shards(self) -> list[Shard]:
        """The tars, each with its pairs."""
        spans = zip(self.tars, self.starts, self.starts[1:], strict=False)
        return [Shard(tar, self.records[a:b]) for tar, a, b in spans]

    @property
    def crc(self) -> int:
        """Of what the tars hold; equal on every host, and after a copy."""
        return zlib.crc32(repr([(tar["name"], tar["crc"]) for tar in self.tars]).encode())


def key_of(member: str) -> tuple[str, str]:
    """Key and extension of a member by WebDataset's rule, whose `base_plus_ext` this is but for a leading "./".

    The key is the path up to the first dot of the file's name, its folder included; the extension, in lower case, is
    all behind that dot: "a/photo.v2.JPG" is ("a/photo", "v2.jpg"). ("", "") if the name begins with a dot or has none.
    """
    folder, slash, name = member.removeprefix("./").rpartition("/")
    base, dot, extension = name.partition(".")
    return (folder + slash + base, extension.lower()) if base and dot else ("", "")


def checksum(image: bytes, caption: bytes) -> int:
    """What the index keeps of the contents of a pair."""
    return zlib.crc32(image) ^ zlib.crc32(caption)


def captions_of(content: bytes, part: str) -> tuple[str, ...]:
    """The captions in a member, those that say something.

    Args:
      content: of the member.
      part: "": all of it is one; "lines": each line is one; else the field of a JSON object that has one, or a list.

    Raises:
      ValueError: it is not UTF-8, or no such JSON.
    """
    text = content.decode()
    if part and part != LINES:
        try:
            found = json.loads(text)[part]
        except (KeyError, TypeError, IndexError, RecursionError) as error:
            raise ValueError(f"no field {part!r}") from error
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"field {part!r} is no text")
    else:
        texts = text.split("\n") if part else [text]
    kept = [text for text in texts if has_text(text)]
    return tuple(" ".join(text.split()) for text in kept) if part == LINES else tuple(text.strip() for text in kept)


def open_index(store: Store, suffix: str, engine: Engine | None = None, image: str = "") -> Index:
    """The index of a folder's tars; those that are new or changed since the last time are read first.

    Args:
      store: the folder.
      suffix: of the members with captions, such as "txt"; "txt:lines" and "json:FIELD" as `captions_of`; empty: all
        pictures, without captions.
      engine: that reads the tars; None: as `engine_for` says.
      image: suffix of the pictures; empty: any of `IMAGE_SUFFIXES`.

    Raises:
      DataError: no tar, a folder or tar that cannot be read, or no place for the index.
    """
    files = storage.read(store.files, lambda: store.url)
    tars = {name: stat for name, stat in files.items() if name.endswith(".tar") and not name.startswith(".")}
    if not tars:
        raise DataError(f"{store.url}: holds no .tar file; set the folder that img2dataset wrote its shards into")
    if odd := [name for name in tars if re.search("[\ud800-\udfff]", name)]:
        raise DataError(f"{store.url}: the name of {printable(odd[0])!r} is not UTF-8; rename the file")
    parts = [urllib.parse.quote(part, safe="") for part in (suffix, image)]
    name = "_".join(["visionfm", "pairs" if suffix else "pictures", *filter(None, parts)]) + ".index"
    whole = not store.pattern  # else these are some of the folder's tars, and it has no place for their index
    beside, shared = whole and store.local, whole and not store.local
    places = [*([Path(store.path(name))] if beside else []), store.cache(name)]

    def known(log: Callable[..., None]) -> Index | None:
        found = _best(places, tars, log)
        if shared and not _fresh(found, tars) and store.fetch(name, places[0]):
            found = _best(places, tars, log)
        return found

    while not _fresh(index := known(logging.info), tars):
        with claimed(places, f"the index of the tars of {store.url}") as place:
            if place is None or _fresh(index := known(logging.warning), tars):  # another process has made it
                continue
            _write(store, functools.partial(scan, store, suffix, image=image), tars, index, place, engine)
            if shared and not store.put(place, name):
                logging.info("%s: cannot be written, so the index is kept in %s only", store.url, place)
    assert index is not None
    return index


def read_index(path: Path, *, verify: bool = False) -> Index:
    """An index as it was written.

    Args:
      path: the file.
      verify: compare the checksum of all records, which takes too long at every start where there are billions; each
        is compared when it is read, see `checksum`.

    Raises:
      OSError: there is none, or it cannot be read.
      ValueError: it is damaged, of another version, or no index.
    """
    records, meta = read_table(path, RECORD, verify=verify)
    tars = meta.get("tars")
    if meta.get("version") != _VERSION or not isinstance(tars, list) or not all(map(_is_entry, tars)):
        raise ValueError("the file is of another kind or version")
    names, pairs = [tar["name"] for tar in tars], [tar["pairs"] for tar in tars]
    if names != sorted(set(names)) or sum(pairs) != len(records):
        raise ValueError("the file contradicts itself")
    return Index(records, np.cumsum([0, *pairs], dtype=np.int64), tars, path)


def _is_entry(tar: Any) -> bool:
    """Whether it is what `scan` gives of a tar."""
    if not isinstance(tar, dict) or not all(isinstance(tar.get(key), str) for key in ("name", "stamp")):
        return False
    numbers = [tar.get(key) for key in ("size", "pairs", "crc")]
    skipped = tar.get("skipped", {})
    return (
        all(type(number) is int and 0 <= number < 2**63 for number in numbers)
        and isinstance(tar.get("cut", ""), str)
        and isinstance(skipped, dict)
        and all(isinstance(s, list) and len(s) == 2 and type(s[0]) is int for s in skipped.values())
        and all(isinstance(keys, list) and all(isinstance(key, str) for key in keys) for _, keys in skipped.values())
    )


def scan(
    store: Store, suffix: str, tar: tuple[str, tuple[int, str]], image: str = ""
) -> tuple[np.ndarray, dict[str, Any]]:
    """The pairs of one tar, RECORD (n,), and its entry for `Index.tars`.

    Raises:
      DataError: it cannot be read.
      StorageError: it cannot be read for the moment.
    """
    name, (size, stamp) = tar

    def read() -> tuple[dict[str, tuple[int, ...]], str | None, dict[str, list[str]], int]:
        try:
            with store.open(name, size) as file:
                return _scan(file, size, suffix, image)
        except OSError:
            raise
        except Exception as error:  # every store has its own
            if store.local:
                what = printable(str(error) or type(error).__name__)
                raise DataError(f"{store.path(name)}: is not a readable tar ({what}); write it again") from error
            raise OSError(str(error) or type(error).__name__) from error

    pairs, cut, skipped, most = storage.read(read, lambda: store.path(name))
    records = np.array(list(pairs.values()), RECORD)
    entry: dict[str, Any] = {"name": name, "size": size, "stamp": stamp, "pairs": len(records)}
    entry["crc"] = zlib.crc32("\n".join(pairs).encode(), zlib.crc32(records.tobytes()))
    if ":" in suffix:
        entry["captions"] = most
    if cut is not None:
        entry["cut"] = printable(cut)
    if skipped:
        entry["skipped"] = {
            reason: [len(names), list(map(printable, names[:_NAMED]))] for reason, names in skipped.items()
        }
    return records, entry


def keys(store: Store, name: str, records: np.ndarray) -> list[str]:
    """Keys of pairs of a tar, from the headers before their pictures.

    Raises:
      OSError: they cannot be read, or are no headers any more.
    """
    images = records["image"].tolist()
    found = store.read_many(name, [max(0, image - _HEADERS) * BLOCK for image in images], _HEADERS * BLOCK)
    try:
        names = [_name(blocks[: image * BLOCK]) for blocks, image in zip(found, images, strict=True)]
    except tarfile.HeaderError as error:
        raise OSError(f"{name}: {error}; the file has changed") from error
    return [key_of(member)[0] for member in names]


def member_in(file: BinaryIO, record: tuple[int, ...]) -> tuple[str, str]:
    """Key and extension of the picture of a pair, of the open tar and a record as a tuple.

    Raises:
      tarfile.HeaderError: there is no header.
    """
    first = max(0, record[0] - _HEADERS)
    file.seek(first * BLOCK)
    return key_of(_name(file.read((record[0] - first) * BLOCK)))


def _name(blocks: bytes) -> str:
    """The name of a member, whose header is the last of up to `_HEADERS` blocks.

    A name that does not fit in there, or has other letters than ASCII, is in a member of its own before: a header of
    PAX or GNU, and a block of content.
    """
    name = tarfile.TarInfo.frombuf(blocks[-BLOCK:], "utf-8", "replace").name
    if blocks[257:262] != b"ustar":
        return name
    kind, content = blocks[156:157], blocks[BLOCK:-BLOCK]
    if kind == tarfile.GNUTYPE_LONGNAME and (end := content.find(b"\0")) >= 0:
        return content[:end].decode("utf-8", "replace")
    if (
        kind == tarfile.XHDTYPE
        and b" path=" in content
        and (path := re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content))
    ):
        return path[1].decode("utf-8", "replace")
    return name


def engine_for(store: Store, count: int, engine: Engine | None) -> Engine:
    """Who reads `count` tars: `engine` if it is given, threads where the time goes into waiting for a store."""
    if not store.local and (engine is None or isinstance(engine, Local)):
        return Threads(REQUESTS)
    return engine or (Local() if count >= _PROCESSES_FROM else Here())


def _scan(
    file: BinaryIO, size: int, suffix: str, image: str
) -> tuple[dict[str, tuple[int, ...]], str | None, dict[str, list[str]], int]:
    """Pairs by key in order of their first member, the key where the tar is cut, what is left out, by reason, and the
    most captions that a pair has.
    """
    suffix, _, part = suffix.partition(":")
    most = 0
    images: dict[str, tuple[int, int, int]] = {}  # key -> block, size, CRC-32
    captions: dict[str, tuple[int, int, int]] = {}
    bad: dict[str, str] = {}  # key -> what is wrong with it
    others: dict[str, list[str]] = {}  # key -> extensions of its other members
    skipped: dict[str, list[str]] = {}
    cut, key, end = None, "", -1
    try:
        with tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="replace") as tar:
            while (member := tar.next()) is not None:
                key, kind = key_of(member.name)
                if member.offset_data + member.size > size or tar.offset <= end:  # the latter: a size below 0
                    cut = key
                    break
                end = tar.offset
                if member.isdir():
                    continue
                if not key:
                    skipped.setdefault(NO_KEY, []).append(member.name)
                    continue
                place, is_caption = member.offset_data // BLOCK, bool(suffix) and kind == suffix
                is_image = kind == image if image else f".{kind}" in IMAGE_SUFFIXES
                if not is_caption and not is_image:
                    others.setdefault(key, []).append(kind)
                elif not member.isreg() or member.issparse() or member.size >= 2**31 or place >= 2**32:
                    skipped.setdefault(NO_FILE, []).append(member.name)
                elif is_caption:
                    captions[key], reason, count = _read_caption(file, member, part)
                    most = max(most, count)
                    bad[key] = SEVERAL if key in bad else reason
                else:
                    bad |= {key: SEVERAL} if key in images else {}
                    images[key] = place, member.size, _crc(file, member)
            if cut is None:
                file.seek(tar.offset)
                if file.read(BLOCK) != bytes(BLOCK):  # no mark of the end: tarfile takes damage for it in silence
                    cut = key
    except tarfile.ReadError:
        cut = key
    pairs = {}
    none = (0, 0, zlib.crc32(b""))
    for key, (place, image_size, crc) in images.items():
        caption, caption_size, caption_crc = captions.get(key, none)
        reason = bad.get(key, NO_CAPTION if suffix else "")
        if not reason:
            pairs[key] = place, image_size, caption, caption_size, crc ^ caption_crc
        elif key != cut or key in captions:
            skipped.setdefault(reason, []).append(key)
    if orphans := [key for key in captions if key not in images]:
        skipped[NO_PICTURE] = orphans
    for key, kinds in others.items():
        for kind in kinds:
            if key not in images or f".{kind.rpartition('.')[2]}" in IMAGE_SUFFIXES:
                _count_other(skipped, kind, key)
    return pairs, cut, skipped, most


def _read(file: BinaryIO, member: tarfile.TarInfo) -> Iterator[bytes]:
    """The content of a member, piece by piece."""
    file.seek(member.offset_data)
    left = member.size
    while left:
        piece = file.read(min(left, _PIECE))
        if not piece:
            raise OSError(f"{member.name}: the file ended while it was read")
        left -= len(piece)
        yield piece


def _crc(file: BinaryIO, member: tarfile.TarInfo) -> int:
    return functools.reduce(lambda crc, piece: zlib.crc32(piece, crc), _read(file, member), 0)


def _read_caption(file: BinaryIO, member: tarfile.TarInfo, part: str) -> tuple[tuple[int, int, int], str, int]:
    """Block, size and CRC-32 of a member of captions, what is wrong with it, and how many it has."""
    content = b"".join(_read(file, member))
    place = member.offset_data // BLOCK, member.size, zlib.crc32(content)
    try:
        count = len(captions_of(content, part))
        return place, "" if count else EMPTY, count
    except UnicodeDecodeError:
        return place, NOT_UTF8, 0
    except ValueError:
        return place, NOT_JSON, 0


def _count_other(skipped: dict[str, list[str]], kind: str, key: str) -> None:
    """Note a file that is neither a caption nor a picture, by its extension while these are few."""
    reason = f".{printable(kind)} files, which are not read as images"
    known = sum(name.startswith(".") for name in skipped)
    if len(kind) > 16 or (reason not in skipped and known == _KINDS):
        reason = OTHER
    skipped.setdefault(reason, []).append(key)


def _best(places: Iterable[Path], tars: dict[str, tuple[int, str]], log: Callable[..., None]) -> Index | None:
    """The index that knows most of the tars as they are now; damaged ones are logged."""
    found = []
    for path in places:
        try:
            found.append(read_index(path))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            log("%s: cannot be used (%s); the tars are indexed again", path, error)
    return max(found, key=lambda index: len(_known(index, tars)), default=None)


def _known(index: Index, tars: dict[str, tuple[int, str]]) -> dict[str, int]:
    """Name -> number in the index, of tars that have not changed."""
    return {tar["name"]: t for t, tar in enumerate(index.tars) if tars.get(tar["name"]) == (tar["size"], tar["stamp"])}


def _fresh(index: Index | None, tars: dict[str, tuple[int, str]]) -> bool:
    return index is not None and len(_known(index, tars)) == len(tars) == len(index.tars)


def _write(
    store: Store,
    scanned: Callable[[tuple[str, tuple[int, str]]], tuple[np.ndarray, dict[str, Any]]],
    tars: dict[str, tuple[int, str]],
    known: Index | None,
    path: Path,
    engine: Engine | None,
) -> None:
    """Write the index of all tars to `path`; of those that are not known, after they were read.

    What was read is kept beside `path` every `_KEPT` seconds, for the next start if this one is interrupted.

    Raises:
      DataError: a tar cannot be read, or `path` cannot be written.
      StorageError: one of them cannot for the moment.
    """

    def write(place: Path, tars: Callable[[], Iterable[tuple[np.ndarray, dict[str, Any]]]]) -> None:
        storage.retry(lambda: _write_index(place, tars()), lambda: f"{place} cannot be written")

    parts = [p for p in path.parent.glob(f"{glob.escape(path.name)}.part-*") if not p.name.startswith(".")]
    where: dict[str, tuple[Index, int]] = {}  # tar -> an index that knows it, its number there
    for index in [known, *map(_part, parts)]:
        if index is not None:
            where |= {name: (index, t) for name, t in _known(index, tars).items()}
    todo = [tar for tar in tars.items() if tar[0] not in where]
    logging.info("%s: indexing %d of %d tars", store.url, len(todo), len(tars))
    read: list[tuple[np.ndarray, dict[str, Any]]] = []
    kept = time.monotonic()
    try:
        engine = engine_for(store, len(todo), engine)
        for found in map_shards(scanned, todo, engine, title="indexing", unit=" tars"):
            read.append(found)
            if time.monotonic() - kept >= _KEPT or len(where) + len(read) == len(tars):
                parts.append(path.with_name(f"{path.name}.part-{secrets.token_hex(4)}"))
                write(parts[-1], read.copy)
                index = read_index(parts[-1])
                where |= {tar["name"]: (index, t) for t, tar in enumerate(index.tars)}
                read, kept = [], time.monotonic()
        write(path, lambda: (_of_tar(*where[name]) for name in tars))
        for part in parts:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror or error}); free space there") from error


def _write_index(path: Path, tars: Iterable[tuple[np.ndarray, dict[str, Any]]]) -> None:
    """Write the index of tars of which the records and the entry are given."""
    entries: list[dict[str, Any]] = []

    def pieces() -> Iterator[np.ndarray]:
        for records, entry in tars:
            entries.append(entry)
            yield records

    write_table(path, pieces(), lambda: {"version": _VERSION, "tars": entries})


def _of_tar(index: Index, t: int) -> tuple[np.ndarray, dict[str, Any]]:
    return index.records[index.starts[t] : index.starts[t + 1]], index.tars[t]


def _part(path: Path) -> Index | None:
    """What an interrupted start has read; None: it is damaged."""
    try:
        return read_index(path, verify=True)
    except (OSError, ValueError) as error:
        logging.warning("%s: cannot be used (%s); its tars are read again", path, error)
        return None
