"""Image files that have several captions each, in the JSON formats of COCO and Visual Genome.

`coco_captions` (Chen et al. 2015): PATH/annotations/captions_SPLIT.json beside PATH/SPLIT/FILE. The captions of an
image are in order of their annotations' ids.

`visual_genome` (Krishna et al. 2017): PATH/region_descriptions.json beside PATH/VG_100K/ID.jpg and
PATH/VG_100K_2/ID.jpg. The captions of an image are the phrases of its regions, each once, in the order of the file.

`caption_key` "" gives all images without captions. Where it is given, images without a caption are left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources import checksums
from visionfm_jax.data.sources.fingerprint import digest, of_files
from visionfm_jax.data.sources.kinds import CocoCaptionsConfig, VisualGenomeConfig
from visionfm_jax.data.sources.layout import VISUAL_GENOME, check_path, coco_splits, describe, misfit, no_split
from visionfm_jax.data.sources.record import has_text, left_out
from visionfm_jax.errors import DataError, printable

_NAMED = 5  # files in a line of the log
_FOLDERS = ("VG_100K", "VG_100K_2")


class CaptionedFiles:
    """Image files of a folder with their captions, in the order of the JSON file: shuffle them.

    The captions are UTF-8 end to end, not a str each: 5.4 million region phrases take 200 MB, and travel to worker
    processes in less time than these would take to read the JSON again.

    Args:
      config: where they come from; with `caption_key` "" the captions are forgotten.
      images: path below the folder, captions; blanks in a caption become single spaces, empty captions are dropped.

    Raises:
      DataError: an image is not there.
    """

    num_classes = 0
    class_names: tuple[str, ...] | None = None

    def __init__(self, config: CocoCaptionsConfig | VisualGenomeConfig, images: Iterable[tuple[str, Iterable[str]]]):
        self.name, self.root = describe(config), str(Path(config.path).expanduser())
        self.has_captions = bool(config.caption_key)
        self.most_captions = 0
        without: list[str] = []
        empty: list[str] = []
        files: list[bytes] = []
        text, ends = bytearray(), [0]
        for file, captions in images:
            texts = list(captions) if self.has_captions else []
            lines = [" ".join(text.split()) for text in texts if has_text(text)]
            if self.has_captions and not lines:
                without.append(file)
                continue
            empty += [file] * (len(texts) - len(lines))
            if os.path.isabs(file) or ".." in file.split("/") or "\0" in file or not _encodable(file):
                raise DataError(f"{self.name}: {printable(file)!r} is no file of this folder; fix the list of images")
            files.append(os.fsencode(file))
            text += "\n".join(lines).encode("utf-8", "surrogatepass")
            ends.append(len(text))
            self.most_captions = max(self.most_captions, len(lines))
        for what, names in (("images without a caption", without), ("empty captions", empty)):
            if names:
                first = list(map(printable, names[:_NAMED]))
                logging.warning("%s: %s", self.name, left_out(what, len(names), first))
        self._files, self._text, self._ends = np.array(files, np.bytes_), bytes(text), np.array(ends, np.int64)
        self._check_files()
        self._checksums = checksums.find(config, self)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, and its captions, a tuple of str."""
        record: dict[str, Any] = {"image": checksums.read_file(self.root, self.file(index), self._checksums)}
        if self.has_captions:
            lines = self._text[self._ends[index] : self._ends[index + 1]]
            record["caption"] = tuple(lines.decode("utf-8", "surrogatepass").split("\n"))
        return record

    def key(self, index: int) -> str:
        """FOLDER/FILE."""
        return printable(self.file(index))

    def file(self, index: int) -> str:
        """Path of a record's file below `root`."""
        if not 0 <= index < len(self._files):
            raise IndexError(f"{self.name}: record {index} of {len(self._files)}")
        return os.fsdecode(bytes(self._files[index]))

    def listing(self) -> str:
        """Digest of the files' names."""
        return digest(self._files)

    def fingerprint(self) -> dict[str, str]:
        """Of the captions, and of each thousand images."""
        starts = range(0, len(self), 1000)
        files = {f"images from {i:,} on": ("", self._files[i : i + 1000].tolist()) for i in starts}
        captions = {"captions": f"{len(self._text):,} bytes, {digest(self._text, self._ends)}"}
        return (captions if self.has_captions else {}) | of_files(self.root, files)

    def _check_files(self) -> None:
        """Folders are listed, for asking after each file takes minutes where these are on a network."""
        keys = [os.fsdecode(bytes(file)) for file in self._files]
        there = {
            os.path.join(folder, name)
            for folder in {os.path.dirname(key) for key in keys}
            if os.path.isdir(path := os.path.join(self.root, folder))
            for name in _files(path)
        }
        if missing := [key for key in keys if key not in there]:
            raise DataError(
                f"{self.name}: {len(missing)} of {len(keys)} images are missing, the first is "
                f"{os.path.join(self.root, missing[0])}; unpack the images there"
            )


def _encodable(name: str) -> bool:
    """Whether it holds no lone surrogate, which JSON may and names of files may not."""
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def _files(folder: str) -> list[str]:
    """Names in a folder, without broken links."""
    with os.scandir(folder) as entries:
        return [e.name for e in entries if not e.is_symlink() or os.path.exists(e.path)]


def open_coco(config: CocoCaptionsConfig) -> CaptionedFiles:
    """COCO's captions; `config.path` is the folder with `annotations` and those of the splits.

    Raises:
      DataError: another layout, no such split, images that are missing, or a file that is no such JSON.
    """
    path = check_path(config)
    splits = coco_splits(path)
    if not splits:
        raise misfit(config, "PATH/annotations/captions_SPLIT.json")
    if config.split not in splits:
        raise no_split(config, splits)
    file = path / "annotations" / f"captions_{config.split}.json"
    key = config.caption_key or CocoCaptionsConfig.caption_key

    def images(content: Any) -> list[tuple[str, list[str]]]:
        captions: dict[int, list[str]] = {int(image["id"]): [] for image in content["images"]}
        for note in sorted(content["annotations"], key=lambda note: int(note["id"])):
            if (own := captions.get(int(note["image_id"]))) is not None:  # a part of the images may be listed
                own.append(_string(note[key], key))
        return [(os.path.join(config.split, i["file_name"]), captions[int(i["id"])]) for i in content["images"]]

    needed = f"images with id and file_name, and annotations with id, image_id and {key}"
    return CaptionedFiles(config, _read(config, file, images, needed))


def open_visual_genome(config: VisualGenomeConfig) -> CaptionedFiles:
    """Visual Genome's region descriptions; `config.path` is the folder with them and those of the images.

    Raises:
      DataError: as `open_coco`, but for the split.
    """
    path = check_path(config)
    if not (path / VISUAL_GENOME).is_file():
        raise misfit(config, f"PATH/{VISUAL_GENOME}")
    second = set(os.listdir(path / _FOLDERS[1])) if (path / _FOLDERS[1]).is_dir() else set()
    key = "phrase" if config.caption_key in ("", VisualGenomeConfig.caption_key) else config.caption_key

    def slim(entry: dict[str, Any]) -> Any:
        # Called for each object as it is read: of 700 MB only phrases and ids are held, not boxes and synsets.
        return entry if "regions" in entry else entry.get(key)

    def images(content: Any) -> list[tuple[str, Iterable[str]]]:
        out = []
        for entry in content:
            file = f"{int(entry['id'] if 'id' in entry else entry['image_id'])}.jpg"
            phrases = dict.fromkeys(_string(phrase, key) for phrase in entry["regions"])
            out.append((os.path.join(_FOLDERS[file in second], file), phrases))
        return out

    needed = f"entries with id and regions, and regions with {key}"
    return CaptionedFiles(config, _read(config, path / VISUAL_GENOME, images, needed, slim))


def _read(
    config: SourceConfig,
    path: Path,
    images: Callable[[Any], list[tuple[str, Any]]],
    needed: str,
    slim: Callable[[dict[str, Any]], Any] | None = None,
) -> list[tuple[str, Any]]:
    """What `images` makes of a JSON file, each of whose objects `slim` replaces.

    Raises:
      DataError: the file is no JSON, or `images` does not find in it what is needed.
      OSError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file, object_hook=slim)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{describe(config)}: {path} is not valid JSON ({error}); copy or unpack it again") from error
    try:
        return images(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else f"has another layout ({error})"
        raise DataError(f"{describe(config)}: {path} {what}; it needs {needed}") from error


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise KeyError(key)
    return value
