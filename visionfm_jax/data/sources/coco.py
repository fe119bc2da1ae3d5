"""COCO's objects (Lin et al. 2014): PATH/annotations/instances_SPLIT.json beside PATH/SPLIT/FILE.

Datasets that others made in this format keep their files elsewhere: `annotations` and `images` say where. Labels count
the file's categories in the order of their ids, which may have gaps; `category_ids` has these. Images without an object
are records too. An object of an area of many (`iscrowd`) is marked: `data.fields.Objects` keeps it out of training.

Beside what `sources.annotated` leaves out, objects of unknown categories or images are left out and counted. With
`masks`, those of a record are drawn when it is read.
"""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

from visionfm_jax.data.sources.annotated import FAR, AnnotatedFiles, Objects
from visionfm_jax.data.sources.files import read_json
from visionfm_jax.data.sources.kinds import CocoConfig, CocoPanopticConfig
from visionfm_jax.data.sources.layout import check_path, misfit, no_split, splits_of
from visionfm_jax.data.sources.outlines import check_number, mask_of
from visionfm_jax.data.sources.places import Place, place_of

_NEEDED = (
    "images with id and file_name, annotations with image_id, category_id and bbox, and categories with id and name"
)


class CocoSource(AnnotatedFiles):
    """Images of a COCO file with their objects; `category_ids` are the file's, by label.

    Raises:
      DataError: another layout, no such split, images that are missing, or a file that is no such JSON.
    """

    def __init__(self, config: CocoConfig):
        self._masks = config.masks
        self.classes_of = ("box_labels", "masks") if config.masks else ("box_labels",)
        path = annotations_of(config)

        def slim(entry: dict[str, Any]) -> dict[str, Any]:  # called for each object: 450 MB of outlines stay text
            if "segmentation" in entry:
                entry["segmentation"], entry["short"] = _outline(entry["segmentation"]) if config.masks else (b"", 0)
            return entry

        def parse(content: Any) -> tuple:
            return _parse(content, config.masks)

        files, sizes, names, self.category_ids, objects = read_json(config, path, parse, _NEEDED, slim)
        folder = place_of(config.path) / config.images.replace("{split}", config.split)
        super().__init__(config, folder, files, objects, names, sizes=sizes)

    def annotated(self, index: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """With masks, bool (N, H, W), where they are asked for."""
        record, size = super().annotated(index)
        if self._masks:
            outlines = self.outlines(index)
            check_number(len(outlines), *size)
            masks = [mask_of(outline, *size) for outline in outlines]
            record["masks"] = np.stack(masks) if masks else np.zeros((0, *size), bool)
        return record, size


def _outline(segmentation: Any) -> tuple[bytes, int]:
    """As JSON, empty if nothing is left, and how many polygons are left out: those of fewer than three points."""
    polygons = segmentation if isinstance(segmentation, list) else []
    kept = [p for p in polygons if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]
    segmentation = kept if isinstance(segmentation, list) else segmentation
    return json.dumps(segmentation).encode() if segmentation else b"", len(polygons) - len(kept)


def _parse(content: Any, masks: bool) -> tuple:
    """Files, their sizes, class names, category ids and objects."""
    files, sizes, images, names, labels = listed(content)
    objects = Objects()
    for i, note in enumerate(content["annotations"]):
        number, label = images.get(note["image_id"]), labels.get(note["category_id"])
        name = f"annotation {note.get('id', f'number {i}')}"
        if number is None:
            objects.leave("objects of images that are not listed", name)
        elif label is None:
            objects.leave("objects of unknown categories", f"{name} (category {note['category_id']})")
        elif masks and not note.get("segmentation"):
            objects.leave("objects without a mask", name)
        else:
            if note.get("short"):
                objects.leave("objects of which polygons of fewer than three points are left out", name)
            size = tuple(side or math.inf for side in sizes[number])
            outline = note.get("segmentation", b"")
            box = corners_of(note["bbox"])
            # As pycocotools: a crowd is what is true.
            objects.add(number, label, box, name, size, bool(note.get("iscrowd")), note.get("area"), outline)
    return files, sizes, names, tuple(labels), objects


def listed(content: Any) -> tuple[list[str], list[tuple[int, int]], dict[Any, int], list[str], dict[int, int]]:
    """Files, their sizes (0: not known), number of an image by its id, class names, label of a category by its id."""
    if not isinstance(content["annotations"], list):
        raise ValueError("annotations that are no list")
    categories = sorted((_whole(c["id"]), str(c["name"])) for c in content["categories"])
    labels = {number: label for label, (number, _) in enumerate(categories)}
    images = {image["id"]: i for i, image in enumerate(content["images"])}
    if not categories or len(labels) < len(categories) or len(images) < len(content["images"]):
        raise ValueError("no category, or ids of images or categories that are not unique")
    files = [str(image["file_name"]) for image in content["images"]]
    sizes = [(_length(image.get("height")), _length(image.get("width"))) for image in content["images"]]
    return files, sizes, images, [name for _, name in categories], labels


def corners_of(box: Any) -> tuple[float, ...] | None:
    """Left, top, right, bottom of left, top, width, height; None: it is none."""
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(edge, int | float) for edge in box):
        return None
    left, top, width, height = box
    try:
        return left, top, left + width, top + height
    except OverflowError:
        return None


def _whole(value: Any) -> int:
    if int(value) != value:
        raise ValueError(f"the id {value!r} of a category, which must be a whole number")
    return int(value)


def _length(value: Any) -> int:
    return value if type(value) is int and 0 < value < FAR else 0


def annotations_of(config: CocoConfig | CocoPanopticConfig) -> Place:
    """The file of the split.

    Raises:
      DataError: there is none.
    """
    path = check_path(config)
    file = path / config.annotations.replace("{split}", config.split)
    if file.is_file():
        return file
    splits = splits_of(path, config.annotations)
    raise no_split(config, splits) if splits else misfit(config, f"PATH/{file.relative_to(path).as_posix()}")
