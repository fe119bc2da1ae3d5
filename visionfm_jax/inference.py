"""Images and texts through a trained network: read ahead, in batches of few sizes, over all devices."""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from PIL import Image, ImageOps
from tqdm import tqdm

from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.images import DamagedImage, opened, rgb
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError
from visionfm_jax.machine import usable_cores
from visionfm_jax.parallel.mesh import to_global
from visionfm_jax.storage import read
from visionfm_jax.train.step import Trainer

ROWS = (1, 8, 32)  # of a batch, on each device: few shapes, so that few programs are compiled
AHEAD = 64  # images that are decoded before they are asked for
LONG = 64  # rows from which on a progress bar is shown

Row = dict[str, Any]


@dataclass(frozen=True)
class Stored:
    """An image that is read when its turn comes: its name, and what gives a file's content or an array."""

    name: str
    read: Callable[[], bytes | np.ndarray]

    def __str__(self) -> str:
        return self.name


def encoded(image: Any) -> bytes | np.ndarray:
    """What `data.images.opened` takes, of an image in any form that `api.Model` takes.

    Raises:
      DamagedImage: it is of no type that is read, or its file is not there.
      DamagedRecord: the record that holds it is damaged.
      StorageError: it cannot be read now.
    """
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            if path.exists() and not path.is_file():
                raise DamagedImage("is no ordinary file")  # a pipe would be waited for
            return read(path.read_bytes, lambda: str(image))
        except (DataError, ValueError) as error:  # ValueError: a name that no file can have
            raise DamagedImage(getattr(error.__cause__, "strerror", None) or str(error)) from error
    if isinstance(image, Stored):
        return image.read()
    if isinstance(image, Image.Image):
        try:
            return rgb(ImageOps.exif_transpose(image))
        except Exception as error:  # decoders raise a dozen kinds on bad bytes
            raise DamagedImage(str(error) or type(error).__name__) from error
    if isinstance(image, bytes | bytearray):
        return bytes(image)
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)):
        raise DamagedImage(
            f"an array of {pixels.dtype} {pixels.shape}; give uint8 from 0 to 255 of (H, W), (H, W, 3) or (H, W, 4)"
        )
    return pixels


def named(images: Any) -> list[tuple[str, Any]]:
    """Images with names for people, from one of them or a sequence."""
    if isinstance(images, str | bytes | bytearray | os.PathLike | Stored | Image.Image) or getattr(
        images, "ndim", 0
    ) in (2, 3):
        images = [images]
    return [
        (str(image) if isinstance(image, str | os.PathLike | Stored) else f"image {number}", image)
        for number, image in enumerate(images)
    ]


def predict_images(
    trainer: Trainer,
    params: Any,
    transform: EvalTransform,
    images: Any,
    *what: Hashable,
    function: Callable[..., dict] | None = None,
) -> Iterator[Row | None]:
    """As `predict_rows` of images, with `place`, the placement and size of each; None where it cannot be read."""

    def row(pair: tuple[str, Any]) -> Row | None:
        name, image = pair
        try:
            with opened(encoded(image), transform.max_pixels) as picture:
                sample = transform.sample(picture)
                size = np.array(sample.covered, np.int32)
                return {"image": sample.image, "size": size, "place": (sample.placement, picture.size)}
        except (DamagedImage, DamagedRecord) as error:
            logging.warning("%s cannot be read: %s", name, error)
            return None

    pairs = named(images)
    with ThreadPoolExecutor(usable_cores()) as pool:
        yield from predict_rows(trainer, params, _ahead(pool, row, pairs), len(pairs), *what, function=function)


def predict_rows(
    trainer: Trainer,
    params: Any,
    rows: Iterator[Row | None],
    count: int,
    *what: Hashable,
    function: Callable[..., dict] | None = None,
) -> Iterator[Row | None]:
    """What `function` of (params, batch, *what), by default the task's prediction, gives of each of `count` rows.

    With its `place` if it has one; None for None. The next batch is read while the devices work on the one before.
    """
    most = 8 if trainer.mesh.devices.flat[0].platform == "cpu" else ROWS[-1]  # whose caches are small
    sizes = [n * trainer.mesh.size for n in ROWS if n <= most]
    before: tuple[list, dict] = [], {}
    with tqdm(total=count, disable=None if count >= LONG else True, unit=" rows") as bar:
        for first in range(0, count + sizes[-1], sizes[-1]):
            part = list(itertools.islice(rows, sizes[-1]))
            there, batch = _batch(part, first, sizes)
            started = (function or trainer.predict)(params, to_global(trainer.mesh, batch), *what) if there else {}
            yield from _with_places(before[0], jax.device_get(before[1]))
            bar.update(len(before[0]))
            before = part, started


def _batch(part: Sequence[Row | None], first: int, sizes: Sequence[int]) -> tuple[int, dict[str, np.ndarray]]:
    """How many of the rows are there, and these as arrays of the least size that holds them; padding has mask 0."""
    there = [(i, row) for i, row in enumerate(part) if row is not None]
    if not there:
        return 0, {}
    rows = next(size for size in sizes if size >= len(there))
    batch = {"record": np.zeros(rows, np.int32), "mask": np.zeros(rows, np.float32)}
    for name, value in there[0][1].items():
        if name != "place":
            batch[name] = np.zeros((rows, *value.shape), value.dtype)
    for to, (i, row) in enumerate(there):
        batch["record"][to], batch["mask"][to] = first + i, 1
        for name in batch.keys() & row.keys():
            batch[name][to] = row[name]
    return len(there), batch


def _with_places(part: Sequence[Row | None], out: dict[str, np.ndarray]) -> Iterator[Row | None]:
    """The rows of what was predicted of those of `part` that are there."""
    number = itertools.count()
    for row in part:
        if row is None:
            yield None
        else:
            at = next(number)
            yield {name: value[at] for name, value in out.items()} | {"place": row.get("place")}


def _ahead(pool: ThreadPoolExecutor, function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of each item in order, up to `AHEAD` of them before they are asked for."""
    jobs = deque(pool.submit(function, item) for item in items[:AHEAD])
    for number in range(len(items)):
        result = jobs.popleft().result()
        if number + AHEAD < len(items):
            jobs.append(pool.submit(function, items[number + AHEAD]))
        yield result
