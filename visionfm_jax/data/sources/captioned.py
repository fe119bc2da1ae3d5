"""Image files that have several captions each, in the JSON formats of COCO and Visual Genome.

`coco_captions` (Chen et al. 2015): PATH/annotations/captions_SPLIT.json beside PATH/SPLIT/FILE. The captions of an
image are in order of their annotations' ids.

`visual_genome` (Krishna et al. 2017): PATH/region_descriptions.json beside PATH/VG_100K/ID.jpg and
PATH/VG_100K_2/ID.jpg. The captions of an image are the phrases of its regions, each once, in the order of the file.

`caption_key` "" gives all images without captions. Where it is given, images without a caption are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import numpy as np

from visionfm_jax.data.sources.files import ListedFiles, read_json
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import CocoCaptionsConfig, TableConfig, VisualGenomeConfig
from visionfm_jax.data.sources.layout import VISUAL_GENOME, check_path, coco_splits, misfit, no_split
from visionfm_jax.data.sources.places import place_of
from visionfm_jax.data.sources.record import has_text

_FOLDERS = ("VG_100K", "VG_100K_2")


class CaptionedFiles(ListedFiles):
    """Image files of a folder with their captions, in the order of the JSON file: shuffle them.

    The captions are UTF-8 end to end, not a str each: 5.4 million region phrases take 200 MB, and travel to worker
    processes in less time than these would take to read the JSON again.

    Args:
      config: where they come from; with `caption_key` "" the captions are forgotten.
      images: path below the folder, captions; blanks in a caption become single spaces, empty captions are dropped.
      root: folder of the images; empty: the path.

    Raises:
      DataError: an image is not there.
    """

    def __init__(
        self,
        config: CocoCaptionsConfig | VisualGenomeConfig | TableConfig,
        images: Iterable[tuple[str, Iterable[str]]],
        root: str = "",
    ):
        self.has_captions = bool(config.caption_key)
        self.most_captions = 0
        without: list[str] = []
        empty: list[str] = []
        files: list[str] = []
        text, ends = bytearray(), [0]
        for file, captions in images:
            texts = list(captions) if self.has_captions else []
            lines = [" ".join(text.split()) for text in texts if has_text(text)]
            if self.has_captions and not lines:
                without.append(file)
                continue
            empty += [file] * (len(texts) - len(lines))
            files.append(file)
            text += "\n".join(lines).encode("utf-8", "surrogatepass")
            ends.append(len(text))
            self.most_captions = max(self.most_captions, len(lines))
        self._text, self._ends = bytes(text), np.array(ends, np.int64)
        super().__init__(config, place_of(root or config.path), files)
        self.log({"images without a caption": without, "empty captions": empty})

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, and its captions, a tuple of str."""
        record: dict[str, Any] = {"image": self.image(index)}
        if self.has_captions:
            lines = self._text[self._ends[index] : self._ends[index + 1]]
            record["caption"] = tuple(lines.decode("utf-8", "surrogatepass").split("\n"))
        return record

    def fingerprint(self) -> dict[str, str]:
        """Of the captions, and of each thousand images."""
        captions = {"captions": f"{len(self._text):,} bytes, {digest(self._text, self._ends)}"}
        return (captions if self.has_captions else {}) | super().fingerprint()


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
    return CaptionedFiles(config, read_json(config, file, images, needed))


def open_visual_genome(config: VisualGenomeConfig) -> CaptionedFiles:
    """Visual Genome's region descriptions; `config.path` is the folder with them and those of the images.

    Raises:
      DataError: as `open_coco`, but for the split.
    """
    path = check_path(config)
    if not (path / VISUAL_GENOME).is_file():
        raise misfit(config, f"PATH/{VISUAL_GENOME}")
    second = {e.name for e in (path / _FOLDERS[1]).iterdir()} if (path / _FOLDERS[1]).is_dir() else set()
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
    return CaptionedFiles(config, read_json(config, path / VISUAL_GENOME, images, needed, slim))


def _string(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise KeyError(key)
    return value
