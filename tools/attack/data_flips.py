"""Flips bits in datasets and in what is kept beside them, and reads every record again: is any flip silent?

    python tools/attack/data_flips.py --flips=200

For each file, one bit at a random place is flipped in a fresh copy. An index, a selection and a TFDS file are opened
after that, tars and arrays before (a flip that is there when a tar is indexed for the first time cannot be known). A
flip ends as one of:

    same     every record is what it was: the bit lies in a header, padding or a member that is not read
    noticed  a record is refused, the file is refused or made again, and all other records are what they were
    silent   a record is another than before, and nobody says so
"""

from __future__ import annotations

import argparse
import io
import itertools
import logging
import os
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging as absl_logging

from visionfm_jax import storage
from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.data.sources.bundled import read_set
from visionfm_jax.data.sources.kinds import NumpyConfig, TarsConfig, TfdsConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.selection import write_selection
from visionfm_jax.errors import UserError

PAIRS = 12
REFUSED = "refused"


def pictures() -> list[bytes]:
    """Encoded, of the bundled emoji."""
    arrays, _ = read_set("twemoji")
    ends = arrays["offsets"]
    return [arrays["blob"][a:b].tobytes() for a, b in itertools.pairwise(ends[: PAIRS + 1])]


def write_tar(folder: Path) -> None:
    """One tar of pairs."""
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i, picture in enumerate(pictures()):
            for suffix, content in (("jpg", picture), ("json", b'{"width": 64}'), ("txt", b"drawing %d" % i)):
                info = tarfile.TarInfo(f"{i:09d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


class Emoji(tfds.core.GeneratorBasedBuilder):
    """The pictures as a TFDS dataset."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> Any:
        image, label = tfds.features.Image(encoding_format="png"), tfds.features.ClassLabel(num_classes=3)
        features = tfds.features.FeaturesDict({"image": image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Any:
        for i, picture in enumerate(pictures()):
            yield i, {"image": io.BytesIO(picture), "label": i % 3}


def attack(file: Path, config: SourceConfig, flips: int, rng: np.random.Generator, *, first: bool) -> Counter[str]:
    """Outcomes of `flips` flips in `file`; `first`: opened before the flip."""
    content = file.read_bytes()
    whole = records(lambda: open_source(config))
    stat = file.stat()
    outcomes: Counter[str] = Counter()
    for _ in range(flips):
        source = open_source(config) if first else None
        place, bit = int(rng.integers(len(content))), int(rng.integers(8))
        file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # bits rot without a new date
        WARNED.clear()
        found = records(lambda source=source: source or open_source(config))
        if found == whole:
            outcomes["noticed" if WARNED else "same"] += 1
        elif len(found) == len(whole) and all(f in (REFUSED, w) for f, w in zip(found, whole, strict=True)):
            outcomes["noticed"] += 1
        else:
            outcomes["silent"] += 1
        file.write_bytes(content)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return outcomes


def records(opened: Callable[[], Source]) -> list[Any]:
    """Every record; `REFUSED` for those that are refused, or for all if the source is."""
    try:
        source = opened()
    except UserError:
        return [REFUSED] * PAIRS
    out: list[Any] = []
    for i in range(len(source)):
        try:
            record = dict(source[i])
            record["image"] = bytes(record["image"])
            out.append(record)
        except (DamagedRecord, UserError, OSError):
            out.append(REFUSED)
    return out


WARNED: list[str] = []


class _Warnings(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        WARNED.append(record.getMessage())


def main() -> None:
    """Write the datasets, attack them, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flips", type=int, default=200, help="bits, for each kind of file (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the places (%(default)s)")
    arguments = parser.parse_args()
    logger = absl_logging.get_absl_logger()
    logger.handlers, logger.propagate = [_Warnings(level=logging.WARNING)], False
    storage.WAITS = ()
    root = Path(tempfile.mkdtemp(prefix="flips-"))
    os.environ["XDG_CACHE_HOME"] = str(root / "cache")
    rng = np.random.default_rng(arguments.seed)
    try:
        tars = root / "tars"
        tars.mkdir()
        write_tar(tars)
        pairs = TarsConfig(path=str(tars))
        index = open_source(pairs).index  # type: ignore[attr-defined]
        write_selection(tars / "all.pairs", index, "", [np.ones(PAIRS, bool)])
        selected = TarsConfig(path=str(tars), selection=str(tars / "all.pairs"))
        Emoji(data_dir=root / "tfds", file_format="array_record").download_and_prepare()
        (stored,) = (root / "tfds").rglob("*array_record-0*")
        images = rng.integers(0, 256, (PAIRS, 16, 16), dtype=np.uint8)
        np.savez(root / "train.npz", image=images, label=np.arange(PAIRS) % 3)
        kinds = {
            "tar, pictures and captions": (tars / "00000.tar", pairs, True),
            "index of tars": (index.path, pairs, False),
            "selection of pairs": (tars / "all.pairs", selected, False),
            "TFDS, ArrayRecord": (stored, TfdsConfig(path=str(root / "tfds")), False),
            ".npz": (root / "train.npz", NumpyConfig(path=str(root / "train.npz"), split=""), False),
        }
        print("| file | flips | same | noticed | silent |\n| --- | ---: | ---: | ---: | ---: |")
        for name, (file, config, first) in kinds.items():
            found = attack(file, config, arguments.flips, rng, first=first)
            counts = " | ".join(str(found[outcome]) for outcome in ("same", "noticed", "silent"))
            print(f"| {name} | {arguments.flips} | {counts} |", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
