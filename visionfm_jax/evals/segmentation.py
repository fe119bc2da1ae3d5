"""Class maps of held-out images, compared at the size of each map.

An image is seen in views, each of the model's size: the whole image or windows of it, at one scale or several, mirrored
or not. Views of different images share a batch, so that every shape is static and only the last batch is padded. The
logits of all views are interpolated to the pixels of the original map, averaged there, and the best class is compared.

Shapes: H W image, V views of it, h w places at which a view has logits, C classes.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.data.images import DamagedImage, opened
from visionfm_jax.data.sample import Axis, Placement, Sample
from visionfm_jax.data.sources import read_record
from visionfm_jax.data.sources.record import DamagedRecord, ignored
from visionfm_jax.data.transforms import Resize
from visionfm_jax.errors import ConfigError, DataError
from visionfm_jax.evals.base import OpenedEval, names_of
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import MeanIouConfig
from visionfm_jax.evals.sampling import sample
from visionfm_jax.parallel.mesh import of_all_hosts

PICTURED = 8  # images, and as many of the worst
SIDE = 320  # pixels, of the longer side of what is drawn
MOST_VIEWS = 512  # of an image, which are in memory together: one that takes more is damaged
BLOCK = 2**24  # logits at the size of a map that are held at a time, 64 MiB


class Grid(NamedTuple):
    """Views of an image at one scale that lie side by side: one for each pair of a row's and a column's axis."""

    rows: list[Axis]
    columns: list[Axis]


class Seen(NamedTuple):
    """An image to be segmented.

    Attributes:
      record: its number.
      truth: (H, W) its map.
      grids: its views, in order: of each grid row by row.
      images: uint8 (V, …), their pixels.
    """

    record: int
    truth: np.ndarray
    grids: list[Grid]
    images: np.ndarray


class SegmentationEval(OpenedEval):
    """The `evals.eval.Eval` of class maps: `miou`, `mean_accuracy` and `pixel_accuracy`, as mmsegmentation counts.

    Intersections and unions are summed over the set; pixels without a class count nowhere; a class that neither occurs
    nor is predicted is left out of the means. Images with logits that are not finite are right nowhere, and counted as
    `not_finite`. Each image is counted by one host.

    Attributes:
      details: after a run, for JSON: protocol and its settings, IoU, accuracy and pixels of each class.
      pictured: after a run, on host 0: images with their map and the predicted one, and the worst ones, of this host's.
    """

    config: MeanIouConfig

    def __init__(self, config: MeanIouConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        if not config.scales:
            raise ConfigError(f"config.evals[name={config.name}].scales = (): names no scale; set (1.0,)")
        run.task.fields(run).check(self.source)
        self.classes = names_of(self.source, run.task.num_classes)
        self.size = height_width(config.image_size or run.model.image_size)
        fields = ("inference", "stride", "scales", "flip")
        self.settings |= {name: getattr(config, name) for name in fields} | {"classes": len(self.classes)}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        rows, classes = self.batch_size // self.hosts, len(self.classes)
        own = range(self.host, len(self.source), self.hosts)
        confusion, images, lost = np.zeros((classes, classes + 1), np.int64), 0, 0
        shown, worst = _Kept(sample(np.array(own), PICTURED).tolist() if own else []), _Kept()
        with ThreadPoolExecutor(self.run_config.data.threads) as pool:
            ahead = [pool.submit(self._load, record) for record in own[:rows]]
            for first in range(0, -(-len(self.source) // self.hosts), rows):
                loaded = [job.result() for job in ahead]
                ahead = [pool.submit(self._load, record) for record in own[first + rows : first + 2 * rows]]
                seen = [one for one in loaded if one is not None]
                for one, guess in zip(seen, pool.map(self._guess, seen, self._logits(predict, seen)), strict=True):
                    counts = confusion_of(one.truth, guess, classes)
                    confusion, images, lost = confusion + counts, images + 1, lost + int((guess == classes).all())
                    if self.host == 0:
                        entry = one.record, _small(one.truth), _small(guess), score(counts)["pixel_accuracy"]
                        shown.see(entry)
                        worst.see(entry)
        numbers = np.sum(of_all_hosts([*confusion.ravel().tolist(), images, lost]), axis=0)
        confusion, (images, lost) = numbers[:-2].reshape(confusion.shape), numbers[-2:].tolist()
        if not images:
            raise DataError(f"{self.source.name}: none of its records could be read; see the log for the reasons")
        if lost and self.host == 0:
            logging.warning("%s: the logits of %d of %d images are not finite", self.config.name, lost, images)
        of_class = by_class(confusion)
        self.describe(
            classes=[
                {"name": name, **{k: None if np.isnan(v[i]) else float(v[i]) for k, v in of_class.items()}}
                for i, name in enumerate(self.classes)
            ]
        )
        if self.host == 0:
            self.pictured = {
                "maps": [self._drawn(*one) for one in shown.entries],
                "worst_maps": [self._drawn(*one) for one in worst.entries],
                "class_names": self.classes,
            }
        return {**score(confusion), "images": float(images), "not_finite": float(lost)}

    def _load(self, record: int) -> Seen | None:
        """An image in its views, and its map; None: it is damaged, which is logged."""
        try:
            entry = read_record(self.source, record)
            with opened(entry.get("image"), self.transform.max_pixels) as picture:
                whole = Sample.of(entry, picture, self.size, exact=True)
                if "class_map" not in whole.maps:
                    raise DamagedRecord("it has no class_map")
                sides = (whole, whole.flip()) if self.config.flip else (whole,)
                grids = [self._grid(side, scale) for scale in self.config.scales for side in sides]
                if (views := sum(len(g.rows) * len(g.columns) for g in grids)) > MOST_VIEWS:
                    raise DamagedImage(f"its {views:,} windows are more than {MOST_VIEWS}")
                how = getattr(self.config.preprocess, "interpolation", "bicubic")
                places = [Placement(*axes, how) for g in grids for axes in itertools.product(g.rows, g.columns)]
                images = whole.with_views({"views": places}).views["views"]
                truth = whole.maps["class_map"]
            values = truth[truth != ignored(truth.dtype)]
            if values.size and not 0 <= values.min() <= values.max() < len(self.classes):
                raise DamagedRecord(
                    f"its class_map holds {values.min()} to {values.max()}, not 0 to {len(self.classes) - 1}"
                )
        except (DamagedImage, DamagedRecord) as error:
            key = self.source.key(record)
            logging.warning("%s: record %s is damaged and left out: %s", self.source.name, key, error)
            return None
        return Seen(record, truth, grids, images)

    def _grid(self, image: Sample, scale: float) -> Grid:
        """The views of an image, mirrored or not, at a scale."""
        target = tuple(max(1, round(scale * side)) for side in self.size)
        transform = Resize(to="shorter") if self.config.inference == "slide" else self.config.preprocess
        placed = transform(dataclasses.replace(image, target=target), np.random.default_rng(0))
        axes = placed.placement.rows, placed.placement.columns
        return Grid(*(windows(axis, side, self.config.stride) for axis, side in zip(axes, self.size, strict=True)))

    def _logits(self, predict: Predict, seen: Sequence[Seen]) -> list[np.ndarray]:
        """Of each image those of its views, (V, h, w, C)."""
        rows = self.batch_size // self.hosts
        views = [(one.record, image) for one in seen for image in one.images]
        calls = max(calls for (calls,) in of_all_hosts([-(-len(views) // rows)]))  # hosts predict together
        logits = []
        for first in range(0, calls * rows, rows):
            part = views[first : first + rows]
            batch = {
                "image": np.zeros((rows, *self.size, 3), np.uint8),
                "record": np.full(rows, len(self.source), np.int32),
                "mask": (np.arange(rows) < len(part)).astype(np.float32),
            }
            for row, (record, image) in enumerate(part):
                batch["image"][row], batch["record"][row] = image, record
            own = predict(batch, "logits")["logits"][self.host * rows :]
            logits += list(own[: len(part)])
        ends = np.cumsum([len(one.images) for one in seen])
        return [np.stack(logits[end - len(one.images) : end]) for one, end in zip(seen, ends, strict=True)]

    def _guess(self, one: Seen, logits: np.ndarray) -> np.ndarray:
        return guess_of(one.grids, logits, one.truth.shape)

    def _drawn(self, record: int, truth: np.ndarray, guess: np.ndarray, share: float) -> dict[str, Any]:
        with opened(read_record(self.source, record)["image"], self.transform.max_pixels) as picture:
            (image,) = picture.parts([((0, 0, *picture.size), truth.shape)], exact=True)
        truth = np.where(truth == ignored(truth.dtype), -1, truth.astype(int))
        return {"key": self.source.key(record), "image": image, "truth": truth, "guess": guess, "share": share}


class _Kept:
    """Maps to be drawn: those of given records, or those of the lowest score."""

    def __init__(self, records: Sequence[int] | None = None):
        self.records, self.entries = records, []

    def see(self, entry: tuple[int, np.ndarray, np.ndarray, float]) -> None:
        """A record, its map, the predicted one, and the share of pixels that is right; NaN where none has a class."""
        if self.records is not None:
            self.entries += [entry] if entry[0] in self.records else []
        elif not math.isnan(entry[3]):
            bisect.insort(self.entries, entry, key=lambda e: e[3])
            del self.entries[PICTURED:]


def windows(axis: Axis, side: int, stride: float) -> list[Axis]:
    """Windows of `side` pixels over what is seen of an image, one step of `stride` sides after another.

    The last one ends where the image does; an image that fits into one window lies at its begin, as before.
    """
    length, step = math.ceil(axis.at[1]), max(1, round(stride * side))
    count = 1 + max(0, -(-(length - side) // step))
    return [axis.crop(min(i * step, max(0, length - side)), side) for i in range(count)]


def guess_of(grids: Sequence[Grid], logits: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The best class of each pixel by the mean of the logits of all grids.

    Where windows of a grid overlap, their mean is the grid's.

    Args:
      grids: the views.
      logits: (V, h, w, C), of places that divide a view evenly.
      size: (H, W) of the image.

    Returns:
      (H, W) integers; C where no view shows the pixel, and everywhere if a logit is not finite.
    """
    (height, width), (_, h, w, classes) = size, logits.shape
    out = np.full(size, classes, np.int32)
    if not np.isfinite(logits).all():
        return out
    parts, first = [], 0
    for grid in grids:
        rows, columns = axis_weights(grid.rows, height, h), axis_weights(grid.columns, width, w)
        views = logits[first : first + len(rows) * len(columns)].reshape(len(rows), len(columns), h, w, classes)
        parts += [(r, c, views[i, j]) for i, r in enumerate(rows) for j, c in enumerate(columns)]
        first += len(rows) * len(columns)
    seen = np.zeros(size, bool)
    for rows, columns, _ in parts:
        seen[rows[0], columns[0]] = True
    step = max(1, BLOCK // (width * classes))
    for top in range(0, height, step):
        total = np.zeros((min(step, height - top), width, classes), np.float32)
        for (to_rows, of_rows), (to_columns, of_columns), view in parts:
            begin, end = max(to_rows.start, top), min(to_rows.stop, top + step)
            if begin < end:
                lines = np.tensordot(of_rows[begin - to_rows.start : end - to_rows.start], view, 1)
                total[begin - top : end - top, to_columns] += of_columns @ lines
        out[top : top + step] = np.where(seen[top : top + step], total.argmax(-1), classes)
    return out


def axis_weights(axes: Sequence[Axis], length: int, places: int) -> list[tuple[slice, np.ndarray]]:
    """Along a dimension of `length` pixels: which of them each axis shows, and (pixels, places) by which its places are
    weighed: linearly, over the number of axes that show the pixel.
    """
    out, shown = [], np.zeros(length)
    for axis in axes:
        (low, high), (begin, end) = axis.seen, axis.at
        pixels = slice(math.ceil(low - 0.5), math.ceil(high - 0.5))
        centres = np.arange(pixels.start, pixels.stop) + 0.5
        share = (high - centres if axis.flipped else centres - low) / (high - low)
        at = np.clip((begin + share * (end - begin)) * places / axis.length - 0.5, 0, places - 1)
        left = np.minimum(at.astype(int), max(places - 2, 0))
        weights = np.zeros((len(at), places), np.float32)
        weights[np.arange(len(at)), left] = 1 - (at - left)
        weights[np.arange(len(at)), np.minimum(left + 1, places - 1)] += at - left
        shown[pixels] += 1
        out.append((pixels, weights))
    return [(pixels, weights / shown[pixels, None].astype(np.float32)) for pixels, weights in out]


def confusion_of(truth: np.ndarray, guess: np.ndarray, classes: int) -> np.ndarray:
    """Pixels by class and guess, int64 (C, C + 1).

    Args:
      truth: (H, W) classes, or what `sources.record.ignored` says of its type.
      guess: (H, W) classes; C: none.
      classes: C.
    """
    counted = truth != ignored(truth.dtype)
    cells = truth[counted].astype(np.int64) * (classes + 1) + guess[counted]
    return np.bincount(cells, minlength=classes * (classes + 1)).reshape(classes, classes + 1)


def by_class(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """(C,) each: `iou`, `accuracy`, NaN for classes that do not occur, and `pixels`; of (C, C + 1) counts."""
    right, there = np.diagonal(confusion), confusion.sum(1)
    union = there + confusion[:, :-1].sum(0) - right
    with np.errstate(invalid="ignore"):
        return {"iou": right / union, "accuracy": right / there, "pixels": there}


def score(confusion: np.ndarray) -> dict[str, float]:
    """The metrics, of (C, C + 1) counts; NaN where no pixel has a class."""
    of_class, right = by_class(confusion), np.diagonal(confusion).sum()
    means = {name: of_class[name][~np.isnan(of_class[name])] for name in ("iou", "accuracy")}
    return {
        "miou": float(means["iou"].mean()) if len(means["iou"]) else math.nan,
        "mean_accuracy": float(means["accuracy"].mean()) if len(means["accuracy"]) else math.nan,
        "pixel_accuracy": float(right / confusion.sum()) if confusion.any() else math.nan,
    }


def _small(pixels: np.ndarray) -> np.ndarray:
    """(H, W) to at most `SIDE` pixels, the nearest ones."""
    scale = max(1.0, max(pixels.shape) / SIDE)
    rows, columns = (((np.arange(max(1, int(side / scale))) + 0.5) * scale).astype(int) for side in pixels.shape)
    return pixels[np.minimum(rows, len(pixels) - 1)[:, None], np.minimum(columns, pixels.shape[1] - 1)]
