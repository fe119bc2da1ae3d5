"""A record on its way through a chain of transforms: an image, and all that lies on it.

Crop, resize and flip are planned, not done: they move a `Placement`, which says what part of the image lies where on a
canvas. So a JPEG is decoded no larger than the result needs, and an image, a mask or a map is resized once, however
many transforms it passes.

Shapes: N objects, H W image, canvas or view, V views.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import cv2
import numpy as np

from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.data.images import UPRIGHT, Picture, upright
from visionfm_jax.data.sources.record import DamagedRecord, ignored

FILL = 128  # grey level of what lies outside the image


class Part(NamedTuple):
    """The part of an image that is resized, along one dimension.

    Attributes:
      begin, end: of what of the image is resized.
      length: to which it is.
      offset: where in that `pixels` begin.
      pixels: of the canvas.
      shown: how many.
    """

    begin: float
    end: float
    length: int
    offset: int
    pixels: slice
    shown: int


class Axis(NamedTuple):
    """One dimension of a placement.

    Attributes:
      length: of the canvas, pixels.
      seen: begin and end of the part of the image that is to be seen, in pixels of the image.
      at: begin and end of where it lies, in pixels of the canvas.
      flipped: whether it lies there mirrored.
    """

    length: int
    seen: tuple[float, float]
    at: tuple[float, float]
    flipped: bool = False

    def crop(self, begin: int, length: int) -> Axis:
        """The canvas becomes a window, which may reach beyond it."""
        end = begin + length
        low, high = min(max(self.at[0], begin), end), min(max(self.at[1], begin), end)
        seen, ends = self.seen, (high, low) if self.flipped else (low, high)
        if (low, high) != self.at:
            first, last = self.on_image(ends[0]), self.on_image(ends[1])
            seen = min(max(first, seen[0]), seen[1]), min(max(last, seen[0]), seen[1])
        return Axis(length, seen, (low - begin, high - begin), self.flipped)

    def resize(self, length: int) -> Axis:
        """The canvas is stretched, with all on it."""
        at = self.at[0] * length / self.length, self.at[1] * length / self.length
        return Axis(length, self.seen, at, self.flipped)

    def flip(self) -> Axis:
        """The canvas is mirrored."""
        return Axis(self.length, self.seen, (self.length - self.at[1], self.length - self.at[0]), not self.flipped)

    def part(self, exact: bool) -> Part:
        """What is made for the pixels of the canvas whose centres lie on the image.

        Training takes whole pixels of the image: off by half a pixel of the image or of the canvas, whichever is less.
        """
        first, last = math.ceil(self.at[0] - 0.5), math.ceil(self.at[1] - 0.5)
        (low, high), shown, where = self.seen, last - first, slice(first, last)
        if exact:
            return Part(low, high, shown, 0, where, shown)
        if shown <= high - low:
            begin = min(round(low), math.ceil(high) - 1)
            return Part(begin, max(begin + 1, round(high)), shown, 0, where, shown)
        begin, end, scale = math.floor(low), math.ceil(high), shown / (high - low) if high > low else 1.0
        offset = round((low - begin) * scale)
        return Part(begin, end, max(offset + shown, round((end - begin) * scale)), offset, where, shown)

    def nearest(self) -> tuple[slice, np.ndarray]:
        """The pixels of the canvas whose centres lie on the image, and on which of its pixels each lies."""
        pixels = self.part(exact=True).pixels
        places = self.on_image(np.arange(pixels.start, pixels.stop) + 0.5)
        last = max(self.seen[0], math.ceil(self.seen[1]) - 1)
        return pixels, np.clip(places, self.seen[0], last).astype(int)

    def on_image(self, place: Any) -> Any:
        """The place in the image of one on the canvas, pixels; arrays of them as well."""
        (low, high), (begin, end) = self.seen, self.at
        ratio = (high - low) / (end - begin) if end > begin else 0.0
        return high - (place - begin) * ratio if self.flipped else low + (place - begin) * ratio


class Placement(NamedTuple):
    """The place of an upright image on a canvas; `interpolation` is that of evaluation, bicubic or bilinear."""

    rows: Axis
    columns: Axis
    interpolation: str = "bicubic"

    @classmethod
    def whole(cls, size: HeightWidth) -> Placement:
        """The image fills the canvas."""
        return cls(*(Axis(length, (0, length), (0, length)) for length in size))

    @property
    def size(self) -> HeightWidth:
        """(H, W) of the canvas."""
        return self.rows.length, self.columns.length

    def crop(self, top: int, left: int, height: int, width: int) -> Placement:
        """The canvas becomes a window, which may reach beyond it."""
        return Placement(self.rows.crop(top, height), self.columns.crop(left, width), self.interpolation)

    def resize(self, size: HeightWidth, interpolation: str = "bicubic") -> Placement:
        """The canvas is stretched to (H, W), with all on it."""
        return Placement(self.rows.resize(size[0]), self.columns.resize(size[1]), interpolation)

    def flip(self) -> Placement:
        """The canvas is mirrored, left to right."""
        return Placement(self.rows, self.columns.flip(), self.interpolation)


def render(picture: Picture, placements: Sequence[Placement], exact: bool) -> list[np.ndarray]:
    """The canvases, uint8 (H, W, 3), grey where there is no image; the image is decoded once.

    Raises:
      DamagedImage: it cannot be decoded.
    """
    plans = [(place.rows.part(exact), place.columns.part(exact)) for place in placements]
    seen = [(rows, columns) for rows, columns in plans if rows.shown > 0 and columns.shown > 0]
    parts = [((r.begin, c.begin, r.end, c.end), (r.length, c.length)) for r, c in seen]
    made = iter(picture.parts(parts, exact, placements[0].interpolation) if parts else ())
    out = []
    for place, (rows, columns) in zip(placements, plans, strict=True):
        if rows.shown <= 0 or columns.shown <= 0:
            out.append(np.full((*place.size, 3), FILL, np.uint8))
            continue
        pixels = next(made)[rows.offset : rows.offset + rows.shown, columns.offset : columns.offset + columns.shown]
        pixels = cv2.flip(pixels, 1) if place.columns.flipped else pixels
        if (rows.shown, columns.shown) != place.size:
            canvas = np.full((*place.size, 3), FILL, np.uint8)
            canvas[rows.pixels, columns.pixels] = pixels
            pixels = canvas
        out.append(pixels)
    return out


@dataclass(eq=False)
class Sample:
    """A record whose image has been opened. Methods return another sample; none changes this one.

    What a record may hold, by its name:
      image: see `data.sources.Source`.
      boxes: (N, 4), left, top, right and bottom edge of each object, pixels.
      box_…: (N, …) or N texts, what belongs to the boxes: labels, say; dropped with them.
      masks: (N, H, W), an image's pixels that belong to each object.
      …_map: (H, W), a class for each pixel, say.
    All are of the image as it is stored, and are turned upright with it; boxes without an area on it are dropped. The
    rest is passed on.

    Attributes:
      picture: the image.
      placement: of the image on the canvas.
      target: (H, W) that the model is given.
      exact: whether pixels are made for evaluation (`data.images`).
      boxes: as above, on the canvas; None: the record has none.
      objects: what belongs to the boxes.
      fields: the rest of the record.
      views: by name, uint8 (V, H, W, 3); where there are any, the model is given these in place of the image.
    """

    picture: Picture
    placement: Placement
    target: HeightWidth
    exact: bool = False
    boxes: np.ndarray | None = None
    objects: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    views: Mapping[str, np.ndarray] = field(default_factory=dict)
    _masks: np.ndarray | None = None  # of the image, not of the canvas; and so are the maps
    _maps: Mapping[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any], picture: Picture, target: HeightWidth, exact: bool = False) -> Sample:
        """A record and its opened image.

        Raises:
          DamagedRecord: boxes, masks or maps are no such arrays, or do not fit each other or the image.
        """
        rest = {k: v for k, v in record.items() if k != "image"}
        boxes, masks = rest.pop("boxes", None), rest.pop("masks", None)
        objects = {k: rest.pop(k) for k in list(rest) if k.startswith("box_")}
        maps = {k: rest.pop(k) for k in list(rest) if k.endswith("_map")}
        for name, values in objects.items():
            if not (isinstance(values, np.ndarray) and values.ndim) and type(values) not in (list, tuple):
                raise DamagedRecord(f"its {name} are of type {type(values).__name__}, and are one for each object")
        if boxes is not None:
            boxes = _numbers("boxes", boxes, "(N, 4)", none=(0, 4)).astype(np.float32)
            if boxes.shape[1] != 4 or not np.isfinite(boxes).all():
                what = f"are of shape {boxes.shape}" if boxes.shape[1] != 4 else "are not finite"
                raise DamagedRecord(f"its boxes {what}, and must be finite numbers (N, 4)")
            boxes = clip_boxes(upright_boxes(boxes, picture), picture.size)
        if masks is not None:
            masks = _numbers("masks", masks, "(N, H, W)", none=(0, 0, 0))
            masks = np.moveaxis(upright(np.moveaxis(masks, 0, -1), picture.orientation), -1, 0)
            masks = masks if len(masks) else np.zeros((0, *picture.size), masks.dtype)
        maps = {k: upright(_numbers(k, v, "(H, W)"), picture.orientation) for k, v in maps.items()}
        counts = {k: len(v) for k, v in {"boxes": boxes, "masks": masks, **objects}.items() if v is not None}
        if len(set(counts.values())) > 1:
            raise DamagedRecord(f"its objects are {', '.join(f'{n} {k}' for k, n in counts.items())}")
        sizes = {k: v.shape[:2] for k, v in maps.items()} | ({} if masks is None else {"masks": masks.shape[1:]})
        for name, size in sizes.items():
            if size != picture.size:
                of = " x ".join(map(str, picture.size))
                raise DamagedRecord(f"its {name} have {size[0]} x {size[1]} pixels, its image {of}")
        place = Placement.whole(picture.size)
        sample = cls(picture, place, target, exact, boxes, objects, rest, {}, masks, maps)
        return sample if boxes is None else sample.keep(areas(boxes) > 0)

    @property
    def size(self) -> HeightWidth:
        """(H, W) of the canvas."""
        return self.placement.size

    @property
    def covered(self) -> HeightWidth:
        """(H, W) of the canvas that the image covers, counted from the top and the left: what is beyond is padding."""
        return self.placement.rows.part(exact=True).pixels.stop, self.placement.columns.part(exact=True).pixels.stop

    @property
    def image(self) -> np.ndarray:
        """The canvas, uint8 (H, W, 3).

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        return render(self.picture, [self.placement], self.exact)[0]

    @property
    def masks(self) -> np.ndarray | None:
        """(N, H, W) on the canvas, 0 where there is no image; None: the record has none."""
        if self._masks is None:
            return None
        masks = np.zeros((len(self._masks), *self.size), self._masks.dtype)
        for out, mask in zip(masks, self._masks, strict=True):
            self._place(mask, out)
        return masks

    @property
    def maps(self) -> dict[str, np.ndarray]:
        """(H, W) each, on the canvas; where there is no image, `ignored`."""
        maps = {name: np.full(self.size, ignored(m.dtype), m.dtype) for name, m in self._maps.items()}
        for name, out in maps.items():
            self._place(self._maps[name], out)
        return maps

    def crop(self, top: int, left: int, height: int, width: int, min_visible: float = 0.0) -> Sample:
        """The canvas becomes a window, which may reach beyond it.

        Boxes are clipped; those of which nothing, or less than `min_visible` of their area, is left are dropped.
        """
        out = self._moved(self.placement.crop(top, left, height, width))
        if self.boxes is None:
            return out
        boxes = clip_boxes(self.boxes - np.array([left, top, left, top], np.float32), (height, width))
        left_over, before = areas(boxes), areas(self.boxes)
        return out._with(boxes=boxes).keep((left_over > 0) & (left_over >= min_visible * before))

    def resize(self, size: HeightWidth, interpolation: str = "bicubic") -> Sample:
        """The canvas is stretched to (H, W), with all on it; `interpolation` is that of evaluation."""
        out = self._moved(self.placement.resize(size, interpolation))
        scale = np.array([size[1] / self.size[1], size[0] / self.size[0]] * 2, np.float32)
        return out if self.boxes is None else out._with(boxes=self.boxes * scale)

    def flip(self) -> Sample:
        """The canvas is mirrored, left to right."""
        out = self._moved(self.placement.flip())
        if self.boxes is None:
            return out
        left, top, right, bottom = self.boxes.T
        width = self.size[1]
        return out._with(boxes=np.stack([width - right, top, width - left, bottom], 1))

    def keep(self, chosen: np.ndarray) -> Sample:
        """The objects that `chosen`, bool (N,), names."""
        kept = np.flatnonzero(chosen)
        if len(kept) == len(chosen):
            return self
        objects = {
            k: v[kept] if isinstance(v, np.ndarray) else type(v)(v[i] for i in kept) for k, v in self.objects.items()
        }
        masks = None if self._masks is None else self._masks[kept]
        boxes = None if self.boxes is None else self.boxes[kept]
        return self._with(boxes=boxes, objects=objects, _masks=masks)

    def with_image(self, image: np.ndarray) -> Sample:
        """Another canvas, uint8 (H, W, 3); what lies on it stays where it is, so its size must be that of before."""
        if image.shape[:2] != self.size:
            raise ValueError(f"an image of {image.shape[:2]} pixels for a canvas of {self.size}; crop or resize before")
        if image.dtype != np.uint8:
            raise ValueError(f"an image of {image.dtype}; pixels are uint8, 0 to 255")
        masks, maps = self.masks, self.maps
        picture = Picture.of(image)
        place = Placement.whole(self.size)
        return self._with(picture=picture, placement=place, _masks=masks, _maps=maps)

    def map_pixels(self, function: Callable[[np.ndarray], np.ndarray]) -> Sample:
        """`function` of the canvas, or of each view where there are views; it keeps the size."""
        if not self.views:
            return self.with_image(function(self.image))
        return self.with_views({k: np.stack([function(view) for view in views]) for k, views in self.views.items()})

    def with_views(self, views: Mapping[str, np.ndarray | Sequence[Placement]]) -> Sample:
        """Views by name: pixels, uint8 (V, H, W, 3), or placements of the image, of which one decode makes them all.

        Raises:
          DamagedImage: the image cannot be decoded.
        """
        planned = [place for places in views.values() if not isinstance(places, np.ndarray) for place in places]
        made = iter(render(self.picture, planned, self.exact) if planned else ())
        if wrong := [str(what.dtype) for what in views.values() if getattr(what, "dtype", np.uint8) != np.uint8]:
            raise ValueError(f"views of {wrong[0]}; pixels are uint8, 0 to 255")
        return self._with(
            views={
                name: what if isinstance(what, np.ndarray) else np.stack([next(made) for _ in what])
                for name, what in views.items()
            },
        )

    def record(self) -> dict[str, Any]:
        """What `of` has taken, as it lies on the canvas, with the views, if there are any, in place of the image.

        Beside boxes there is `size`, which is `covered`.
        """
        out = {**self.fields, **self.objects, **self.maps, **(self.views or {"image": self.image})}
        out |= {} if self.boxes is None else {"boxes": self.boxes, "size": self.covered}
        return out | ({} if self._masks is None else {"masks": self.masks})

    def _place(self, pixels: np.ndarray, canvas: np.ndarray) -> None:
        """Fill the canvas (H, W) from the nearest pixels of the image."""
        (rows, from_rows), (columns, from_columns) = self.placement.rows.nearest(), self.placement.columns.nearest()
        canvas[rows, columns] = pixels[from_rows[:, None], from_columns]

    def _moved(self, placement: Placement) -> Sample:
        if self.views:
            raise ValueError("crop, resize and flip come before the transform that makes several views of an image")
        return self._with(placement=placement)

    def _with(self, **changes: Any) -> Sample:
        """As `dataclasses.replace`, in a tenth of its time."""
        out = object.__new__(Sample)
        out.__dict__.update(self.__dict__, **changes)
        return out


def _numbers(name: str, values: Any, shape: str, none: tuple[int, ...] = ()) -> np.ndarray:
    """What a record has under `name` as an array of the rank of `shape`; of [] one of the shape `none`.

    Raises:
      DamagedRecord: it is something else.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:  # lists of different lengths
        raise DamagedRecord(f"its {name} are no array, and must be {shape}") from error
    array = np.zeros(none) if none and array.shape == (0,) else array
    if array.ndim != shape.count(",") + 1 or array.dtype.kind not in "biuf":
        raise DamagedRecord(f"its {name} are {array.dtype.name} of shape {array.shape}, and must be numbers {shape}")
    return array


def areas(boxes: np.ndarray) -> np.ndarray:
    """(N,) of boxes (N, 4)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def clip_boxes(boxes: np.ndarray, size: HeightWidth) -> np.ndarray:
    """The parts of boxes (N, 4) that lie on (H, W)."""
    return np.clip(boxes, 0, np.array([size[1], size[0]] * 2, np.float32))


def upright_boxes(boxes: np.ndarray, picture: Picture) -> np.ndarray:
    """Boxes (N, 4) of the stored image on the upright one."""
    swap, flip_rows, flip_columns = UPRIGHT.get(picture.orientation, (False, False, False))
    left, top, right, bottom = boxes[:, [1, 0, 3, 2]].T if swap else boxes.T
    height, width = picture.size
    if flip_rows:
        top, bottom = height - bottom, height - top
    if flip_columns:
        left, right = width - right, width - left
    return np.stack([left, top, right, bottom], 1)
