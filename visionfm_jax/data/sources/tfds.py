"""TFDS directories with ArrayRecord files, read with random access and without TensorFlow.

PATH is the version directory, or a directory above it that holds one version only. `split` may be a slice in TFDS's
language: "train[:90%]".
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit, no_split, tfds_versions
from visionfm_jax.errors import DataError


class TfdsSource:
    """A split of a TFDS dataset; images come as the bytes that they are stored as."""

    def __init__(self, config: SourceConfig):
        self.name = describe(config)
        builder = _builder(config)
        features = builder.info.features
        for key, name, kind in (
            (config.image_key, "image_key", tfds.features.Image),
            (config.label_key, "label_key", tfds.features.ClassLabel),
        ):
            if key not in features or not isinstance(features[key], kind):
                fit = sorted(k for k in features if isinstance(features[k], kind))
                rule = f"set {name} to one of {', '.join(fit)}" if fit else "use another dataset"
                raise DataError(f"{self.name}: no feature {key!r} of type {kind.__name__}; {rule}")
        label = features[config.label_key]
        if not label.num_classes:
            raise DataError(
                f"{self.name}: the dataset does not say how many classes {config.label_key!r} has; rebuild it"
            )
        self.num_classes = int(label.num_classes)
        # Without names TFDS makes up "0", "1", …
        self.class_names: tuple[str, ...] | None = tuple(label.names)
        self._keys = config.image_key, config.label_key
        images = [k for k in features if isinstance(features[k], tfds.features.Image)]
        skip = {k: tfds.decode.SkipDecoding() for k in images}
        self._files = _files(config, builder)
        self._records = builder.as_data_source(config.split, decoders=skip)  # opens files when first read
        self._ends = np.cumsum([f.take for f in self._files])

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded image and its class."""
        self._check(index)
        image, label = self._keys
        try:
            record = self._records[index]
        except (RuntimeError, ValueError) as error:  # a file cut short or overwritten
            raise OSError(f"{self.key(index)}: {error}") from error
        if record[image] is None or record[label] is None:
            raise OSError(f"{self.key(index)}: the record is empty; the file is damaged")
        return {"image": record[image], "label": int(record[label])}

    def key(self, index: int) -> str:
        """Record file and position in it."""
        self._check(index)
        n = int(np.searchsorted(self._ends, index, side="right"))
        file = self._files[n]
        return f"{os.path.basename(file.filename)}[{index - int(self._ends[n]) + file.take + file.skip}]"

    def _check(self, index: int) -> None:
        if not 0 <= index < len(self._records):
            raise IndexError(f"{self.name}: record {index} of {len(self._records)}")


def _builder(config: SourceConfig) -> Any:
    """The builder of the one version at the path, in ArrayRecord format and with the split."""
    versions = tfds_versions(check_path(config))
    if not versions:
        raise misfit(config, "a TFDS directory (with dataset_info.json)")
    if len(versions) > 1:
        there = ", ".join(map(str, versions[:5])) + (" …" if len(versions) > 5 else "")
        raise DataError(f"{describe(config)}: holds {len(versions)} datasets; set path to one of {there}")
    (version,) = versions
    try:
        builder = tfds.builder_from_directory(version)
    except Exception as error:  # TFDS raises whatever its parsers do
        cause = (str(error).splitlines() or [type(error).__name__])[0]
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


def _files(config: SourceConfig, builder: Any) -> list[Any]:
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
