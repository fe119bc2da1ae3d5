"""Fields of a row beside its image: a label, a caption, objects. Shapes: L tokens, N objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np

from visionfm_jax.data.sources import Source
from visionfm_jax.data.sources.record import DamagedRecord, has_text, ignored
from visionfm_jax.data.tokenizer import Tokenizer
from visionfm_jax.errors import ConfigError, DataError, printable

Row = Mapping[str, Any]
Spec = Mapping[str, tuple[tuple[int, ...], Any]]  # of one row: key -> shape, dtype


class Fields(Protocol):
    """Makes the part of a row that is not its image; can be pickled for worker processes."""

    spec: Spec  # of a row

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        """The fields of `spec`; what is drawn, is drawn by `rng`, the sample's own; None: nothing is.

        Raises:
          DamagedRecord: the record must be left out.
        """
        ...

    def check(self, source: Source) -> None:
        """Refuse a source whose records lack the fields.

        Raises:
          DataError: with what to set instead.
        """
        ...


class NoFields:
    """Nothing beside the image: every source serves."""

    spec: ClassVar[Spec] = {}

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        return {}

    def check(self, source: Source) -> None:
        """Any will do."""


class Labels:
    """`label`, int32 below `num_classes`."""

    def __init__(self, num_classes: int):
        self.spec: Spec = {"label": ((), np.int32)}
        self.num_classes = num_classes

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        label = record.get("label")
        if not isinstance(label, int | np.integer) or not 0 <= label < self.num_classes:
            raise DamagedRecord(f"its label is {label!r}, which is no integer from 0 to {self.num_classes - 1}")
        return {"label": label}

    def check(self, source: Source) -> None:
        if not source.num_classes:
            raise DataError(
                f"{source.name} has no labels, which this task learns from; set label_key, or another source"
            )
        _check_kind(source, "label", "labels of images")
        _check_count(source, self.num_classes)


def _check_kind(source: Source, wanted: str, what: str) -> None:
    """Refuse a source whose classes are of something else; where it does not say it, they are of images.

    Raises:
      DataError: they are.
    """
    kinds = getattr(source, "classes_of", ("label",))
    if wanted not in kinds:
        raise DataError(
            f"{source.name} has no {what} ({wanted}), which this task learns from, but {' and '.join(kinds)}; set "
            "another source (one of your own says what it has by classes_of)"
        )


def _check_count(source: Source, num_classes: int) -> None:
    """Refuse a source with more classes than the task.

    Raises:
      DataError: it has.
    """
    if source.num_classes > num_classes:
        raise DataError(
            f"{source.name} has labels up to {source.num_classes - 1}, but config.task.num_classes = "
            f"{num_classes}; set it to {source.num_classes}"
        )


def class_names(sources: Sequence[Source]) -> Sequence[str]:
    """Those of the first source that has names; empty: none has."""
    return next((source.class_names for source in sources if source.class_names), ())


def check_classes(field: str, source: Source, names: Sequence[str], of: str = "data.train") -> None:
    """Refuse a source of which a label means another class than elsewhere; one may have fewer classes.

    Args:
      field: that names the source, for errors.
      source: labelled; it may have no names of classes.
      names: of the classes elsewhere; empty: not known.
      of: where that is, for errors.

    Raises:
      DataError: with the first label that differs.
    """
    for label, (here, there) in enumerate(zip(source.class_names or (), names, strict=False)):
        if here != there:
            raise DataError(
                f"{field}: {source.name}: label {label} is the class {printable(here)!r}, but {printable(there)!r} in "
                f"{of}; give both the same classes in the same order (class folders: add an empty folder for a class "
                "that is missing, or make both splits of one path)"
            )


class Objects:
    """The objects on an image, after the transforms: at most `most` of them, then zeros, and their number.

    `boxes`, float32 (N, 4): left, top, right and bottom edge, pixels of the image that the model is given;
    `box_labels`, int32 (N,), below `num_classes`; `objects`, int32: how many the image has, also where more than N;
    `size`, int32 (2,): height and width of what the image covers, padding is to the right and below.

    Areas of many objects, `box_crowd`, are left out.
    """

    def __init__(self, num_classes: int, most: int):
        arrays = {"boxes": ((most, 4), np.float32), "box_labels": ((most,), np.int32)}
        self.spec: Spec = {**arrays, "objects": ((), np.int32), "size": ((2,), np.int32)}
        self.num_classes, self.most = num_classes, most

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if missing := sorted({"boxes", "box_labels"} - record.keys()):
            raise DamagedRecord(f"it has no {' and no '.join(missing)}")
        labels, boxes = np.asarray(record["box_labels"]), record["boxes"]
        if "box_crowd" in record:
            single = np.flatnonzero(~np.asarray(record["box_crowd"], bool))
            labels, boxes = labels[single], boxes[single]
        objects, labels = len(labels), labels[: self.most]
        check_box_labels(labels, self.num_classes)
        row = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.spec.items()}
        row["box_labels"][: len(labels)] = labels
        row["boxes"][: len(labels)] = boxes[: self.most]
        return {**row, "objects": objects, "size": np.array(record["size"], np.int32)}

    def check(self, source: Source) -> None:
        _check_kind(source, "box_labels", "boxes of objects")
        _check_count(source, self.num_classes)


def check_box_labels(labels: np.ndarray, num_classes: int) -> None:
    """Refuse what is no list of integers below `num_classes`.

    Raises:
      DamagedRecord: it is none.
    """
    whole = labels.ndim == 1 and (labels.dtype.kind in "iu" or not len(labels))
    if not whole or ((labels < 0) | (labels >= num_classes)).any():
        says = f"{labels.tolist()!r:.200}"
        raise DamagedRecord(f"its labels of boxes are {says}, not integers from 0 to {num_classes - 1}")


class Masks:
    """The masks of the objects on an image, after the transforms: at most `most` of them, then zeros, and their number.

    Of places of `stride` x `stride` pixels, h w of them:
    `masks` (N, h, w): how many pixels of each place lie in the mask; `mask_labels`, int32 (N,), below `num_classes`;
    `counted` (h, w): how many of its pixels count; `objects`, int32: how many masks the image has, also where more
    than N.

    What the image does not cover does not count, nor do areas of many objects, `box_crowd`; if the masks are of the
    `whole` image, nor do pixels without a mask. Masks without a pixel that counts are left out.
    """

    def __init__(self, num_classes: int, most: int, size: tuple[int, int], stride: int, whole: bool):
        grid, kind = tuple(side // stride for side in size), np.min_scalar_type(stride**2)
        arrays = {"masks": ((most, *grid), kind), "counted": (grid, kind), "mask_labels": ((most,), np.int32)}
        self.spec: Spec = {**arrays, "objects": ((), np.int32)}
        self.num_classes, self.most, self.size, self.stride, self.whole = num_classes, most, size, stride, whole

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if missing := sorted({"boxes", "box_labels", "masks"} - record.keys()):
            raise DamagedRecord(f"it has no {' and no '.join(missing)}")
        labels, masks = np.asarray(record["box_labels"]), np.asarray(record["masks"], bool)
        check_box_labels(labels, self.num_classes)
        counted, (height, width) = np.zeros(self.size, bool), record["size"]
        counted[:height, :width] = True
        if "box_crowd" in record:
            crowd = np.asarray(record["box_crowd"], bool)
            counted &= ~masks[crowd].any(0)
            labels, masks = labels[~crowd], masks[~crowd]
        masks = masks & counted
        seen = masks.any((1, 2))
        labels, masks = labels[seen], masks[seen]
        if self.whole:
            counted = masks.any(0)
        row = {name: np.zeros(shape, dtype) for name, (shape, dtype) in self.spec.items()}
        row["mask_labels"][: len(labels)] = labels[: self.most]
        row["masks"][: len(masks)] = self._pixels(masks[: self.most])
        return {**row, "counted": self._pixels(counted), "objects": len(masks)}

    def _pixels(self, masks: np.ndarray) -> np.ndarray:
        """(…, H, W) bool to (…, h, w), how many of a place are true."""
        s = self.stride
        masks = masks.astype(np.min_scalar_type(s * s))
        rows = sum(masks[..., i::s, :] for i in range(s))  # a tenth of the time of a sum over dims
        return sum(rows[..., i::s] for i in range(s))

    def check(self, source: Source) -> None:
        _check_kind(source, "masks", "masks of objects")
        _check_count(source, self.num_classes)


class ClassMap:
    """`class_map` (H, W): the class of each pixel, below `num_classes`, or `sources.record.ignored` of its type.

    uint8 for up to 255 classes, else int32.
    """

    def __init__(self, num_classes: int, size: tuple[int, int]):
        self.spec: Spec = {"class_map": (size, np.uint8 if num_classes <= 255 else np.int32)}
        self.num_classes = num_classes

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if "class_map" not in record:
            raise DamagedRecord("it has no class_map")
        _, dtype = self.spec["class_map"]
        found = record["class_map"]
        none = found == ignored(found.dtype)
        if (wrong := ((found < 0) | (found >= self.num_classes)) & ~none).any():
            raise DamagedRecord(
                f"its class_map has class {found[wrong][0]}, which is no integer from 0 to {self.num_classes - 1}"
            )
        return {"class_map": np.where(none, ignored(dtype), found.astype(dtype))}

    def check(self, source: Source) -> None:
        _check_kind(source, "class_map", "class maps")
        _check_count(source, self.num_classes)


class Texts:
    """A caption: its tokens between those of begin and end, then zeros; of several captions of an image, one.

    `text`, int32 (L,); `truncated`, int32, 1 where the caption has more tokens than fit.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.spec: Spec = {"text": ((length,), np.int32), "truncated": ((), np.int32)}
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        """The row; `rng` draws one of several captions, without it the first is taken."""
        caption = record.get("caption")
        if isinstance(caption, tuple):
            if not caption:
                raise DamagedRecord("there is no caption")
            caption = caption[0 if rng is None else rng.integers(len(caption))]
        try:
            caption = caption.decode() if isinstance(caption, bytes) else caption
        except UnicodeDecodeError as error:
            raise DamagedRecord("the caption is not UTF-8") from error
        if not isinstance(caption, str):
            raise DamagedRecord(f"the caption is of type {type(caption).__name__}, and must be str or bytes")
        if not has_text(caption):
            raise DamagedRecord("the caption is empty")
        text = self.tokenizer(caption, self.length)
        full = text[-1] == self.tokenizer.end  # only then can something be cut: most captions are tokenised once
        return {"text": text, "truncated": int(full and len(self.tokenizer.encode(caption)) > self.length - 2)}

    def check(self, source: Source) -> None:
        if not source.has_captions:
            raise DataError(
                f"{source.name} has no captions, which this task learns from; set caption_key, or another source"
            )


class OptionalTexts(Texts):
    """Texts, as `Texts` has them, and zeros where the source has no captions."""

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if "caption" not in record:
            return {"text": np.zeros(self.length, np.int32), "truncated": 0}
        return super().__call__(record, rng)

    def check(self, source: Source) -> None:
        """Every source serves; which ones a run needs together, `loader.check_pair_ratio` says."""


_SAYS = {"begin": "begins a text by", "end": "ends a text by", "mask": "masks a word by"}


def check_token(use: str, configured: int, actual: int, tokenizer: Tokenizer) -> None:
    """Refuse a text network that means another token of `use` ("begin", "end", "mask") than its tokenizer.

    Raises:
      ConfigError: it does.
    """
    if configured != actual:
        raise ConfigError(
            f"config.model.text.{use}_token = {configured}: {tokenizer.name} {_SAYS[use]} {actual}; set it to {actual}"
        )
