"""What records of a dataset are like: a row of numbers for each that is read, a few hundred bytes at most.

Shapes: N records that are read; H W image as it is stored; C classes.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import io
import logging as standard_logging
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from absl import logging
from PIL import Image

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data import signatures
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.fields import Fields, Texts
from visionfm_jax.data.images import FORMATS
from visionfm_jax.data.loader import DAMAGED
from visionfm_jax.data.near import Among
from visionfm_jax.data.shards import Engine, map_shards
from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.data.sources.record import ignored
from visionfm_jax.errors import DataError

CHUNK = 128  # records that are read at a time
SMALL = 4  # pixels of the model's image, side of an object that is hardly to be seen
COLOUR = 6  # of 255, by which the mean colours of copies may differ
SEED = 0  # of the choice of records
UNLABELLED = -(2**62)  # in the column of labels: the record has none


class Flag(enum.IntFlag):
    """What a record is."""

    DAMAGED = enum.auto()
    GREY = enum.auto()
    PALETTE = enum.auto()
    TRANSPARENT = enum.auto()
    CMYK = enum.auto()
    DEEP = enum.auto()  # more than 8 bits a channel
    ANIMATED = enum.auto()
    BLANK = enum.auto()  # one colour
    CUT = enum.auto()  # its caption has more tokens than the model reads
    WORDLESS = enum.auto()  # its caption has no letter
    FILE_NAME = enum.auto()  # its caption is the name of a file
    MARKUP = enum.auto()  # its caption has tags, entities or addresses of the web


ROW = np.dtype(
    [
        ("index", "<i8"), ("flags", "<u4"), ("height", "<i4"), ("width", "<i4"), ("label", "<i8"),
        ("digest", "<u8"),  # of the encoded image
        *signatures.SIGNATURE.descr,  # of the image at the model's size
        ("text", "<u8"), ("tokens", "<i4"),  # digest and length of the first caption
        ("objects", "<i4"), ("crowd", "<i4"), ("little", "<i4"),  # numbers: all, areas of many, those below SMALL
        ("outside", "<i4"), ("empty", "<i4"),  # boxes that lie outside, or have no area; masks without a pixel
        ("unclassed", "<f4"),  # share of the pixels of a map that are no class
    ]
)  # fmt: skip
FILE = re.compile(r"(img|image|dsc|dscn|screenshot|photo)?[\w\- ().]*\.(jpe?g|png|gif|webp|bmp|tiff?)", re.IGNORECASE)
CAMERA = re.compile(r"(img|dsc|dscn|dscf|pict|p)[_\- ]?\d{3,}", re.IGNORECASE)
WEB = re.compile(r"</?[a-z][^<>]*>|&(?:[a-z]{2,8}|#\d{1,6});|https?://|www\.", re.IGNORECASE)


@dataclass
class Survey:
    """What was found.

    Attributes:
      rows: ROW (N,), in the order of the dataset.
      classes: of each class that occurs, how many images (or objects, or maps) of those that were read have it.
      reasons: number of a damaged record -> why.
    """

    rows: np.ndarray = field(default_factory=lambda: np.zeros(0, ROW))
    classes: Counter[int] = field(default_factory=Counter)
    reasons: dict[int, str] = field(default_factory=dict)

    def having(self, flag: Flag) -> np.ndarray:
        """The rows with a flag."""
        return self.rows[self.rows["flags"] & flag > 0]

    @property
    def good(self) -> np.ndarray:
        """The rows of records that could be read and decoded."""
        return self.rows[self.rows["flags"] & Flag.DAMAGED == 0]


@dataclass(eq=False)
class Part:
    """A dataset that a configuration names, once or several times.

    Attributes:
      config: of the source.
      fields: of the configuration that name it, for people.
      trained, held_out: whether it is trained on; whether it is what an eval measures on.
      source: None: it cannot be opened, as `problem` says.
      said: the warnings that it wrote to the log as it was opened.
    """

    config: SourceConfig
    fields: list[str]
    trained: bool = False
    held_out: bool = False
    source: Source | None = None
    problem: str = ""
    said: list[str] = field(default_factory=list)
    survey: Survey = field(default_factory=Survey)

    @property
    def where(self) -> str:
        return ", ".join(self.fields)

    def keys(self, rows: np.ndarray, most: int = 5) -> tuple[str, ...]:
        """Names of the first records of `rows`."""
        return tuple(self.source.key(int(i)) for i in rows["index"][:most])


@dataclass(frozen=True)
class Reader:
    """Makes the survey of some records; travels to other processes.

    Args:
      source: the dataset.
      chain: to images of the model's size, nothing cut off.
      fields: what the task reads of a record; None: it is not trained on.
      texts: how captions become tokens; None: they are not read.
    """

    source: Source
    chain: Chain
    fields: Fields | None
    texts: Texts | None

    def __call__(self, indices: np.ndarray) -> Survey:
        """Of the records of these numbers."""
        out = Survey(np.zeros(len(indices), ROW))
        for row, index in zip(out.rows, indices.tolist(), strict=True):
            row["index"], row["label"] = index, UNLABELLED
            try:
                self._look(read_record(self.source, index), row, out.classes)
            except (*DAMAGED, DataError) as error:
                row["flags"] |= Flag.DAMAGED
                out.reasons[index] = str(error)
        return out

    def _look(self, record: Mapping[str, Any], row: np.void, classes: Counter[int]) -> None:
        image = record.get("image")
        encoded = image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes()
        row["digest"] = _digest(encoded)
        if "caption" in record:
            self._caption(record["caption"], row)
        if isinstance(label := record.get("label"), int | np.integer):
            row["label"] = label
        sample = self.chain(record, np.random.default_rng(0))
        _header(image, row)
        if self.fields is not None:
            self.fields(sample)
        elif self.texts is not None and "caption" in record:
            self.texts(record)
        _pixels(sample["image"], row)
        if "boxes" in record:
            _objects(record, sample, row)
        _count(record, classes, row)

    def _caption(self, caption: Any, row: np.void) -> None:
        """Of several captions, the first."""
        caption = (caption or ("",))[0] if isinstance(caption, tuple) else caption
        text = caption.decode(errors="replace") if isinstance(caption, bytes) else str(caption)
        text = " ".join(text.split())
        row["text"] = _digest(text.lower().encode(errors="replace"))
        row["flags"] |= Flag.WORDLESS * (not any(map(str.isalpha, text)))
        row["flags"] |= Flag.FILE_NAME * bool(FILE.fullmatch(text) or CAMERA.fullmatch(text))
        row["flags"] |= Flag.MARKUP * bool(WEB.search(text))
        if self.texts is not None:
            row["tokens"] = len(self.texts.tokenizer.encode(text)) + 2  # begin and end
            row["flags"] |= Flag.CUT * bool(row["tokens"] > self.texts.length)


def choose(length: int, count: int) -> np.ndarray:
    """Numbers of the records that are read, in order: one at random of each of `count` equal parts of the dataset.

    So a class, a tar or a folder that makes up a part of it is met, whatever the order of the records; and the same
    ones at every call. `count` = 0: all.
    """
    if not 0 < count < length:
        return np.arange(length)
    ends = np.arange(count + 1) * length // count
    return np.random.default_rng(SEED).integers(ends[:-1], ends[1:])


def survey(reader: Reader, count: int, engine: Engine, title: str) -> Survey:
    """Look at `count` records of a dataset; 0: at all.

    Raises:
      StorageError: the storage fails.
    """
    chosen = choose(len(reader.source), count)
    shards = [chosen[i : i + CHUNK] for i in range(0, len(chosen), CHUNK)]
    out, rows = Survey(), []
    for found in map_shards(reader, shards, engine, title=title, unit=f" x {CHUNK} records"):
        rows.append(found.rows)
        out.classes += found.classes
        out.reasons |= found.reasons
    out.rows = np.concatenate(rows)
    return out


def near_copies(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Of which rows of `first` a row of `second` shows a near-copy (`data.signatures`), and the nearest such row.

    Images of one colour do not count. Nor do those whose colours differ by more than `COLOUR`: digits and other images
    of one kind have near hashes. Of 1,000 digits one seems to be in 2,000 others by this, and 147 by signatures alone;
    of 300 scenes stored again as JPEG of quality 30 at half the size 288 are found, and of 300 others none.
    """
    a, b = (np.flatnonzero(rows["flags"] & (Flag.BLANK | Flag.DAMAGED) == 0) for rows in (first, second))
    nearest = Among(second[b]).nearest(first[a])
    a, b = a[nearest >= 0], b[nearest[nearest >= 0]]
    apart = np.abs(first["colours"][a].astype(np.int16) - second["colours"][b]).max((1, 2, 3), initial=0)
    return [(int(i), int(j)) for i, j, d in zip(a, b, apart, strict=True) if d <= COLOUR]


@contextlib.contextmanager
def warnings_kept() -> Iterator[list[str]]:
    """What is warned of in the log meanwhile, which is not written there."""
    said: list[str] = []

    def keep(record: standard_logging.LogRecord) -> bool:
        if record.levelno < standard_logging.WARNING:
            return True
        said.append(record.getMessage())
        return False

    logger = logging.get_absl_logger()
    logger.addFilter(keep)
    try:
        yield said
    finally:
        logger.removeFilter(keep)


def _digest(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _header(image: bytes | np.ndarray, row: np.void) -> None:
    """Size and kind as they are stored, of an image that can be decoded."""
    if isinstance(image, np.ndarray):
        row["height"], row["width"] = image.shape[:2]
        row["flags"] |= Flag.GREY * (image.ndim == 2 or image.shape[2] == 1)
        return
    with Image.open(io.BytesIO(image), formats=FORMATS) as opened:
        row["height"], row["width"] = opened.height, opened.width
        row["flags"] |= Flag.GREY * (opened.mode in ("1", "L", "LA"))
        row["flags"] |= Flag.PALETTE * (opened.mode == "P")
        row["flags"] |= Flag.TRANSPARENT * opened.has_transparency_data
        row["flags"] |= Flag.CMYK * (opened.mode == "CMYK")
        row["flags"] |= Flag.DEEP * (opened.mode == "F" or opened.mode.startswith("I"))
        row["flags"] |= Flag.ANIMATED * bool(getattr(opened, "is_animated", False))


def _pixels(image: np.ndarray, row: np.void) -> None:
    """What `near_copies` compares."""
    row["flags"] |= Flag.BLANK * bool((image == image[:1, :1]).all())
    small = cv2.resize(image, (signatures.SIDE, signatures.SIDE), interpolation=cv2.INTER_AREA)
    row["hash"], row["colours"] = signatures.of_pixels(small).item()


def _objects(record: Mapping[str, Any], sample: Mapping[str, Any], row: np.void) -> None:
    left, top, right, bottom = np.asarray(record["boxes"], np.float64).reshape(-1, 4).T
    beyond = (left >= row["width"]) | (top >= row["height"]) | (right <= 0) | (bottom <= 0)
    row["objects"], row["outside"] = len(left), int((beyond | (right <= left) | (bottom <= top)).sum())
    row["crowd"] = int(np.asarray(record.get("box_crowd", ()), bool).sum())
    boxes = np.asarray(sample["boxes"])
    row["little"] = int(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) < SMALL**2).sum())
    if "masks" in record:
        row["empty"] = int((~np.asarray(record["masks"], bool).any((1, 2))).sum())


def _count(record: Mapping[str, Any], classes: Counter[int], row: np.void) -> None:
    """The classes of a record."""
    if row["label"] != UNLABELLED:
        classes[int(row["label"])] += 1
    if "box_labels" in record:
        classes.update(np.asarray(record["box_labels"]).tolist())
    if "class_map" in record:
        values, counts = np.unique(record["class_map"], return_counts=True)
        classed = values != ignored(record["class_map"].dtype)
        row["unclassed"] = counts[~classed].sum() / counts.sum()
        classes.update(values[classed].tolist())


def label_counts(part: Part, num_classes: int) -> tuple[np.ndarray, bool]:
    """How many images, objects or maps each of C classes has, and whether that is known of all records."""
    labels = getattr(part.source, "labels", None)
    if labels is not None:
        labels = np.asarray(labels)
        return np.bincount(labels[(labels >= 0) & (labels < num_classes)], minlength=num_classes), True
    counts = np.zeros(num_classes, np.int64)
    for label, number in part.survey.classes.items():
        if 0 <= label < num_classes:
            counts[label] = number
    return counts, len(part.survey.rows) == len(part.source)


def repeated(rows: np.ndarray, column: str) -> np.ndarray:
    """The rows whose value in a column is that of an earlier row, too."""
    _, first = np.unique(rows[column], return_index=True)
    return np.delete(rows, first)
