"""Compare `visionfm data score` with the forward pass of its model alone, and say what a large crawl takes.

    python benchmarks/score.py
    python benchmarks/score.py --size=L --pairs=2048                  # on a GPU

A CLIP with a ViT of the given size, /16, at 224 pixels and random weights scores pairs of one tar, JPEG files of
256 pixels as img2dataset makes them: reading, checksums, decoding, resizing, the tokenizer, both towers, the cosine and
the Parquet file. The forward pass is that of the same compiled program on the same number of rows that lie in memory.
They alternate in rounds, in one process.

The last line but one is arithmetic: how long `--machines` with `--devices` and `--cores` take for `--crawl` pairs, if a
device scores `--rate` pairs per second, and a core decodes as many pictures as were measured here in processor time.
The slower of both counts.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from halves import machine, say
from PIL import Image

from visionfm_jax.api import Model
from visionfm_jax.curation.score import _model, score
from visionfm_jax.data.images import opened
from visionfm_jax.inference import ROWS
from visionfm_jax.parallel.mesh import to_global

ROOT = Path(__file__).parents[1]
CONFIG = """
from visionfm_jax.config import load
from visionfm_jax.models.backbones.vit import ViTConfig


def get_config(variant=""):
    config = load.load_file("configs/swinv2_g_clip.py:tiny")
    config.model.image = ViTConfig(size="{size}", patch_size=16, image_size=224)
    config.evals = ()
    return config
"""


def write_tar(path: Path, pairs: int, side: int) -> list[bytes]:
    """A tar of pairs; its pictures."""
    rng, pictures = np.random.default_rng(0), []
    with tarfile.open(path, "w") as tar:
        for i in range(pairs):
            buffer = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8))
            small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
            pictures.append(buffer.getvalue())
            for suffix, content in (("jpg", pictures[-1]), ("txt", f"a picture of number {i} of them".encode())):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return pictures


def train(folder: Path, size: str) -> Path:
    """The folder of a run of one step."""
    config = folder / "clip.py"
    config.write_text(CONFIG.format(size=size))
    words = ["train", f"--config={config}", "--config.train.steps=1", "--config.train.batch_size=8"]
    words += ["--config.optim.warmup_steps=0", f"--config.workdir={folder / 'run'}", "--config.train.precision=fp32"]
    subprocess.run([sys.executable, "-m", "visionfm_jax", *words], cwd=ROOT, check=True, stdout=sys.stderr)
    return folder / "run"


class Forward:
    """Both towers, on rows that lie in memory."""

    def __init__(self, model: Model, pictures: list[bytes]):
        self.model, mesh = model, model.trainer.mesh
        most = 8 if jax.default_backend() == "cpu" else ROWS[-1]
        rows = most * mesh.size
        self.times = len(pictures) // rows
        numbers = {"record": np.arange(rows, dtype=np.int32), "mask": np.ones(rows, np.float32)}
        images = np.stack([prepared(model, picture) for picture in pictures[:rows]])
        texts = np.stack(list(model.tokenize(["a picture of number 1 of them"] * rows)))
        self.batches = [{**numbers, "image": images}, {**numbers, "text": texts}]

    def __call__(self) -> None:
        trainer, before = self.model.trainer, {}
        for batch in self.batches:
            for _ in range(self.times):
                started = trainer.predict(self.model.params, to_global(trainer.mesh, batch), "embeddings")
                jax.device_get(before)  # the devices have the next batch meanwhile, as in `inference.predict_rows`
                before = started
        jax.device_get(before)


def prepared(model: Model, picture: bytes) -> np.ndarray:
    """The pixels that the model sees."""
    with opened(picture, model.transform.max_pixels) as image:
        return model.transform.sample(image).image


def seconds(function: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """What a call takes."""
    began = clock()
    function()
    return clock() - began


def main() -> None:
    """Make, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="S", help="of the ViT (%(default)s)")
    parser.add_argument("--images", type=int, default=256, help="pixels of a picture's side (%(default)s)")
    parser.add_argument("--pairs", type=int, default=128, help="of the tar, a multiple of the batch (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument("--crawl", type=float, default=5.85e9, help="pairs (%(default).3g)")
    parser.add_argument("--machines", type=int, default=64, help="that score it (%(default)s)")
    parser.add_argument("--devices", type=int, default=8, help="of each (%(default)s)")
    parser.add_argument("--cores", type=int, default=128, help="of each (%(default)s)")
    parser.add_argument("--rate", type=float, help="pairs/s of a device; as measured here if left out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "tars").mkdir()
        pictures = write_tar(folder / "tars/00000.tar", arguments.pairs, arguments.images)
        run = train(folder, arguments.size)
        number = itertools.count()

        def whole() -> None:
            score(str(folder / "tars"), str(run), folder / f"out{next(number)}", precision="fp32")

        whole()  # compiles
        model = _model(str(run), "fp32")  # the one that score has loaded
        forward = Forward(model, pictures)
        forward()
        found = []
        for _ in range(arguments.rounds):
            times = {"forward": seconds(forward), "score": seconds(whole)}
            found.append({name: arguments.pairs / time for name, time in times.items()})
            say("  ".join(f"{name} {rate:,.1f} pairs/s" for name, rate in found[-1].items()))
        decoding = seconds(lambda: [prepared(model, picture) for picture in pictures], time.process_time)
    ratio = statistics.median(one["score"] / one["forward"] for one in found)
    per_core = arguments.pairs / decoding
    print(f"score / forward: {ratio:.2f}; decoding and resizing: {per_core:,.0f} pictures/s of a core")
    rate = arguments.rate or statistics.median(one["score"] for one in found) / jax.device_count()
    limits = {"devices": rate * arguments.devices, "cores": per_core * arguments.cores}
    slower = min(limits, key=limits.__getitem__)
    hours = arguments.crawl / arguments.machines / limits[slower] / 3600
    print(
        f"{arguments.crawl:.3g} pairs on {arguments.machines} machines: {hours:,.1f} hours, by their {slower} ("
        + ", ".join(f"{name} {limit:,.0f} pairs/s" for name, limit in limits.items())
        + ")"
    )
    packages = {name: version(name) for name in ("visionfm_jax", "jax", "numpy")}
    about = {"machine": machine(), "python": sys.version.split()[0], "versions": packages, "date": str(date.today())}
    print(json.dumps({"command": " ".join(sys.argv), "rounds": found, "ratio": ratio, "per_core": per_core, **about}))


if __name__ == "__main__":
    main()
