"""Change a dataset between two starts of a run, and check that the change is noticed.

    python tools/attack/changed_data.py --changes=200

Makes datasets of every format that consists of files, and changes each in one way at a time: files, members, rows and
captions are added, removed, renamed, swapped, truncated, overwritten; classes are added and removed; labels change.
`train.provenance` compares what a run would have stored with what it would find, as at every start. A change that
affects no record (another path or modification time) must be accepted. Prints how often each change was noticed; the
exit code is 1 if a change was missed.
"""

from __future__ import annotations

import argparse
import collections
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.sources import kinds, open_source
from visionfm_jax.errors import UserError
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.train.provenance import Provenance, changes, provenance_of

Change = Callable[[Path, np.random.Generator], None]
HARMLESS = ("moved to another path", "touched")
KNOWN = ("overwritten by as many bytes",)  # of a file that is not read: sizes are compared, not contents


def files(root: Path, suffix: str) -> list[Path]:
    """Below a folder, sorted."""
    return sorted(root.rglob(f"*{suffix}"))


def some(root: Path, rng: np.random.Generator, suffix: str, count: int = 1) -> list[Path]:
    """Different files."""
    found = files(root, suffix)
    return [found[i] for i in rng.choice(len(found), count, replace=False)]


def content(rng: np.random.Generator) -> bytes:
    """Of a picture that nobody looks at."""
    return rng.bytes(int(rng.integers(50, 5000)))


def swap(root: Path, rng: np.random.Generator, suffix: str) -> None:
    """The contents of two files that differ in size."""
    while True:
        a, b = some(root, rng, suffix, 2)
        first, second = a.read_bytes(), b.read_bytes()
        if len(first) != len(second):
            break
    a.write_bytes(second)
    b.write_bytes(first)


def of_files(suffix: str) -> dict[str, Change]:
    """What happens to files of any kind."""

    def overwrite(root: Path, rng: np.random.Generator) -> None:
        (path,) = some(root, rng, suffix)
        path.write_bytes(rng.bytes(path.stat().st_size))

    def cut(root: Path, rng: np.random.Generator) -> None:
        (path,) = some(root, rng, suffix)
        path.write_bytes(path.read_bytes()[:-1])

    return {
        "swapped": lambda root, rng: swap(root, rng, suffix),
        "cut by a byte": cut,
        "overwritten by as many bytes": overwrite,
        "touched": lambda root, rng: [os.utime(path, (1, 1)) for path in files(root, suffix)],
    }


def folder(root: Path, rng: np.random.Generator) -> None:
    """Class folders."""
    for name in ("bee", "cow", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(5):
            (root / name / f"{i}.jpg").write_bytes(content(rng))


def new_class(root: Path, rng: np.random.Generator, name: str) -> None:
    """A class with one file."""
    (root / name).mkdir()
    (root / name / "0.jpg").write_bytes(content(rng))


FOLDER: dict[str, Change] = {
    **of_files(".jpg"),
    "added": lambda root, rng: (some(root, rng, ".jpg")[0].parent / "new.jpg").write_bytes(content(rng)),
    "removed": lambda root, rng: some(root, rng, ".jpg")[0].unlink(),
    "renamed": lambda root, rng: (path := some(root, rng, ".jpg")[0]).rename(path.with_name("renamed.jpg")),
    "moved to another class": lambda root, rng: (root / "bee/1.jpg").rename(root / "cow/from_bee.jpg"),
    "a class that sorts first": lambda root, rng: new_class(root, rng, "ant"),
    "a class that sorts last": lambda root, rng: new_class(root, rng, "eel"),
    "a class removed": lambda root, rng: shutil.rmtree(root / "dog"),
    "a class renamed": lambda root, rng: (root / "cow").rename(root / "cat"),
}


def arrays(root: Path, rng: np.random.Generator) -> None:
    """An archive."""
    root.mkdir()
    write_arrays(root, {"image": rng.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8), "label": np.arange(12) % 3})


def write_arrays(root: Path, values: dict[str, np.ndarray]) -> None:
    """Write it."""
    np.savez(root / "train.npz", **values)


def edit_arrays(edit: Callable[[dict, np.random.Generator], object]) -> Change:
    """A change of the arrays by name."""

    def change(root: Path, rng: np.random.Generator) -> None:
        with np.load(root / "train.npz") as archive:
            values = {name: archive[name] for name in archive.files}
        edit(values, rng)
        write_arrays(root, values)

    return change


def flip(array: np.ndarray, rng: np.random.Generator) -> None:
    """One bit of an array."""
    array.flat[rng.integers(array.size)] ^= 1


ARRAYS: dict[str, Change] = {
    "a pixel by a bit": edit_arrays(lambda v, rng: flip(v["image"], rng)),
    "a label": edit_arrays(lambda v, rng: flip(v["label"], rng)),
    "two rows swapped": edit_arrays(lambda v, rng: v.update(image=v["image"][[1, 0, *range(2, 12)]])),
    "a row removed": edit_arrays(lambda v, rng: v.update({k: a[1:] for k, a in v.items()})),
    "names given to the classes": edit_arrays(lambda v, rng: v.update(class_names=np.array(["x", "y", "z"]))),
    "touched": of_files(".npz")["touched"],
}


def tars(root: Path, rng: np.random.Generator) -> None:
    """Tars of pairs."""
    root.mkdir()
    for t in range(3):
        members = [(f"{t}{i}", content(rng), f"caption {t} {i}".encode()) for i in range(4)]
        write_tar(root / f"{t:05d}.tar", members)


def write_tar(path: Path, members: list[tuple[str, bytes, bytes]]) -> None:
    """A tar of (key, picture, caption)."""
    with tarfile.open(path, "w") as tar:
        for key, image, caption in members:
            for suffix, data in (("jpg", image), ("txt", caption)):
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def edit_tar(edit: Callable[[list, np.random.Generator], object]) -> Change:
    """A change of the pairs of one tar."""

    def change(root: Path, rng: np.random.Generator) -> None:
        (path,) = some(root, rng, ".tar")
        with tarfile.open(path) as tar:
            data = {m.name: tar.extractfile(m).read() for m in tar.getmembers()}
        members = [(k[:-4], v, data[f"{k[:-4]}.txt"]) for k, v in data.items() if k.endswith(".jpg")]
        edit(members, rng)
        write_tar(path, members)

    return change


TARS: dict[str, Change] = {
    "tars swapped": lambda root, rng: swap_names(*some(root, rng, ".tar", 2)),
    "a tar added": lambda root, rng: write_tar(root / "00009.tar", [("9", content(rng), b"new")]),
    "a tar removed": lambda root, rng: some(root, rng, ".tar")[0].unlink(),
    "a caption, as long as before": edit_tar(lambda m, rng: m.__setitem__(1, (*m[1][:2], m[1][2].swapcase()))),
    "a picture, as large as before": edit_tar(
        lambda m, rng: m.__setitem__(1, (m[1][0], rng.bytes(len(m[1][1])), m[1][2]))
    ),
    "a pair removed": edit_tar(lambda m, rng: m.pop(1)),
    "two pairs swapped": edit_tar(lambda m, rng: m.insert(0, m.pop(1))),
    "a key renamed": edit_tar(lambda m, rng: m.__setitem__(1, ("renamed", *m[1][1:]))),
    "touched": of_files(".tar")["touched"],
}  # fmt: skip


def swap_names(a: Path, b: Path) -> None:
    """Each file gets the other's name."""
    other = a.with_name("other")
    a.rename(other)
    b.rename(a)
    other.rename(b)


def coco(root: Path, rng: np.random.Generator) -> None:
    """Images with captions."""
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(8)]
    notes = [{"id": i, "image_id": i % 8, "caption": f"caption {i}"} for i in range(16)]
    (root / "annotations/captions_train.json").write_text(json.dumps({"images": images, "annotations": notes}))
    for image in images:
        (root / "train" / image["file_name"]).write_bytes(content(rng))


def edit_json(name: str, edit: Callable[[dict], object]) -> Change:
    """A change of the file `name`."""

    def change(root: Path, rng: np.random.Generator) -> None:
        (path,) = files(root, name)
        value = json.loads(path.read_text())
        edit(value)
        path.write_text(json.dumps(value))

    return change


COCO: dict[str, Change] = {
    **of_files(".jpg"),
    "a caption": edit_json("captions_train.json", lambda v: v["annotations"][3].update(caption="another one")),
    "a caption moved": edit_json("captions_train.json", lambda v: v["annotations"][3].update(image_id=1)),
    "a caption removed": edit_json("captions_train.json", lambda v: v["annotations"].pop(3)),
    "an image removed": edit_json("captions_train.json", lambda v: v["images"].pop(3)),
    "the order of the images": edit_json("captions_train.json", lambda v: v["images"].reverse()),
}


KINDS: dict[str, tuple[Callable[[Path, np.random.Generator], None], dict[str, Change]]] = {
    "folder": (folder, FOLDER),
    "numpy": (arrays, ARRAYS),
    "tars": (tars, TARS),
    "coco_captions": (coco, COCO),
}


def provenance(kind: str, root: Path) -> Provenance:
    """What a run keeps of the dataset."""
    config = Config(name="attack", model=ViTConfig(), task=ClassificationConfig())
    config.train.steps, config.data.shuffle = 100, False
    more = {"split": ""} if kind == "folder" else {}
    config.data.train = (kinds.KINDS[kind](path=str(root), **more),)
    return provenance_of(config, [open_source(s) for s in config.data.train])


def attack(kind: str, name: str, rng: np.random.Generator, base: Path) -> str:
    """Make a dataset, change it, compare; the line that a person would get, or ""."""
    make, ways = KINDS[kind]
    root = base / "data"
    make(root, rng)
    old = provenance(kind, root)
    if name == HARMLESS[0]:
        root = root.rename(base / "elsewhere")
    else:
        ways[name](root, rng)
    try:
        changes(old, provenance(kind, root), Path("runs/attack"))
    except UserError as error:
        return str(error)
    return ""


def main() -> int:
    """Attack, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=200, help="number of changes, over all formats (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    parser.add_argument("--show", action="store_true", help="print one line per kind of change")
    asked = parser.parse_args()
    ways = [(kind, name) for kind, (_, of) in KINDS.items() for name in (*of, HARMLESS[0])]
    tried, noticed = collections.Counter(), collections.Counter()
    for i in range(asked.changes):
        way = ways[i % len(ways)]
        with tempfile.TemporaryDirectory() as base:
            line = attack(*way, np.random.default_rng([asked.seed, i]), Path(base))
        tried[way] += 1
        noticed[way] += bool(line)
        if asked.show and tried[way] == 1:
            print(f"{way[0]}, {way[1]}: {line or 'goes on'}")
    wrong = 0
    for way, count in tried.items():
        expected = 0 if way[1] in (*HARMLESS, *KNOWN) else count
        verdict = "" if noticed[way] == expected else "  WRONG"
        wrong += bool(verdict)
        print(f"{way[0]:14} {way[1]:32} noticed {noticed[way]:3} of {count:3}{verdict}")

    def total(names: Callable[[str], bool]) -> str:
        chosen = [way for way in tried if names(way[1])]
        return f"{sum(noticed[way] for way in chosen)} of {sum(tried[way] for way in chosen)} noticed"

    print(f"changes of records: {total(lambda name: name not in (*HARMLESS, *KNOWN))}")
    print(f"files overwritten by as many bytes, which nothing reads: {total(lambda name: name in KNOWN)}")
    print(f"no change of a record: {total(lambda name: name in HARMLESS)}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
