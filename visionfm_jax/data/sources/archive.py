"""NumPy archives: PATH.npz with split "", or PATH/SPLIT.npz.

An archive holds `image` uint8 (N, H, W) or (N, H, W, C) with C of 1, 3 or 4, `label` integers (N,), and optionally
`class_names`, strings (K,). The names of the first two are `image_key` and `label_key`.
"""

from __future__ import annotations

import threading
import zipfile
import zlib
from typing import Any

import numpy as np

from visionfm_jax.data.sources.kinds import NumpyConfig
from visionfm_jax.data.sources.layout import check_path, describe, misfit, no_split
from visionfm_jax.data.sources.places import Place
from visionfm_jax.errors import DataError

_LOADING = threading.Lock()  # one thread of a process reads an archive, the others wait for it


class ArchiveSource:
    """Images in memory: a process reads them on first use, and they do not travel when the source is pickled."""

    has_captions = False
    most_captions = 0

    def __init__(self, config: NumpyConfig):
        self.name = describe(config)
        self._path = _find(config)
        self._key, self._label_key = config.image_key, config.label_key
        self._images: np.ndarray | None = None
        try:
            shape, dtype, keys = _header(self._path, config.image_key)
            if config.label_key not in keys:
                raise self._bad(f"holds no array {config.label_key!r} but {', '.join(keys)}", "set label_key")
            with self._path.open("rb") as file, np.load(file) as archive:
                labels = archive[config.label_key]
                names = archive["class_names"] if "class_names" in keys else None
        except KeyError as error:
            raise self._bad(
                f"holds no array {config.image_key!r} but {', '.join(error.args)}", "set image_key"
            ) from None
        except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise self._bad(f"is not a readable .npz file ({error})", "write it again with np.savez") from error
        if dtype != np.uint8 or len(shape) not in (3, 4) or (len(shape) == 4 and shape[3] not in (1, 3, 4)):
            raise self._bad(f"{config.image_key!r} is {dtype} {shape}", "give uint8 (N, H, W) or (N, H, W, 1 | 3 | 4)")
        if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
            rule = f"give {shape[0]} integers, one an image"
            raise self._bad(f"{config.label_key!r} is {labels.dtype} {labels.shape}", rule)
        self.labels = labels = labels.astype(np.int64)
        self.class_names: tuple[str, ...] | None = None if names is None else tuple(map(str, names))
        highest = int(labels.max(initial=-1))
        self.num_classes = len(self.class_names) if self.class_names else highest + 1
        if labels.min(initial=0) < 0 or highest >= self.num_classes:
            rule = f"give labels from 0 to {self.num_classes - 1}"
            raise self._bad(f"{config.label_key!r} runs from {labels.min()} to {highest}", rule)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A view of the image, uint8 (H, W, C), and its label."""
        if not 0 <= index < len(self.labels):
            raise IndexError(f"{self.name}: record {index} of {len(self.labels)}")
        return {"image": self._loaded()[index], "label": int(self.labels[index])}

    def key(self, index: int) -> str:
        """File and row."""
        return f"{self._path.name}[{index}]"

    def fingerprint(self) -> dict[str, str]:
        """Of each array, by the checksum that the archive has of its content."""
        try:
            with self._path.open("rb") as file, zipfile.ZipFile(file) as archive:
                members = {m.filename.removesuffix(".npy"): m for m in archive.infolist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise self._bad(f"is not a readable .npz file ({error})", "write it again with np.savez") from error
        used = (members[name] for name in (self._key, self._label_key, "class_names") if name in members)
        return {m.filename: f"{m.file_size:,} bytes, {m.CRC:08x}" for m in used}

    def _loaded(self) -> np.ndarray:
        if self._images is None:
            with _LOADING:
                if self._images is None:
                    try:
                        with self._path.open("rb") as file, np.load(file) as archive:
                            images = archive[self._key]
                    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                        raise self._bad(f"is damaged ({error})", "write it again with np.savez") from error
                    self._images = images[..., None] if images.ndim == 3 else images
        return self._images

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None}

    def _bad(self, what: str, remedy: str) -> DataError:
        return DataError(f"{self.name}: {self._path.name} {what}; {remedy}")


def _find(config: NumpyConfig) -> Place:
    path = check_path(config)
    if path.is_file():
        if path.suffix != ".npz":
            raise misfit(config, "an .npz file")
        if config.split:
            raise DataError(f"{describe(config)}: a single .npz file has no splits; set split=''")
        return path
    splits = sorted(p.stem for p in path.glob("*.npz"))
    if not splits:
        raise misfit(config, "PATH/SPLIT.npz")
    if config.split not in splits:
        raise no_split(config, splits)
    return path / f"{config.split}.npz"


def _header(path: Place, key: str) -> tuple[tuple[int, ...], np.dtype, list[str]]:
    """Shape and dtype of an array, without reading it, and the names of all arrays.

    Raises:
      KeyError: no such array; its arguments are the names that there are.
    """
    with path.open("rb") as content, zipfile.ZipFile(content) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if key not in keys:
            raise KeyError(*keys)
        with archive.open(f"{key}.npy") as file:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
    return shape, dtype, keys
