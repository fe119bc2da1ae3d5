"""Use a trained model on images.

    visionfm embed runs/swinv2_g_clip photos/ --out=photos.npz
    visionfm embed runs/swinv2_g_clip photos/ --out=photos_index/ --process=0/4
    visionfm search runs/swinv2_g_clip photos/ --text='a dog on a beach' --picture=found.png
    visionfm search runs/swinv2_g_clip --index=photos.npz --text='a dog on a beach'
    visionfm classify runs/swinv2_g_clip photos/ --names=cat,dog,bird
    visionfm caption runs/aurora_xl photos/ --out=captions.json
    visionfm detect runs/vit_huge_coco photos/ --out=found.json --picture=found.png
    visionfm segment runs/vit_huge_ade20k photos/ --out=maps/ --picture=maps.png

The first argument is the folder of a run, or of a model of timm, Hugging Face or OpenCLIP. The others are image files,
folders (all images below them) or patterns such as 'photos/*.jpg'. An image that cannot be read is named in a warning;
its row holds NaN or null.

embed writes one file, .npz or .parquet, or, into a folder, parts of 4,096 images each. When the command is stopped and
started again, the parts that are there are kept. Several processes, each with its own --process=I/N, share the work.

detect writes COCO's JSON, with a score for each object; files are named below the folder that all images share.
segment writes a PNG for each image, whose values are the numbers of classes, and names.txt, their names in order: a
folder of maps that training reads, too.
"""

from __future__ import annotations

import functools
import glob
import itertools
import json
import os
import sys
import textwrap
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from visionfm_jax import index
from visionfm_jax.api import Model, load
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.images import opened
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES
from visionfm_jax.errors import ConfigError, DataError, UserError, entry_point, printable
from visionfm_jax.evals.metrics import best
from visionfm_jax.storage import read, replacing
from visionfm_jax.telemetry import pictures
from visionfm_jax.telemetry.report import DPI, GREY, INK, drawable, save

SIDE = 192  # pixels, of an image in a picture
PICTURED = 24  # images in a picture
ROWS_AT_ONCE = 256  # images whose maps are in memory


def images_of(words: Sequence[str]) -> list[str]:
    """The image files that are named: files, all below folders, patterns; each once, in order.

    Raises:
      DataError: there is no such file, or no image.
    """
    found: dict[str, None] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            below = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            if not below:
                raise DataError(f"{printable(word)}: no image below this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
        elif path.is_file():
            below = [word]
        elif not (below := sorted(p for p in glob.glob(word, recursive=True) if Path(p).is_file())):
            raise DataError(
                f"{printable(word)}: there is no such file or folder, and nothing that fits it as a pattern"
            )
        found |= dict.fromkeys(below)
    return list(found)


def embed(model: Model, arguments: Namespace) -> None:
    """Embeddings, or with --features what the backbone makes of images."""
    names, out = _needed(arguments.images), Path(arguments.out)
    share = _share(arguments.process, out)
    about = {"model": model.config.name, "weights": model.config.folder, "step": model.step}
    about |= {"features": arguments.features}
    index.write_index(out, names, model.features if arguments.features else model.embed_images, about, share)
    print(f"{len(names):,} images: {arguments.out}")


def _share(word: str, out: Path) -> tuple[int, int]:
    """(i, n) of --process=i/n."""
    first, _, count = word.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--process={printable(word)}: is not I/N, such as 0/4 for the first of four; give that")
    if int(count) > 1 and out.suffix:
        raise ConfigError(f"--out={printable(str(out))}: is one file, which one process writes; name a folder")
    return int(first), int(count)


def search(model: Model, arguments: Namespace) -> None:
    """The images that fit a text, or another image, best."""
    if bool(arguments.text) == bool(arguments.image):
        raise ConfigError("search needs --text=TEXT or --image=FILE; give one of them")
    if bool(arguments.index) == bool(arguments.images):
        raise ConfigError("search needs images, or --index=FILE of visionfm embed; give one of them")
    names, rows = index.read_index(arguments.index) if arguments.index else _indexed(model, arguments.images)
    query = model.embed_texts(arguments.text) if arguments.text else model.embed_images(arguments.image)
    if not np.isfinite(query).all():
        raise DataError(f"--image={arguments.image}: cannot be read")
    if rows.shape[1] != query.shape[1]:
        raise DataError(
            f"--index={arguments.index}: has rows of {rows.shape[1]} numbers, and embeddings of this model have "
            f"{query.shape[1]}; make it with this run"
        )
    (found_at,), (score,) = best(query, rows, min(arguments.count, len(names)))
    for place, (i, cosine) in enumerate(zip(found_at, score, strict=True), 1):
        print(f"{place:4}  {cosine:6.3f}  {printable(names[i])}")
    found = [{"image": names[i], "cosine": float(cosine)} for i, cosine in zip(found_at, score, strict=True)]
    _write_json(arguments.out, found)
    about = arguments.text or arguments.image
    labels = [f"{cosine:.3f}" for cosine in score]
    _draw(arguments.picture, lambda path: _contact_sheet([names[i] for i in found_at], labels, path, about))


def classify(model: Model, arguments: Namespace) -> None:
    """The likeliest classes of each image."""
    names = _needed(arguments.images)
    classes = [name.strip() for name in arguments.names.split(",")] if arguments.names else None
    prompts = {"prompts": arguments.prompts} if arguments.prompts else {}
    found = model.classify(names, classes, **prompts).best(arguments.count)
    for name, classes_of in zip(names, found, strict=True):
        print(f"{printable(name)}: " + (", ".join(f"{k} {100 * p:.1f} %" for k, p in classes_of) or "cannot be read"))
    _write_json(arguments.out, {name: dict(f) or None for name, f in zip(names, found, strict=True)})


def caption(model: Model, arguments: Namespace) -> None:
    """A text for each image."""
    names = _needed(arguments.images)
    found = model.caption(names)
    for name, text in zip(names, found, strict=True):
        print(f"{printable(name)}: {'cannot be read' if text is None else printable(text)}")
    _write_json(arguments.out, dict(zip(names, found, strict=True)))


def detect(model: Model, arguments: Namespace) -> None:
    """The objects of each image, as COCO's JSON."""
    names = _needed(arguments.images)
    found = model.detect(names, arguments.least_score)
    images, notes, files = [], [], _below(names)
    for name, objects in _there(names, found):
        height, width = objects.size
        images.append({"id": len(images), "file_name": files[name], "height": height, "width": width})
        for (left, top, right, bottom), label, score in zip(
            objects.boxes.tolist(), objects.labels.tolist(), objects.scores.tolist(), strict=True
        ):
            width, height = right - left, bottom - top
            note = {"id": len(notes) + 1, "image_id": images[-1]["id"], "category_id": label + 1, "score": score}
            notes.append(note | {"bbox": [left, top, width, height], "area": width * height, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in enumerate(model.class_names, 1)]
    _write_json(arguments.out, {"images": images, "annotations": notes, "categories": categories})
    print(f"{len(notes):,} objects of score {arguments.least_score:g} or more in {len(images):,} images")

    def draw(path: str) -> None:
        shown = []
        for name, objects in itertools.islice(_there(names, found), PICTURED):
            image = _small(name)
            scale = image.shape[0] / objects.size[0]
            boxes = {"boxes": objects.boxes * scale, "names": objects.names, "scores": objects.scores}
            shown.append({"image": image, "key": Path(name).name, **boxes})
        pictures.detections(shown, path, model.config.name)

    _draw(arguments.picture, draw)


def segment(model: Model, arguments: Namespace) -> None:
    """A map of classes for each image."""
    names = _needed(arguments.images)
    folder, maps = Path(arguments.out), _map_names(names)
    dtype = np.uint8 if len(model.class_names) <= 255 else np.uint16
    shown, count = [], 0
    for first in range(0, len(names), ROWS_AT_ONCE):
        part = names[first : first + ROWS_AT_ONCE]
        for name, found in _there(part, model.segment(part)):
            if len(shown) < PICTURED:
                image = _small(name)
                rows, columns = (np.arange(n) * m // n for n, m in zip(image.shape, found.shape, strict=False))
                shown.append({"image": image, "key": Path(name).name, "map": found[np.ix_(rows, columns)]})
            _write(arguments.out, folder / maps[name], functools.partial(_png, found.astype(dtype)))
            count += 1
    _write(arguments.out, folder / "names.txt", lambda file: file.write("\n".join([*model.class_names, ""]).encode()))
    print(f"{count:,} maps of {len(model.class_names)} classes: {folder}")
    _draw(arguments.picture, lambda path: pictures.areas(shown, model.class_names, path, model.config.name))


class Command(NamedTuple):
    """One of this module: what it does, what `--out` ends in, and whether that must be given."""

    run: Callable[[Model, Namespace], None]
    ending: str
    writes: bool = False


COMMANDS = {
    "embed": Command(embed, "", writes=True),
    "search": Command(search, ".json"),
    "classify": Command(classify, ".json"),
    "caption": Command(caption, ".json"),
    "detect": Command(detect, ".json"),
    "segment": Command(segment, "", writes=True),
}


def _there(names: Sequence[str], found: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The images that could be read, and what was found."""
    return ((name, one) for name, one in zip(names, found, strict=True) if one is not None)


def _below(names: Sequence[str]) -> dict[str, str]:
    """The path of each image below the folder that all of them share."""
    base = os.path.commonpath([os.path.abspath(os.path.dirname(name)) for name in names])
    return {name: os.path.relpath(name, base) for name in names}


def _map_names(names: Sequence[str]) -> dict[str, str]:
    """The file of each image's map, as the image's but for the ending."""
    maps = {name: os.path.splitext(file)[0] + ".png" for name, file in _below(names).items()}
    owners: dict[str, str] = {}
    for name, file in maps.items():
        if (other := owners.setdefault(file, name)) != name:
            raise ConfigError(f"{printable(other)} and {printable(name)} would share the map {file}; rename one")
    return maps


def _needed(words: Sequence[str]) -> list[str]:
    if not words:
        raise ConfigError("no images are given; name files, folders or patterns")
    return images_of(words)


def _indexed(model: Model, words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    names = images_of(words)
    return names, model.embed_images(names)


def _write(field: str, path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, open(part, "wb") as file:
            write(file)
    except OSError as error:
        raise UserError(f"--out={field}: {error.strerror or error}; name one that can be written") from error


def _png(values: np.ndarray, file: BinaryIO) -> None:
    Image.fromarray(values).save(file, "PNG")


def _write_json(path: str, value: Any) -> None:
    if path:
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        _write(path, Path(path), lambda file: file.write(text.encode()))


def _draw(path: str, draw: Callable[[str], None]) -> None:
    if path:
        try:
            draw(path)
        except OSError as error:
            raise UserError(f"--picture={path}: {error.strerror or error}; name one that can be written") from error
        print(f"picture: {path}")


def _contact_sheet(names: Sequence[str], labels: Sequence[str], path: str, title: str) -> None:
    """Images in order, five in a row."""
    rows = -(-len(names) // 5)
    figure = Figure(figsize=(10, 0.6 + 2.3 * rows), dpi=DPI)
    figure.text(0.02, 1 - 0.3 / (0.6 + 2.3 * rows), drawable(title), color=INK, fontsize=13, va="center")
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        axes = figure.add_axes(
            (i % 5 / 5 + 0.01, 1 - (0.6 + 2.3 * (i // 5 + 1)) / (0.6 + 2.3 * rows), 0.18, 2 / (0.6 + 2.3 * rows))
        )
        axes.set_axis_off()
        axes.imshow(_small(name))
        axes.set_title(drawable(textwrap.shorten(f"{label}  {Path(name).name}", 30)), fontsize=8, color=GREY)
    save(figure, path)


def _small(name: str) -> np.ndarray:
    """An image with at most `SIDE` pixels along its longer side."""
    with opened(read(Path(name).read_bytes, lambda: name)) as picture:
        scale = min(1.0, SIDE / max(picture.size))
        size = tuple(max(1, round(scale * side)) for side in picture.size)
        return picture.parts([((0, 0, *picture.size), size)], exact=True)[0]


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.predict", mode: str = "") -> None:
    """Load the run, predict, write."""
    parser = Parser(program, __doc__)
    if not mode:
        parser.add_argument("command", choices=sorted(COMMANDS))
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("images", nargs="*", help="files, folders or patterns")
    parser.add_argument(
        "--out", default="", help="file to write, .npz, .parquet or .json; embed, segment: or a folder; see above"
    )
    parser.add_argument("--picture", default="", help="PNG to draw: search, detect, segment")
    parser.add_argument("--features", action="store_true", help="embed: features of the backbone")
    parser.add_argument("--text", default="", help="search: what is looked for")
    parser.add_argument("--image", default="", help="search: an image like those that are looked for")
    parser.add_argument("--process", default="0/1", help="embed: I/N, of a folder, this of N processes (%(default)s)")
    parser.add_argument("--index", default="", help="search: what embed has written, in place of images")
    parser.add_argument("--names", default="", help="classify: names of classes, separated by commas")
    parser.add_argument("--prompts", default="", help="classify: a text with {}, or a file of such texts")
    parser.add_argument("--least_score", type=float, default=0.3, help="detect: of an object (%(default)s)")
    parser.add_argument("--count", type=int, default=5, help="search, classify: how many answers (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise ConfigError(f"--count={arguments.count}: must be 1 or more")
    mode = mode or arguments.command
    command = COMMANDS[mode]
    if mode == "embed":
        index.check_name(arguments.out)
    if (arguments.out or command.writes) and not (arguments.out and arguments.out.endswith(command.ending)):
        what = f"a file {command.ending}" if command.ending else "a folder"
        raise ConfigError(f"--out={arguments.out}: {mode} writes {what}; name one")
    command.run(load(arguments.run), arguments)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
