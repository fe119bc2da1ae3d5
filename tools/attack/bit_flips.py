"""Flip single bits of the files that a run reads, and check that the damage is noticed.

    python tools/attack/bit_flips.py --count=200

One bit of one file is flipped (its size and times stay the same), everything that the file belongs to is read as a run
reads it, and the bit is restored. The result must be one of

    named     an error or a log line reports the damage or a difference, or the record is counted as damaged
    harmless  what was read equals what was written, bit for bit

Anything else is silent damage or a crash, and the exit code is then 1. Image files in class folders have the checksums
that `visionfm_jax.data.checksums` makes.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "unit" / "data")]
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow_datasets as tfds  # noqa: E402
from absl import logging  # noqa: E402
from PIL import Image  # noqa: E402
from tar_sets import write_tars  # noqa: E402

from visionfm_jax.config import CheckpointConfig, Config, SourceConfig  # noqa: E402
from visionfm_jax.data.checksums import make as make_checksums  # noqa: E402
from visionfm_jax.data.images import decode  # noqa: E402
from visionfm_jax.data.loader import DAMAGED  # noqa: E402
from visionfm_jax.data.sources import open_source, selection  # noqa: E402
from visionfm_jax.data.sources.kinds import BundledConfig, FolderConfig, NumpyConfig, TfdsConfig  # noqa: E402
from visionfm_jax.data.sources.tars import TarPairs  # noqa: E402
from visionfm_jax.errors import UserError  # noqa: E402
from visionfm_jax.logs import quiet_logs  # noqa: E402
from visionfm_jax.models.backbones.vit import ViTConfig  # noqa: E402
from visionfm_jax.tasks.classification import ClassificationConfig  # noqa: E402
from visionfm_jax.telemetry.writers import MetricWriter, read_metrics  # noqa: E402
from visionfm_jax.train.checkpoint import Checkpoints  # noqa: E402
from visionfm_jax.train.folder import RunFolder  # noqa: E402
from visionfm_jax.train.provenance import changes, provenance_of, read_provenance  # noqa: E402
from visionfm_jax.train.state import TrainState  # noqa: E402

STEP = 40
Read = Callable[[], Any]  # what comes of the files; raises UserError or one of DAMAGED, or says "named"
NAMED = "named"


def checkpoint(folder: Path) -> Read:
    """A state of 24 arrays, with record and scores."""
    rng = np.random.default_rng(0)

    def arrays() -> dict[str, jax.Array]:
        shapes = {"embed": (48, 96), "kernel": (4, 96, 96), "bias": (4, 96), "norm": (96,), "head": (96, 9), "s": ()}
        return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    state = TrainState(jnp.asarray(STEP, jnp.int32), arrays(), ({"mu": arrays(), "nu": arrays()},), arrays())
    shapes = jax.eval_shape(lambda: state)
    shardings = jax.tree.map(lambda x: x.sharding, state)
    with Checkpoints(folder, CheckpointConfig()) as checkpoints:
        checkpoints.save(STEP, state, {"losses": rng.normal(size=5).tolist(), "skipped": 3})
        checkpoints.failed(wait=True)
        checkpoints.attach(STEP, {"val/top1": 0.625, "val/loss": 1.25}, {"val": "0123abcd"})

    def read() -> Any:
        with Checkpoints(folder, CheckpointConfig()) as checkpoints:
            scores = checkpoints.scores(STEP)
            found = checkpoints.restore(shapes, shardings)
        if found.notes:
            return NAMED
        return [np.asarray(x).tobytes() for x in jax.tree.leaves(found.what)], repr(found.record), scores, found.step

    return read


def metrics(folder: Path) -> Read:
    """Lines of training and of evaluations."""
    rng = random.Random(0)
    with MetricWriter(folder, tensorboard=False) as writer:
        for step in range(1, 60):
            writer.write(step, {"loss": rng.random(), "lr": 1e-3, "grad_norm": rng.expovariate(1)})

    def read() -> Any:
        with contextlib.redirect_stderr(io.StringIO()) as lines:
            found = read_metrics(folder)
        return NAMED if "damaged" in lines.getvalue() else found

    return read


def settings(folder: Path) -> Read:
    """What a continued run compares its settings and data with; in use are always those of the command."""
    config = Config(name="attacked", model=ViTConfig(), task=ClassificationConfig(), workdir=str(folder))
    config.train.steps = 20_000
    config.data.train = (BundledConfig(path="digits"),)
    record = provenance_of(config, [open_source(config.data.train[0])])
    with RunFolder(config, owner=True) as run:
        run.keep(record, 0, "")

    def read() -> Any:
        return NAMED if changes(read_provenance(folder), record, folder) else "the settings of the command"

    return read


def tars(folder: Path) -> Read:
    """All pairs of a folder of tars, with its index and a selection."""
    write_tars(folder / "tars", tars=2, pairs=12)
    index = TarPairs(str(folder / "tars")).index
    chosen = [np.arange(12) % 3 > 0, np.arange(12) % 2 > 0]
    chosen = [bits[: int(n)] for bits, n in zip(chosen, np.diff(index.starts), strict=True)]
    selection.write_selection(folder / "some.pairs", index, "attacked", chosen)

    def read() -> Any:
        out, damaged = [], 0
        for selected in ("", str(folder / "some.pairs")):
            source = TarPairs(str(folder / "tars"), selection=selected)
            for i in range(len(source)):
                source.key(i)
                try:
                    out.append(source[i])
                except DAMAGED:
                    damaged += 1
        return NAMED if damaged else out

    return read


def class_folder(folder: Path) -> Read:
    """Image files by class, as JPEG, PNG and WebP, with checksums: their pixels."""
    rng = np.random.default_rng(0)
    for i in range(4):
        for suffix, options in (("jpg", {"quality": 90}), ("png", {}), ("webp", {"lossless": True})):
            small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
            file = io.BytesIO()
            small.resize((64, 48), Image.Resampling.BICUBIC).save(file, {"jpg": "jpeg"}.get(suffix, suffix), **options)
            path = folder / "train" / f"class{i % 2}" / f"{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    config = FolderConfig(path=str(folder))
    make_checksums(config)

    def read() -> Any:
        source = open_source(config)
        return [(decode(record["image"]).tobytes(), record["label"]) for record in map(source.__getitem__, range(12))]

    return read


def array_file(folder: Path) -> Read:
    """An .npz file of images and labels."""
    rng = np.random.default_rng(0)
    np.savez(folder / "train.npz", image=rng.integers(0, 256, (12, 16, 16), np.uint8), label=np.arange(12) % 3)
    return records_of(NumpyConfig(path=str(folder / "train.npz"), split=""))


class Squares(tfds.core.GeneratorBasedBuilder):
    """Small images in three classes."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        image, label = tfds.features.Image(encoding_format="png"), tfds.features.ClassLabel(num_classes=3)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        rng = np.random.default_rng(0)
        for i in range(12):
            file = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(file, "png")
            file.seek(0)
            yield i, {"image": file, "label": i % 3}


def tfds_dataset(folder: Path) -> Read:
    """A dataset of TFDS, in ArrayRecord."""
    Squares(data_dir=folder, file_format="array_record").download_and_prepare()
    return records_of(TfdsConfig(path=str(folder)))


def records_of(config: SourceConfig) -> Read:
    """All records of a source, which is opened anew each time."""

    def read() -> Any:
        source, out, damaged = open_source(config), [], 0
        for i in range(len(source)):
            try:
                record = source[i]
                out.append((bytes(record["image"]), int(record["label"])))
            except DAMAGED:
                damaged += 1
        return NAMED if damaged else out

    return read


def beside_arrays(folder: Path) -> list[Path]:
    """The files of a checkpoint that hold no array."""
    return sorted(p for p in (folder / f"checkpoints/{STEP}").iterdir() if p.is_file())


# Kind -> what makes the files and how they are read; which of them are attacked.
KINDS: dict[str, tuple[Callable[[Path], Read], Callable[[Path], list[Path]]]] = {
    "checkpoint: arrays": (checkpoint, lambda f: files(f, "checkpoints/*/default")),
    "checkpoint: record, scores": (checkpoint, lambda f: beside_arrays(f)),
    "metrics.jsonl": (metrics, lambda f: [f / "metrics.jsonl"]),
    "config.json, data.json": (settings, lambda f: sorted(f.glob("*.json"))),
    "tar": (tars, lambda f: sorted((f / "tars").glob("*.tar"))),
    "tar index": (tars, lambda f: [p for p in files(f, "tars") if p.suffix != ".tar"]),
    "selection": (tars, lambda f: [f / "some.pairs"]),
    "image file: JPEG": (class_folder, lambda f: sorted(f.rglob("*.jpg"))),
    "image file: PNG": (class_folder, lambda f: sorted(f.rglob("*.png"))),
    "image file: WebP": (class_folder, lambda f: sorted(f.rglob("*.webp"))),
    ".npz": (array_file, lambda f: [f / "train.npz"]),
    "TFDS, ArrayRecord": (tfds_dataset, lambda f: sorted(f.rglob("*array_record-0*"))),
    "checksums of image files": (class_folder, lambda f: sorted(f.glob("*.checksums"))),
}  # fmt: skip


def files(folder: Path, pattern: str) -> list[Path]:
    """Every file below what `pattern` gives, in a stable order, empty ones left out."""
    found = (p for base in folder.glob(pattern) for p in base.rglob("*"))
    return sorted(p for p in found if p.is_file() and p.stat().st_size)


def outcome(read: Read, expected: Any) -> str:
    """Of one reading, while a bit is turned."""
    try:
        found = read()
    except (UserError, *DAMAGED) as error:
        return NAMED if "\n" not in str(error) or "belongs to another model" in str(error) else "crash: several lines"
    except Exception as error:
        return f"crash: {type(error).__name__}: {str(error)[:200]}"
    if isinstance(found, str) and found == NAMED:
        return NAMED
    return "harmless" if found == expected else "silent"


def main() -> int:
    """Run the attack; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200, help="bits to flip in each kind of file (%(default)s)")
    parser.add_argument("--kind", action="append", choices=KINDS, help="only this kind of file, may be repeated (all)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    arguments = parser.parse_args()
    quiet_logs()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.FATAL)  # lines about damaged records are what is counted here
    began, wrong = time.monotonic(), 0
    table: dict[str, collections.Counter] = {}
    for kind in arguments.kind or KINDS:
        rng = random.Random(f"{arguments.seed} {kind}")
        make, choose = KINDS[kind]
        folder = Path(tempfile.mkdtemp(prefix="bit-flips-"))
        read = make(folder)
        expected = read()
        assert expected == read()
        assert not isinstance(expected, str) or expected != NAMED
        found = table[kind] = collections.Counter()
        for _ in range(arguments.count):
            path = rng.choice(choose(folder))
            times = path.stat()
            whole = path.read_bytes()
            bit = rng.randrange(8 * len(whole))
            turned = bytearray(whole)
            turned[bit // 8] ^= 1 << bit % 8
            path.write_bytes(turned)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            what = outcome(read, expected)
            path.write_bytes(whole)
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
            found[what.partition(":")[0]] += 1
            if what not in (NAMED, "harmless"):
                wrong += 1
                print(
                    f"{kind}: bit {bit} of {path.relative_to(folder)}, byte {turned[bit // 8]:#x}: {what}", flush=True
                )
        assert read() == expected, "the files are not what they were"
        print(f"{kind}: {json.dumps(found)}", flush=True)
        shutil.rmtree(folder)
    columns = (NAMED, "harmless", "silent", "crash")
    print(f"\n| file | bits | {' | '.join(columns)} |\n| --- | {' | '.join(['---:'] * (len(columns) + 1))} |")
    for kind, found in table.items():
        print(f"| {kind} | {found.total()} | {' | '.join(str(found[c]) for c in columns)} |")
    print(f"\n{sum(c.total() for c in table.values())} bits, {time.monotonic() - began:.0f} s; {wrong} wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
