"""COCO's panoptic segmentation (Kirillov et al. 2019): every pixel has a class and belongs to one segment.

PATH/annotations/panoptic_SPLIT.json beside PATH/annotations/panoptic_SPLIT/NAME.png and PATH/SPLIT/FILE, or as
`annotations`, `maps` and `images` say. The colour of a pixel is the number of its segment, R + 256 G + 65536 B; 0, and
numbers of segments that are left out, are none. Labels count the categories, things and stuff, by their ids.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np

from visionfm_jax.data.images import decode
from visionfm_jax.data.sources.annotated import AnnotatedFiles, Objects
from visionfm_jax.data.sources.coco import annotations_of, corners_of, listed
from visionfm_jax.data.sources.files import check_files, read_json
from visionfm_jax.data.sources.fingerprint import of_files
from visionfm_jax.data.sources.kinds import CocoPanopticConfig
from visionfm_jax.data.sources.outlines import check_number
from visionfm_jax.data.sources.places import place_of, store_of
from visionfm_jax.data.sources.record import DamagedRecord, ignored

PNG = b"\x89PNG"  # how its files begin
_NEEDED = (
    "images with id and file_name, annotations with image_id, file_name and segments_info, of which each has id, "
    "category_id and bbox, and categories with id and name"
)


class PanopticSource(AnnotatedFiles):
    """Images with the class of each pixel, or the mask of each segment; by label, `category_ids` are the file's
    and `things` says which are things (else stuff).

    Raises:
      DataError: another layout, no such split, images that are missing, or a file that is no such JSON.
    """

    def __init__(self, config: CocoPanopticConfig):
        path = place_of(config.path)
        folder, maps = (path / part.replace("{split}", config.split) for part in (config.images, config.maps))
        files, sizes, names, self.category_ids, self.things, objects, pngs = read_json(
            config, annotations_of(config), _parse, _NEEDED
        )
        super().__init__(config, folder, files, objects, names, sizes=sizes)
        self._maps = store_of(maps)
        check_files(self.name, self._maps, pngs, "maps")
        self._pngs = np.array([os.fsencode(png) for png in pngs], np.bytes_)
        self._masks = config.truth == "masks"
        self.classes_of = ("box_labels", "masks") if self._masks else ("class_map",)

    def annotated(self, index: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """With masks, bool (N, H, W), or in place of objects `class_map`, (H, W)."""
        record, size = super().annotated(index)
        colours = self._maps.content(os.fsdecode(bytes(self._pngs[index])))
        if not colours.startswith(PNG):
            raise DamagedRecord("its map is no PNG; other formats may have lost colours, which are numbers of segments")
        numbers = decode(colours).astype(np.int32) @ np.array([1, 256, 65_536], np.int32)
        if numbers.shape != size:
            raise DamagedRecord(f"its map has {' x '.join(map(str, numbers.shape))} pixels, its image {size}")
        segments = [int(number) for number in self.outlines(index)]
        if self._masks:
            check_number(len(segments), *size)
            record["masks"] = numbers == np.array(segments, np.int32).reshape(-1, 1, 1)
            _check_map(segments, record["masks"])
            return record, size
        kind = np.uint8 if self.num_classes <= 255 else np.uint16
        classes = np.full(size, ignored(np.dtype(kind)), kind)
        for segment, label in zip(segments, record["box_labels"], strict=True):
            classes[numbers == segment] = label
        _check_map(segments, classes != ignored(np.dtype(kind)))
        return {"image": record["image"], "class_map": classes}, size

    def fingerprint(self) -> dict[str, str]:
        """Of the segments, and of each thousand images and maps."""
        starts = range(0, len(self), 1000)
        groups = {f"maps from {i:,} on": ("", self._pngs[i : i + 1000].tolist()) for i in starts}
        return super().fingerprint() | of_files(self._maps, groups)


def _check_map(segments: list[int], found: np.ndarray) -> None:
    if segments and not found.any():
        raise DamagedRecord("no pixel of its map has the colour of a segment; is it grey, or another image's?")


def _parse(content: Any) -> tuple:
    """Files, their sizes, class names, category ids, which are things, segments and names of maps."""
    files, sizes, images, names, labels = listed(content)
    pngs: dict[int, str] = {}
    objects = Objects()
    for note in content["annotations"]:
        if (image := images.get(note["image_id"])) is None:
            objects.leave("maps of images that are not listed", str(note["file_name"]))
            continue
        png = str(note["file_name"])
        if os.path.isabs(png) or ".." in png.split("/") or "\0" in png:
            raise ValueError(f"a map is named {png!r}, which is no file of its folder")
        if image in pngs:
            raise ValueError(f"{png!r} is a second map of an image")
        if not isinstance(note["segments_info"], list):
            raise ValueError(f"segments of {png!r} that are no list")
        pngs[image] = png
        seen: set[int] = set()
        size = tuple(side or math.inf for side in sizes[image])
        for segment in note["segments_info"]:
            number = int(segment["id"])
            name = f"segment {number} of {png}"
            if not 0 < number < 2**24:
                objects.leave("segments whose id is no colour", name)
                continue
            if number in seen:
                objects.leave("segments whose id another of the map has", name)
                continue
            seen.add(number)
            if (label := labels.get(segment["category_id"])) is None:
                objects.leave("segments of unknown categories", f"{name} (category {segment['category_id']})")
                continue
            crowd, box = bool(segment.get("iscrowd")), corners_of(segment["bbox"])
            objects.add(image, label, box, name, size, crowd, segment.get("area"), str(number).encode())
    if missing := [file for i, file in enumerate(files) if i not in pngs]:
        raise ValueError(f"{len(missing)} images have no map, the first is {missing[0]}")
    things = {labels[int(category["id"])]: bool(int(category.get("isthing", 1))) for category in content["categories"]}
    of_label = tuple(things[label] for label in range(len(names)))
    return files, sizes, names, tuple(labels), of_label, objects, [pngs[i] for i in range(len(files))]
