"""Image files with boxes of objects: what the readers of COCO's, Pascal VOC's and YOLO's files share.

What an annotation file says wrongly is left out, counted and logged once, as far as the images need no object of it: an
object of an unknown class, or whose box is not finite, empty, inverted or outside its image. A box that lies on its
image in part is cut to it by `data.sample.Sample`. Shapes: N objects of an image, M of all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.images import UPRIGHT, stored_orientation, stored_size
from visionfm_jax.data.sources.files import ListedFiles
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.places import Place
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError, printable

FAR = 2**31  # pixels, or images: farther than any edge


class Objects:
    """The objects of a list of images, as they are read from annotations.

    Attributes:
      left: what is left out: reason -> names of files or objects.
    """

    def __init__(self) -> None:
        self._rows: list[tuple[int, int, bool, float, float, float, float, float]] = []
        self._outlines: list[bytes] = []
        self.left: dict[str, list[str]] = {}

    def leave(self, reason: str, name: str) -> None:
        """Count something that is left out."""
        self.left.setdefault(reason, []).append(name)

    def add(
        self,
        image: int,
        label: int,
        box: Sequence[Any] | None,
        name: str,
        size: tuple[float, float] = (math.inf, math.inf),
        crowd: bool = False,
        area: Any = None,
        outline: bytes = b"",
    ) -> None:
        """One more object, or a reason why it is left out.

        Args:
          image: its number.
          label: of its class.
          box: left, top, right, bottom; None: there is none.
          name: by which a person finds it.
          size: (H, W) of the image, in the unit of the box, as far as it is known.
          crowd: whether it is an area of many objects.
          area: in that unit squared; None, or what is no number: that of the box.
          outline: see `sources.outlines`.
        """
        try:
            left, top, right, bottom = (float(edge) for edge in box)
        except (TypeError, ValueError, OverflowError):
            return self.leave("objects whose box is not four numbers", name)
        if not all(map(math.isfinite, (left, top, right, bottom))):
            return self.leave("objects whose box is not finite", name)
        if max(map(abs, (left, top, right, bottom))) > FAR:
            return self.leave("objects whose box reaches far beyond the image", name)
        if right <= left or bottom <= top:
            return self.leave("objects whose box is empty or inverted", name)
        if left >= size[1] or top >= size[0] or right <= 0 or bottom <= 0:
            return self.leave("objects whose box lies outside the image", name)
        known = isinstance(area, int | float) and 0 <= area <= FAR**2
        area = float(area) if known else (right - left) * (bottom - top)
        self._rows.append((image, label, bool(crowd), area, left, top, right, bottom))
        self._outlines.append(outline)
        return None

    def arrays(self, images: int) -> dict[str, Any]:
        """In the order of the images: `ends` (images + 1,), and labels, crowd, areas, boxes, outlines of M objects."""
        rows = np.array(self._rows, np.float64).reshape(-1, 8)
        order = np.argsort(rows[:, 0], kind="stable")
        rows, outlines = rows[order], [self._outlines[i] for i in order]
        return {
            "ends": np.searchsorted(rows[:, 0], np.arange(images + 1)),
            "labels": rows[:, 1].astype(np.int32),
            "crowd": rows[:, 2].astype(bool),
            "areas": rows[:, 3].copy(),
            "boxes": rows[:, 4:].copy(),
            "outlines": b"".join(outlines),
            "outline_ends": np.cumsum([0, *map(len, outlines)]),
        }


class AnnotatedFiles(ListedFiles):
    """Image files with objects; a record has boxes, box_labels, box_crowd and box_areas (`data.sources.Source`).

    Args:
      config: of the source.
      root: folder of the images.
      files: paths below it.
      objects: of these files.
      class_names: by label.
      relative: whether boxes are in units of the upright image's width and height, else in pixels as it is stored.
      sizes: (H, W) of each image that the annotations are for, 0: not known; a file of another size is damaged.
      others: files below `root` that are known to be of another split.

    Raises:
      DataError: as `ListedFiles`; or it has objects, but none of a known class.
    """

    classes_of = ("box_labels",)

    def __init__(
        self,
        config: SourceConfig,
        root: str | Place,
        files: Sequence[str],
        objects: Objects,
        class_names: Sequence[str],
        relative: bool = False,
        sizes: Sequence[tuple[int, int]] = (),
        others: Collection[str] = (),
    ):
        super().__init__(config, root, files)
        self.class_names, self.num_classes = tuple(class_names), len(class_names)
        self._objects, self._relative = objects.arrays(len(files)), relative
        self._sizes = np.array(sizes, np.int64).reshape(-1, 2)
        unknown = [reason for reason in objects.left if reason.startswith("objects of unknown")]
        if unknown and not len(self._objects["labels"]):
            raise DataError(
                f"{self.name}: no object can be used, and {len(objects.left[unknown[0]]):,} are {unknown[0]}, such as "
                f"{printable(objects.left[unknown[0]][0])}; compare these numbers with the list of classes"
            )
        left = [file for file in self.unlisted() if file not in others]
        self.log(objects.left | {"images that the annotations do not list": left})

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes and its objects."""
        return self.annotated(index)[0]

    def annotated(self, index: int) -> tuple[dict[str, Any], tuple[int, int]]:
        """A record, and (H, W) of its image.

        Raises:
          DamagedImage: the image cannot be read.
          DamagedRecord: it has another size than the annotations say.
        """
        data = self.image(index)
        size = stored_size(data)
        if len(self._sizes) and self._sizes[index].all() and tuple(self._sizes[index]) != size:
            of = " x ".join(map(str, self._sizes[index]))
            raise DamagedRecord(f"its annotations are for {of} pixels, and the file has {size[0]} x {size[1]}")
        own = self.objects(index)
        boxes, box_areas = self._objects["boxes"][own], self._objects["areas"][own]
        if self._relative:
            boxes = stored_boxes(boxes, stored_orientation(data)) * np.array(size[::-1] * 2)
            box_areas = box_areas * size[0] * size[1]
        labels, crowd = self._objects["labels"][own], self._objects["crowd"][own]
        record = {"image": data, "boxes": boxes, "box_labels": labels, "box_crowd": crowd, "box_areas": box_areas}
        return record, size

    @property
    def labels(self) -> np.ndarray:
        """(M,), of all objects."""
        return self._objects["labels"]

    def fingerprint(self) -> dict[str, str]:
        """Of the objects, and of each thousand images."""
        names = ("ends", "labels", "crowd", "areas", "boxes", "outlines", "outline_ends")
        arrays = (*(self._objects[k] for k in names), self._sizes)
        return {"objects": f"{len(self._objects['labels']):,} objects, {digest(*arrays)}"} | super().fingerprint()

    def objects(self, index: int) -> slice:
        """Which of all objects a record has."""
        self.file(index)
        return slice(*self._objects["ends"][index : index + 2].tolist())

    def outlines(self, index: int) -> list[bytes]:
        """Of each object of a record."""
        own = self.objects(index)
        ends = self._objects["outline_ends"][own.start : own.stop + 1].tolist()
        return [self._objects["outlines"][a:b] for a, b in itertools.pairwise(ends)]


def stored_boxes(boxes: np.ndarray, orientation: int) -> np.ndarray:
    """Boxes (N, 4) of the upright image on the stored one, both in units of their width and height."""
    swap, flip_rows, flip_columns = UPRIGHT.get(orientation, (False, False, False))
    left, top, right, bottom = boxes.T
    if flip_rows:
        top, bottom = 1 - bottom, 1 - top
    if flip_columns:
        left, right = 1 - right, 1 - left
    return np.stack([top, left, bottom, right] if swap else [left, top, right, bottom], 1)
