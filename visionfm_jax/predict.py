"""Use a trained model on images.

    visionfm embed runs/swinv2_g_clip photos/ --out=photos.npz
    visionfm search runs/swinv2_g_clip photos/ --text='a dog on a beach' --out=found.png
    visionfm search runs/swinv2_g_clip --index=photos.npz --text='a dog on a beach'
    visionfm classify runs/swinv2_g_clip photos/ --names=cat,dog,bird
    visionfm caption runs/aurora_xl photos/ --out=captions.json

The first argument is the folder of a run. The others are image files, folders (all images below them) or patterns such
as 'photos/*.jpg'. An image that cannot be read is named in a warning; its row holds NaN or null.
"""

from __future__ import annotations

import glob
import json
import sys
import textwrap
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from visionfm_jax.api import Model, load
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.images import opened
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES
from visionfm_jax.errors import ConfigError, DataError, UserError, entry_point, printable
from visionfm_jax.evals.metrics import best
from visionfm_jax.storage import read, replacing, write_text
from visionfm_jax.telemetry.report import DPI, GREY, INK, drawable, save

SIDE = 192  # pixels, of an image in a picture


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
    """Embeddings, or with --features those of the backbone, as arrays `embedding` (N, E) and `name` (N,)."""
    names = _needed(arguments.images)
    rows = model.features(names) if arguments.features else model.embed_images(names)
    _write_arrays(arguments.out, embedding=rows, name=np.array(names))
    print(f"{len(rows):,} rows of {rows.shape[1]:,} numbers: {arguments.out}")


def search(model: Model, arguments: Namespace) -> None:
    """The images that fit a text, or another image, best."""
    if bool(arguments.text) == bool(arguments.image):
        raise ConfigError("search needs --text=TEXT or --image=FILE; give one of them")
    if bool(arguments.index) == bool(arguments.images):
        raise ConfigError("search needs images, or --index=FILE of visionfm embed; give one of them")
    names, rows = _read_index(arguments.index) if arguments.index else _indexed(model, arguments.images)
    query = model.embed_texts(arguments.text) if arguments.text else model.embed_images(arguments.image)
    if not np.isfinite(query).all():
        raise DataError(f"--image={arguments.image}: cannot be read")
    if rows.shape[1] != query.shape[1]:
        raise DataError(
            f"--index={arguments.index}: has rows of {rows.shape[1]} numbers, and embeddings of this model have "
            f"{query.shape[1]}; make it with this run"
        )
    (index,), (score,) = best(query, rows, min(arguments.count, len(names)))
    for place, (i, cosine) in enumerate(zip(index, score, strict=True), 1):
        print(f"{place:4}  {cosine:6.3f}  {printable(names[i])}")
    if arguments.out:
        about = arguments.text or arguments.image
        _contact_sheet([names[i] for i in index], [f"{cosine:.3f}" for cosine in score], arguments.out, about)
        print(f"picture: {arguments.out}")


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


COMMANDS = {"embed": embed, "search": search, "classify": classify, "caption": caption}


def _needed(words: Sequence[str]) -> list[str]:
    if not words:
        raise ConfigError("no images are given; name files, folders or patterns")
    return images_of(words)


def _indexed(model: Model, words: Sequence[str]) -> tuple[list[str], np.ndarray]:
    names = images_of(words)
    return names, model.embed_images(names)


def _read_index(path: str) -> tuple[list[str], np.ndarray]:
    """The names and rows of a file of `embed`."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            names, rows = arrays["name"].tolist(), arrays["embedding"]
        if rows.ndim == 2 and rows.dtype == np.float32 and len(rows) == len(names) > 0:
            return list(map(str, names)), rows
        why = f"its arrays are {rows.dtype} {rows.shape} and {len(names)} names"
    except (OSError, ValueError, KeyError, EOFError) as error:
        why = str(error)
    raise DataError(f"--index={path}: is no file of visionfm embed --out=NAME.npz: {why}")


def _write_arrays(path: str, **arrays: np.ndarray) -> None:
    if not path.endswith(".npz"):
        raise ConfigError(f"--out={path}: must end in .npz")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with replacing(Path(path)) as part, open(part, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror or error}; name a file that can be written") from error


def _write_json(path: str, value: Any) -> None:
    if path:
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_text(Path(path), json.dumps(value, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"--out={path}: {error.strerror or error}; name a file that can be written") from error


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
    try:
        save(figure, path)
    except OSError as error:
        raise UserError(f"--out={path}: {error.strerror or error}; name a file that can be written") from error


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
    parser.add_argument("--out", default="", help="file to write: .npz, .png or .json, see above")
    parser.add_argument("--features", action="store_true", help="embed: features of the backbone")
    parser.add_argument("--text", default="", help="search: what is looked for")
    parser.add_argument("--image", default="", help="search: an image like those that are looked for")
    parser.add_argument("--index", default="", help="search: a file of embed --out=NAME.npz, in place of images")
    parser.add_argument("--names", default="", help="classify: names of classes, separated by commas")
    parser.add_argument("--prompts", default="", help="classify: a text with {}, or a file of such texts")
    parser.add_argument("--count", type=int, default=5, help="search, classify: how many answers (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.count < 1:
        raise ConfigError(f"--count={arguments.count}: must be 1 or more")
    mode = mode or arguments.command
    if mode == "embed" and not arguments.out.endswith(".npz"):
        raise ConfigError(f"--out={arguments.out}: embed writes a file .npz; name one")
    COMMANDS[mode](load(arguments.run), arguments)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
