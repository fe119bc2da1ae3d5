"""Pictures with captions in tars, as img2dataset and WebDataset write them: PATH/NNNNN.tar of KEY.jpg, KEY.txt, ….

PATH is a folder, or one in a store that fsspec knows. Any record is read at once, wherever it lies. Members belong
together by WebDataset's rule (`tar_index.key_of`); where it leaves open which, and where a picture has no caption (no
file, no text in it, not UTF-8), they are left out. A tar that is cut short gives its whole pairs. All of this is
counted, with keys, in the log.
"""

from __future__ import annotations

import re
import zlib
from argparse import ArgumentParser
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import TarsConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit
from visionfm_jax.data.sources.record import DamagedRecord, left_out
from visionfm_jax.data.sources.selection import Selection, read_selection
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tar_index import BLOCK, Index
from visionfm_jax.errors import ConfigError, DataError, printable

_NEAR = 2**16  # bytes between picture and caption up to which both are read at once
CHANGED = "it differs from what was indexed: the tar or its index is damaged"
_NAMED = 5  # keys in a line of the log


def open_tars(config: TarsConfig) -> TarPairs:
    """All pairs of the folder `config.path`, or its `selection`; `caption_key` "caption" stands for the .txt members.

    With `caption_key` "" all pictures, those without caption too.

    Raises:
      DataError: as `TarPairs`; or there is no pair, or a selection among pairs is to be used without captions.
    """
    if not re.search(r"://|\{.*\}\.tar$", config.path) and not any(check_path(config).glob("*.tar")):
        raise misfit(config, "a folder of .tar files")
    if config.selection and not config.caption_key:
        rule = "set selection='', or the caption_key that it was made with"
        raise DataError(f"{describe(config)}: a selection chooses among pairs, but caption_key is empty; {rule}")
    try:
        suffix = caption_suffix("txt" if config.caption_key == TarsConfig.caption_key else config.caption_key)
    except ConfigError as error:
        raise DataError(f"{describe(config)}: {error}") from error
    source = TarPairs(config.path, selection=config.selection, caption_key=suffix, image_key=config.image_key)
    if not len(source):
        why = "".join(f"; {line}" for line in source.report_lines())
        what, rule = (f" with a caption .{suffix}", "caption_key or path") if suffix else ("", "path")
        raise DataError(f"{source.name}: contains no image{what}{why}; set {rule}")
    return source


def caption_suffix(word: str) -> str:
    """The suffix of caption files as `TarPairs` takes it, of what people write: .TXT is txt.

    Raises:
      ConfigError: there are no such parts of a file.
    """
    suffix, colon, part = word.partition(":")
    suffix = suffix.lower().lstrip(".")
    if colon and (not suffix or not part or (part != tar_index.LINES and suffix != "json")):
        raise ConfigError(f"caption_key = {word!r}: write json:FIELD, txt:lines, or a suffix alone")
    return suffix + colon + part


def add_keys(parser: ArgumentParser) -> None:
    """The arguments that say which files of a tar are pairs."""
    parser.add_argument(
        "--caption_key", default="txt", help="suffix of the captions in the tars, json:FIELD or txt:lines (%(default)s)"
    )
    parser.add_argument("--image_key", default="", help="suffix of the pictures, such as rgb.jpg (any of an image)")


def read_pair(store: Store, tar: dict[str, Any], record: np.void) -> tuple[bytes, bytes]:
    """The encoded picture and the text of a pair.

    Args:
      store: the folder.
      tar: its entry in `Index.tars`.
      record: of the pair, a RECORD.

    Raises:
      OSError: the tar cannot be read.
      DamagedRecord: the tar holds something else than when it was indexed, or the index is damaged.
      DataError: the tar is shorter than when it was indexed.
    """
    image, image_size, caption, caption_size, crc = record.tolist()
    image, caption = image * BLOCK, caption * BLOCK
    if max(image + image_size, caption + caption_size) > tar["size"]:
        raise DamagedRecord("the index is damaged: it points behind the end of the tar; delete visionfm_*.index there")
    picture, text = _read(store, tar["name"], (image, image_size), (caption, caption_size))
    if tar_index.checksum(picture, text) != crc:
        raise DamagedRecord(CHANGED)
    return picture, text


def pair_in(file: BinaryIO, record: tuple[int, ...]) -> tuple[bytes, bytes]:
    """As `read_pair`, for who reads many pairs of a tar: of the open file, and a record as a tuple."""
    image, image_size, caption, caption_size, crc = record
    file.seek(image * BLOCK)
    picture = file.read(image_size)
    file.seek(caption * BLOCK)
    text = file.read(caption_size)
    if tar_index.checksum(picture, text) != crc:
        raise DamagedRecord(CHANGED)
    return picture, text


def _read(store: Store, name: str, image: tuple[int, int], caption: tuple[int, int]) -> tuple[bytes, bytes]:
    """The contents of two members, given by where they begin and how many bytes they have."""
    (image, image_size), (caption, caption_size) = image, caption
    if not caption_size:
        return store.read(name, image, image + image_size), b""
    low, high = min(image, caption), max(image + image_size, caption + caption_size)
    if high - low <= image_size + caption_size + _NEAR:
        data = store.read(name, low, high)
        picture = data[image - low : image - low + image_size]
        text = data[caption - low : caption - low + caption_size]
    else:
        picture = store.read(name, image, image + image_size)
        text = store.read(name, caption, caption + caption_size)
    return picture, text


class TarPairs:
    """The source of all pairs of a folder of tars, or of a selection, in order of tar and position.

    Args:
      path: folder or URL with the tars.
      selection: file that `visionfm data select` wrote; empty: all pairs.
      caption_key: suffix of the members with captions; "SUFFIX:lines": each line is one, "json:FIELD": the field is
        one, or a list of them; empty: pictures alone, all that there are.
      image_key: suffix of the pictures; empty: any of an image.

    Attributes:
      store, index: where the tars are, and all pairs in them.

    Raises:
      DataError: no tars, none that can be read, or others than the selection was made from.
    """

    num_classes = 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, path: str, *, selection: str = "", caption_key: str = "txt", image_key: str = ""):
        self.name = f"tars {path}"
        self.store = Store(path)
        self.has_captions = bool(caption_key)
        self._part = caption_key.partition(":")[2]
        self._selected = selection
        self._open(tar_index.open_index(self.store, caption_key, image=image_key.lower().lstrip(".")))
        self.most_captions = max(tar.get("captions", int(self.has_captions)) for tar in self.index.tars)
        for line in self.report_lines():
            logging.warning("%s: %s", self.name, line)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded picture, bytes, and its caption, if wanted, str without white space around it, or a tuple.

        Raises:
          OSError: the tar cannot be read.
          DamagedRecord: the tar holds something else than when it was indexed, or the index is damaged.
          DataError: the tar is shorter than when it was indexed.
        """
        picture, text = self.pair(index)
        if not self.has_captions:
            return {"image": picture}
        captions = tar_index.captions_of(text, self._part)
        return {"image": picture, "caption": captions if self._part else captions[0]}

    def pair(self, index: int) -> tuple[bytes, bytes]:
        """The encoded picture and its text; as `__getitem__`."""
        tar, row = self._locate(index)
        return read_pair(self.store, self.index.tars[tar], self.index.records[row])

    def key(self, index: int) -> str:
        """TAR/KEY without .tar; TAR/[n], its n-th pair, while the tar cannot be read."""
        tar, row = self._locate(index)
        name = self.index.tars[tar]["name"]
        try:
            key = printable(*tar_index.keys(self.store, name, self.index.records[row : row + 1]))
        except (OSError, ValueError, OverflowError):
            key = f"[{row - int(self.index.starts[tar])}]"
        return f"{name.removesuffix('.tar')}/{key}"

    def report(self) -> dict[str, Any]:
        """What was found.

        Returns:
          "tars" and "pairs", numbers; "records", how many of the pairs are selected; "cut", TAR/KEY where a tar ends
          too early; "skipped", what is left out -> {"count", "first": TAR/KEY of some}.
        """
        cut, skipped = [], {}
        for tar in self.index.tars:
            shard = tar["name"].removesuffix(".tar")
            if "cut" in tar:
                cut.append(f"{shard}/{tar['cut']}")
            for reason, (count, keys) in tar.get("skipped", {}).items():
                found = skipped.setdefault(reason, {"count": 0, "first": []})
                found["count"] += count
                found["first"] += [f"{shard}/{key}" for key in keys][: _NAMED - len(found["first"])]
        pairs = len(self.index.records)
        return {"tars": len(self.index.tars), "pairs": pairs, "records": len(self), "cut": cut, "skipped": skipped}

    def report_lines(self) -> list[str]:
        """What is amiss, for people; empty if nothing is."""
        report = self.report()
        lines = []
        if cut := report["cut"]:
            more = f" and {len(cut) - _NAMED} more" if len(cut) > _NAMED else ""
            count = f"{len(cut)} of {report['tars']} tars"
            lines.append(
                f"{count} are truncated, at {', '.join(cut[:_NAMED])}{more}; the complete pairs before are used"
            )
        for reason, found in report["skipped"].items():
            lines.append(left_out(reason, found["count"], found["first"]))
        return lines

    def fingerprint(self) -> dict[str, str]:
        """Of each tar as it was indexed, and of the selection."""
        tars = {tar["name"]: f"{tar['pairs']:,} pairs, {tar['crc']:08x}" for tar in self.index.tars}
        if self._selection is None:
            return tars
        return {"selection": f"{len(self):,} pairs, {digest(self._selection.bits)}"} | tars

    def __getstate__(self) -> dict[str, Any]:
        # What is mapped into memory would be copied: every process maps it itself.
        kept = {k: v for k, v in self.__dict__.items() if k not in ("index", "_selection", "_starts")}
        return kept | {"_mapped": (self.index.path, *self._crcs())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        path, *crcs = state.pop("_mapped")
        self.__dict__.update(state)
        try:
            self._open(tar_index.read_index(path))
            changed = self._crcs() != crcs
        except (OSError, ValueError):
            changed = True
        if changed:
            raise DataError(f"{self.name}: the tars, or their selection, changed after they were opened; start again")

    def _open(self, index: Index) -> None:
        self.index = index
        self.store.remember_all((tar["name"], tar["size"], tar["stamp"]) for tar in index.tars)
        self._selection: Selection | None = None
        self._starts = index.starts
        if self._selected:
            self._selection = read_selection(self._selected, index)
            self._starts = np.concatenate([[0], np.cumsum(self._selection.counts)])

    def _crcs(self) -> list[int]:
        return [self.index.crc, zlib.crc32(self._starts.tobytes())]

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the tar, and row of the index."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        tar = int(np.searchsorted(self._starts, index, side="right")) - 1
        k = index - int(self._starts[tar])
        if self._selection is not None:
            k = self._selection.nth(tar, k)
        return tar, int(self.index.starts[tar]) + k
