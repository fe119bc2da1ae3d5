"""Images with a class for each pixel: a folder of images, and one of maps with the same names.

PATH/images/SPLIT/NAME.jpg and PATH/annotations/SPLIT/NAME.png, or as `images`, `maps` and the suffixes say. A map is a
picture of one channel (or with a palette, whose colours do not count); class c has the value `first` + c, and the
values of `ignore` are no class. In ADEChallengeData2016 0 is no class, and classes are 1 to 150.

A record's `class_map` has classes from 0 on and, for no class, what `sources.record.ignored` says: uint8 (255) up to
255 classes, else uint16 (65,535). A map with another value, of another size than its image or of several channels is
damaged; images without a map and maps without an image are left out, counted and logged.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from visionfm_jax.data.images import DamagedImage, decode_map
from visionfm_jax.data.sources.files import ListedFiles
from visionfm_jax.data.sources.fingerprint import digest, of_files
from visionfm_jax.data.sources.kinds import ClassMapsConfig
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES, check_path, describe, misfit, no_split, splits_of
from visionfm_jax.data.sources.places import Place, below, store_of
from visionfm_jax.data.sources.record import DamagedRecord, ignored
from visionfm_jax.errors import DataError

TRIED = 8  # maps, when the set is opened
_UNKNOWN = -1  # in a table of values: neither a class nor ignored


class ClassMapsSource(ListedFiles):
    """Images in the order of their names: shuffle them."""

    classes_of = ("class_map",)

    def __init__(self, config: ClassMapsConfig):
        path, name = check_path(config), describe(config)
        folders = [getattr(config, field).replace("{split}", config.split) for field in ("images", "maps")]
        if not all((path / folder).is_dir() for folder in folders):
            splits = sorted(set(splits_of(path, config.images)) & set(splits_of(path, config.maps)))
            expected = " and ".join(f"PATH/{folder}" for folder in folders)
            raise no_split(config, splits) if splits else misfit(config, expected)
        names = _names(config, path)
        self.num_classes = config.num_classes or len(names)
        if not self.num_classes:
            raise DataError(f"{name}: the number of classes is not known; set num_classes, or names to a file of them")
        if names and len(names) != self.num_classes:
            raise DataError(f"{name}: {config.names} has {len(names)} names; set num_classes to that, or names to ''")
        self.class_names = names or None
        self._maps, self._end, self._suffix = store_of(path / folders[1]), config.image_suffix, config.map_suffix
        dtype = np.dtype(np.uint8 if self.num_classes <= 255 else np.uint16)
        self._none = int(ignored(dtype))
        self._table = np.full(65_536, _UNKNOWN, np.int32)
        if config.first + self.num_classes > len(self._table):
            raise DataError(
                f"{name}: num_classes = {self.num_classes} from first = {config.first} on, but a map has values to "
                "65,535; set first or num_classes"
            )
        self._table[config.first : config.first + self.num_classes] = np.arange(self.num_classes)
        if set(config.ignore) & set(range(config.first, config.first + self.num_classes)):
            raise DataError(f"{name}: ignore = {config.ignore} has values of classes, which begin at first; mend one")
        self._table[list(config.ignore)] = self._none
        self._dtype = dtype
        images = [f for f in below(path / folders[0]) if self._is_image(f)]
        maps = {f for f in below(path / folders[1]) if f.endswith(config.map_suffix)}
        both = [f for f in images if self.map_file(f) in maps]
        if not both:
            raise misfit(config, f"PATH/{folders[0]}/NAME and PATH/{folders[1]}/NAME{config.map_suffix}")
        super().__init__(config, path / folders[0], both)
        mapped = {self.map_file(f) for f in both}
        self._maps.remember(mapped)
        self.log(
            {
                "images without a map": [f for f in images if self.map_file(f) not in maps],
                "maps without an image": sorted(maps - mapped),
            }
        )
        self._try_maps()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The file's bytes, and its map, (H, W)."""
        return {"image": self.image(index), "class_map": self.class_map(index)}

    def class_map(self, index: int) -> np.ndarray:
        """The classes of a record's pixels.

        Raises:
          DamagedImage, DamagedRecord: the map cannot be decoded, or has values that are no class.
        """
        values = decode_map(self._maps.content(self.map_file(self.file(index))))
        classes = self._table[values]
        if (wrong := classes == _UNKNOWN).any():
            raise DamagedRecord(
                f"its map has the value {values[wrong][0]}, which is neither one of {self.num_classes} classes nor of "
                "ignore; set num_classes, first or ignore, or mend the map"
            )
        return classes.astype(self._dtype)

    def _try_maps(self) -> None:
        """Refuse a set whose first maps all are damaged: its values mean something else, or it is none."""
        problems = []
        for index in range(min(len(self), TRIED)):
            try:
                self.class_map(index)
                return
            except (DamagedImage, DamagedRecord) as error:
                problems.append(f"{self.map_file(self.file(index))}: {error}")
        raise DataError(f"{self.name}: the first {len(problems)} maps cannot be used; {problems[0]}")

    def map_file(self, file: str) -> str:
        """Path of the map of an image, both below their folders."""
        stem = file.removesuffix(self._end) if self._end else os.path.splitext(file)[0]
        return stem + self._suffix

    def fingerprint(self) -> dict[str, str]:
        """Of the meaning of values, and of each thousand images and maps."""
        maps = [os.fsencode(self.map_file(self.file(i))) for i in range(len(self))]
        groups = {f"maps from {i:,} on": ("", maps[i : i + 1000]) for i in range(0, len(self), 1000)}
        return {"values": digest(self._table)} | super().fingerprint() | of_files(self._maps, groups)

    def _is_image(self, file: str) -> bool:
        return file.endswith(self._end) if self._end else os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES


def _names(config: ClassMapsConfig, path: Place) -> tuple[str, ...]:
    """Of the classes; (): not known. ADE20K's table has them in its last column.

    Raises:
      DataError: there is no such file.
    """
    if not config.names:
        return ()
    try:
        lines = (path / config.names).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        if config.names == type(config).names and config.num_classes:
            return ()
        raise DataError(f"{describe(config)}: {path / config.names} is missing; set names to the file") from None
    except ValueError as error:
        raise DataError(f"{describe(config)}: {path / config.names} is no text ({error}); set names") from error
    lines = [line.strip() for line in lines if line.strip()]
    if lines and lines[0].split("\t")[0] == "Idx":
        return tuple(line.split("\t")[-1] for line in lines[1:])
    return tuple(lines)
