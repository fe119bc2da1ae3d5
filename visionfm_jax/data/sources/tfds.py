"""TFDS directories with ArrayRecord files, read with random access and without TensorFlow.

PATH is the version directory, or a directory above it that holds one version only. `split` may be a slice in TFDS's
language: "train[:90%]". A record has a label, a caption, or both: what the dataset has under `label_key` (a ClassLabel)
and `caption_key` (a Text, or a Sequence of Text: several captions of an image). A key that is not the default's must be
there; with `caption_key` "" there are no captions, and there need not be a label.

Where there is no label, `objects_key` may name objects, as in `coco` and `voc`: a Sequence of BBoxFeature `bbox` and
ClassLabel `label`, with `is_crowd` or `is_difficult`, which both mean that an object is not trained on, and `area`.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from visionfm_jax.data.images import stored_size
from visionfm_jax.data.sample import areas
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit, no_split, tfds_versions
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError, one_line, printable

_KINDS = {  # field of TfdsConfig -> what the feature must be
    "image_key": tfds.features.Image,
    "label_key": tfds.features.ClassLabel,
    "caption_key": tfds.features.Text,
}


# A dataset's files name the Python classes of its features, and TFDS imports whatever module these are said to be in.
# Audio and Video are not among them: they hand arguments of the file to programs that decode them.
_FEATURES = {
    f"{feature.__module__}.{feature.__name__}"
    for feature in (
        tfds.features.BBoxFeature,
        tfds.features.ClassLabel,
        tfds.features.FeaturesDict,
        tfds.features.Image,
        tfds.features.LabeledImage,
        tfds.features.Scalar,
        tfds.features.Sequence,
        tfds.features.Tensor,
        tfds.features.Text,
        tfds.features.Translation,
        tfds.features.TranslationVariableLanguages,
    )
}


class TfdsSource:
    """A split of a TFDS dataset; images come as the bytes that they are stored as."""

    def __init__(self, config: TfdsConfig):
        self.name = describe(config)
        builder = _builder(config)
        features = builder.info.features
        if not _has(features, config.image_key, tfds.features.Image):
            raise self._lacks(features, image_key=config.image_key)
        self._image, (self._label, self._caption) = config.image_key, self._label_and_caption(config, features)
        self._objects = config.objects_key if self._label is None and _has_objects(features, config) else None
        self.has_captions = self._caption is not None
        self._several = self.has_captions and isinstance(features[self._caption], tfds.features.Sequence)
        self.num_classes = 0
        self.class_names: tuple[str, ...] | None = None
        self.classes_of = ("label",) if self._objects is None else ("box_labels",)
        if self._label is not None or self._objects is not None:
            label = features[self._objects].feature["label"] if self._objects else features[self._label]
            if not label.num_classes:
                raise DataError(
                    f"{self.name}: the dataset does not say how many classes {self._objects or self._label!r} has; "
                    "rebuild it"
                )
            self.num_classes = int(label.num_classes)
            self.class_names = tuple(label.names)  # without names TFDS makes up "0", "1", …
        images = [k for k in features if isinstance(features[k], tfds.features.Image)]
        skip = {k: tfds.decode.SkipDecoding() for k in images}
        self._files = _files(config, builder)
        self._records = builder.as_data_source(config.split, decoders=skip)  # opens files when first read
        self._ends = np.cumsum([f.take for f in self._files])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded image, its class, an int, and its caption or captions, stored bytes; as far as there are any."""
        self._check(index)
        keys = {"image": self._image, "label": self._label, "caption": self._caption}
        try:
            stored = self._records[index]
        except OSError:
            raise
        except Exception as error:  # whatever the parsers raise on a file that was cut short or overwritten
            if failed := re.search(r"\w+\(\) failed: ([^;]*)", str(error)):  # a call of the system, not a parser
                code = next((c for c in errno.errorcode if os.strerror(c) == failed[1]), errno.EIO)
                raise OSError(code, failed[1]) from error
            raise DamagedRecord(printable(f"{type(error).__name__}: {error}")) from error
        record = {name: stored[key] for name, key in keys.items() if key is not None}
        if any(value is None for value in record.values()):
            raise DamagedRecord("the record is empty")
        if self._label is not None:
            record["label"] = int(record["label"])
            if not 0 <= record["label"] < self.num_classes:
                raise DamagedRecord(f"its label is {record['label']}, but there are {self.num_classes} classes")
        if self._several:
            record["caption"] = tuple(record["caption"])
        return record if self._objects is None else record | self._on_image(stored[self._objects], record["image"])

    def _on_image(self, objects: Any, image: bytes) -> dict[str, Any]:
        """Boxes in pixels, and what belongs to them."""
        height, width = stored_size(image)
        top, left, bottom, right = np.asarray(objects["bbox"], np.float64).reshape(-1, 4).T
        boxes = np.stack([left * width, top * height, right * width, bottom * height], 1)
        labels = np.asarray(objects["label"]).reshape(-1)
        if not ((labels >= 0) & (labels < self.num_classes)).all():
            raise DamagedRecord(f"its objects have labels beyond the {self.num_classes} classes")
        aside = next((objects[k] for k in ("is_crowd", "is_difficult") if k in objects), np.zeros(len(boxes)))
        box_areas = objects["area"] if "area" in objects else areas(boxes)
        return {
            "boxes": boxes,
            "box_labels": labels.astype(np.int32),
            "box_crowd": np.asarray(aside, bool).reshape(-1),
            "box_areas": np.asarray(box_areas, np.float64).reshape(-1),
        }

    @functools.cached_property
    def most_captions(self) -> int:
        """Most captions that one image has; where there are several, all records are read for it, once."""
        if not self._several:
            return int(self.has_captions)
        return max(len(self[i]["caption"]) for i in range(len(self)))

    def key(self, index: int) -> str:
        """Record file and position in it."""
        self._check(index)
        n = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[n]
        return f"{os.path.basename(file.filename)}[{index - int(self._ends[n]) + file.take + file.skip}]"

    def fingerprint(self) -> dict[str, str]:
        """Of each part of a file that the split has, by the file's size."""
        try:
            return {
                f"{os.path.basename(f.filename)}[{f.skip}:{f.skip + f.take}]": f"{os.path.getsize(f.filename):,} bytes"
                for f in self._files
            }
        except OSError as error:
            raise DataError(
                f"{self.name}: {error.filename} cannot be read ({error.strerror}); copy it again"
            ) from error

    def _label_and_caption(self, config: TfdsConfig, features: Any) -> tuple[str | None, ...]:
        """Names of the two features; None for one that the dataset lacks.

        Raises:
          DataError: it lacks both, though captions are wanted, or one that was asked for.
        """
        keys = {"label_key": config.label_key, "caption_key": config.caption_key}
        lacking = {field: key for field, key in keys.items() if not _has(features, key, _KINDS[field])}
        for field, key in lacking.items():
            if key and key != getattr(TfdsConfig, field):
                raise self._lacks(features, **{field: key})
        if lacking == keys and config.caption_key and not _has_objects(features, config):
            raise self._lacks(features, **keys)
        return tuple(None if field in lacking else key for field, key in keys.items())

    def _lacks(self, features: Any, **keys: str) -> DataError:
        what = " and ".join(f"no feature {key!r} of type {_KINDS[field].__name__}" for field, key in keys.items())
        fit = {field: sorted(k for k in features if _has(features, k, _KINDS[field])) for field in keys}
        rule = " or ".join(f"{field} to one of {', '.join(names)}" for field, names in fit.items() if names)
        bare = ", or caption_key='' for its images alone" if "caption_key" in keys else ""
        return DataError(f"{self.name}: {what}; {f'set {rule}' if rule else 'use another dataset'}{bare}")

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self._records):
            raise IndexError(f"{self.name}: record {index} of {len(self._records)}")


def _has_objects(features: Any, config: TfdsConfig) -> bool:
    if config.objects_key not in features or not isinstance(features[config.objects_key], tfds.features.Sequence):
        return False
    parts = features[config.objects_key].feature
    wanted = {"bbox": tfds.features.BBoxFeature, "label": tfds.features.ClassLabel}
    return isinstance(parts, tfds.features.FeaturesDict) and all(
        k in parts and isinstance(parts[k], kind) for k, kind in wanted.items()
    )


def _has(features: Any, key: str, kind: type) -> bool:
    if key not in features:
        return False
    feature = features[key]
    if kind is tfds.features.Text and isinstance(feature, tfds.features.Sequence):
        feature = feature.feature
    return isinstance(feature, kind)


def _builder(config: TfdsConfig) -> Any:
    """The builder of the one version at the path, in ArrayRecord format and with the split."""
    if "://" in config.path:
        raise DataError(f"{describe(config)}: ArrayRecord files are read from a disk; copy the folder to one")
    versions = tfds_versions(check_path(config))
    if not versions:
        raise misfit(config, "a TFDS directory (with dataset_info.json)")
    if len(versions) > 1:
        there = ", ".join(map(str, versions[:5])) + (" …" if len(versions) > 5 else "")
        raise DataError(f"{describe(config)}: holds {len(versions)} datasets; set path to one of {there}")
    (version,) = versions
    _check_features(config, version)
    try:
        builder = tfds.builder_from_directory(version)
    except Exception as error:  # TFDS raises whatever its parsers do
        cause = one_line(error)
        raise DataError(f"{describe(config)}: {version} is damaged ({cause}); copy or build it again") from error
    form = builder.info.file_format
    if form is None or form.value != "array_record":
        found = form.value if form else "unknown"
        raise DataError(
            f"{describe(config)}: the files are in {found} format, which has no random access; "
            f"where TensorFlow is installed, run `tfds convert_format --dataset_version_dir={version} "
            f"--out_file_format=array_record --out_dir=NEW`, and set path to NEW"
        )
    splits = builder.info.splits
    for name in re.findall(r"(?:^|\+)\s*([^\[\]+]*)", config.split):
        if name.strip() not in splits:
            raise no_split(config, list(splits))
    return builder


def _check_features(config: TfdsConfig, version: Path) -> None:
    """Refuse a dataset that names a feature's class which is not one of TFDS's own.

    Raises:
      DataError: it does, or the files that say so cannot be read.
    """
    for name in ("features.json", "dataset_info.json"):  # the latter may hold the features too
        try:
            content = json.loads((version / name).read_text(encoding="utf-8"))
            found = sorted(set(_classes(content)) - _FEATURES)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            cause = printable(one_line(error))
            raise DataError(f"{describe(config)}: {version / name} is damaged ({cause}); copy it again") from error
        if found:
            raise DataError(
                f"{describe(config)}: {version / name} names the Python class {printable(found[0])!r}, which is no "
                "feature of images, labels and texts that TFDS has, and would be imported; use another dataset, or "
                "write this one again without it"
            )


def _classes(content: Any) -> Iterator[str]:
    """Every string where TFDS may look for a Python class: in the proto, in older files, in JSON within JSON."""
    if isinstance(content, dict):
        for key, value in content.items():
            if isinstance(value, str) and key in ("pythonClassName", "python_class_name", "type"):
                yield value
            if isinstance(value, str) and key in ("json", "content"):
                yield from _classes(json.loads(value))
    for value in content.values() if isinstance(content, dict) else content if isinstance(content, list) else ():
        yield from _classes(value)


def _files(config: TfdsConfig, builder: Any) -> list[Any]:
    """The parts of files that make up the split, all of them there."""
    try:
        files = builder.info.splits[config.split].file_instructions
    except ValueError:
        rule = "write TFDS's slices, such as train[:90%] or train+test"
        raise DataError(f"{describe(config)}: cannot parse the split; {rule}") from None
    if not files:
        raise DataError(f"{describe(config)}: the split holds no record; set another")
    missing = [f.filename for f in files if not Path(f.filename).exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(f"{describe(config)}: {missing[0]}{more} is missing; copy the whole directory again")
    return files
