"""Images per second of one core: a Pillow pipeline, our decode functions in a bare loop, and our whole loader.

    python benchmarks/input_pipeline.py            # scikit-learn must be installed: its two photographs are cut up

All three take the same random resized crops to 224 of the same JPEG files; Pillow and the bare loop read them from
memory, the loader from disk. The repetitions are interleaved, so that a slow moment of the machine affects all of them.
Prints medians, the ratios, and one line of JSON. There are two ratios: of wall time, valid on an idle machine, and of
the CPU time of the process, which excludes time that other programs take (and would exclude waiting).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pathlib
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version

import cv2
import grain
import numpy as np
import simplejpeg
from PIL import Image

from visionfm_jax.config.schema import DataConfig, SourceConfig
from visionfm_jax.data import loader
from visionfm_jax.data.chain import Chain
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.data.sources.kinds import FolderConfig
from visionfm_jax.data.transforms import TRIES, RandomResizedCrop, random_box

SIZE = 224
LINKS = 256  # names of every file: below ten thousand records Grain's index shuffle takes twice as long, or longer
CROP = RandomResizedCrop(scale=(0.08, 1.0))
WARM_UP = 2  # batches of the loader before the clock runs


def photographs(width: int, height: int, count: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """Windows (height, width, 3) of two photographs at their full sharpness, mirrored where they are too small."""
    from sklearn.datasets import load_sample_images

    for i, photo in zip(range(count), load_sample_images().images * count, strict=False):
        down, across = -(-2 * height // photo.shape[0]), -(-2 * width // photo.shape[1])
        mosaic = np.pad(photo, ((0, down * photo.shape[0]), (0, across * photo.shape[1]), (0, 0)), "symmetric")
        top = int(rng.integers(mosaic.shape[0] - height))
        left = int(rng.integers(mosaic.shape[1] - width))
        window = mosaic[top : top + height, left : left + width]
        yield np.ascontiguousarray(window[:, ::-1] if i % 4 > 1 else window)


class Samples:
    """What the loader will deliver in the timed batches: the same records in memory, the same random numbers."""

    def __init__(self, source: Source, seed: int, args: argparse.Namespace):
        self.first = WARM_UP * args.batch_size
        self.pool = grain.experimental.RngPool(loader.derive_seed(seed, "crop"))
        order = loader.sample_order([len(source)], [1.0], seed, shuffle=True)
        count = args.batches * args.batch_size
        self.images: list[bytes] = [source[order[self.first + i][1]]["image"] for i in range(count)]

    def __iter__(self) -> Iterator[tuple[bytes, np.random.Generator]]:
        for i, image in enumerate(self.images, self.first):
            rng = self.pool.acquire_rng(i)
            yield image, rng
            self.pool.release_rng(rng)


def pillow_loop(samples: Samples) -> None:
    """Decode and crop by Pillow, with antialiased bilinear resizing."""
    for data, rng in samples:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        draws = rng.random((TRIES, 4))
        top, left, h, w = random_box(draws, CROP.scale, CROP.ratio, (image.height, image.width), (SIZE, SIZE))
        np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h)))


def bare_loop(samples: Samples) -> None:
    """Decode and crop by our functions."""
    chain = Chain((CROP,), SIZE)
    for data, rng in samples:
        chain({"image": data}, rng)


def clocks() -> np.ndarray:
    """(2,) seconds: wall, CPU of this process."""
    return np.array([time.perf_counter(), time.process_time()])


def timed(run: Callable[[Samples], None], samples: Samples) -> np.ndarray:
    """(2,) images per second of wall and of CPU time."""
    start = clocks()
    run(samples)
    return len(samples.images) / (clocks() - start)


def timed_loader(config: SourceConfig, source: Source, seed: int, args: argparse.Namespace) -> np.ndarray:
    """As `timed`, of the whole loader once it runs: its consumer never works, so nothing is held ready."""
    data = DataConfig(train=(config,), transforms=(CROP,), threads=args.threads)
    others = threading.active_count()
    arguments = {"image_size": SIZE, "batch_size": args.batch_size, "seed": seed, "start_step": 0}
    with loader.train_loader(
        data, **arguments, host=0, hosts=1, sources=[source], fields=Labels(source.num_classes)
    ) as batches:
        for _ in range(WARM_UP):
            next(batches)
        start = clocks()
        for _ in range(args.batches):
            next(batches)
        seconds = clocks() - start
    while threading.active_count() > others:  # its threads end after the image they are at
        time.sleep(0.001)
    return args.batches * args.batch_size / seconds


def measure(folder: pathlib.Path, name: str, args: argparse.Namespace) -> dict[str, float | str]:
    """Medians for files of one size."""
    width, height = map(int, name.split("x"))
    files = []
    for i, photo in enumerate(photographs(width, height, args.files, np.random.default_rng(0))):
        files.append(simplejpeg.encode_jpeg(photo, args.quality, colorsubsampling="420"))
        path = folder / name / "train" / f"class{i % 2}" / f"{i:04}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[-1])
        for link in range(1, LINKS):
            os.link(path, path.with_name(f"{i:04}_{link:03}.jpg"))
    config = FolderConfig(path=str(folder / name), split="train")
    source = open_source(config)
    pillow, bare, whole = [], [], []
    for seed in range(args.repeats):
        samples = Samples(source, seed, args)
        pillow.append(timed(pillow_loop, samples))
        bare.append(timed(bare_loop, samples))
        whole.append(timed_loader(config, source, seed, args))
    rates = {"pillow": np.array(pillow), "bare": np.array(bare), "loader": np.array(whole)}  # (repeats, 2)
    result: dict[str, float | str] = {"jpeg": name, "file_kb": round(statistics.mean(map(len, files)) / 1e3, 1)}
    result |= {k: round(float(np.median(v[:, 0])), 1) for k, v in rates.items()}
    for over, under in (("loader", "pillow"), ("bare", "pillow"), ("loader", "bare")):
        wall, cpu = np.median(rates[over] / rates[under], axis=0)
        result |= {f"{over}/{under}": round(float(wall), 3), f"{over}/{under} cpu": round(float(cpu), 3)}
    print("  ".join(f"{k} {v}" for k, v in result.items()), flush=True)
    return result


def main() -> None:
    """Measure every size and print the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = "500x375,1024x768"
    parser.add_argument("--sizes", default=sizes, help="width x height of the JPEG files, pixels (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality, with 4:2:0 subsampling (%(default)s)")
    parser.add_argument("--files", type=int, default=64, help="files per size (%(default)s)")
    parser.add_argument(
        "--batches", type=int, default=8, help="batches per repetition; fewer are noisier (%(default)s)"
    )
    parser.add_argument("--batch_size", type=int, default=64, help="images per batch (%(default)s)")
    parser.add_argument("--repeats", type=int, default=9, help="interleaved repetitions (%(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="reader threads of the loader (%(default)s)")
    parser.add_argument("--core", type=int, default=-1, help="core to run on; -1: the last allowed one (%(default)s)")
    args = parser.parse_args()
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores) if args.core < 0 else args.core})
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(pathlib.Path(folder), name, args) for name in args.sizes.split(",")]
    packages = ("numpy", "grain", "pillow", "simplejpeg", "opencv-python-headless")
    print(
        json.dumps({
            "benchmark": "input_pipeline",
            "unit": "images/s on one core",
            "results": results,
            "python": platform.python_version(),
            "machine": platform.machine(),
            **{p: version(p) for p in packages},
        })
    )  # fmt: skip


if __name__ == "__main__":
    main()
