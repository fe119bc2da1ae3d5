"""Use a trained model on images.

    visionfm embed runs/swinv2_g_clip photos/ --out=photos.npz
    visionfm embed runs/swinv2_g_clip photos/ --out=photos_index/ --process=0/4
    visionfm embed runs/swinv2_g_clip tars:/data/laion --out=laion_index/
    visionfm embed runs/swinv2_g_clip --texts=captions.txt --out=texts.npz
    visionfm search runs/swinv2_g_clip photos/ --text='a dog on a beach' --picture=found.png
    visionfm search runs/swinv2_g_clip --index=photos.npz --text='a dog on a beach'
    visionfm classify runs/swinv2_g_clip photos/ --names=cat,dog,bird
    visionfm caption runs/aurora_xl photos/ --out=captions.json
    visionfm detect runs/vit_huge_coco photos/ --out=found.json --picture=found.png
    visionfm segment runs/vit_huge_ade20k photos/ --out=maps/ --picture=maps.png

The first argument is the folder of a run, or of a model of timm, Hugging Face or OpenCLIP. The others are image files,
folders (all images below them, or all that its tars hold), patterns such as 'photos/*.jpg', or datasets as training
reads them, KIND:PATH, whose images are named KIND:PATH#RECORD KEY. An image that cannot be read is named in a warning;
its row holds NaN or null.

--out is one file (.npz or .parquet of embed, else .json), or, for many images, a folder of parts of 4,096 images each.
When the command is stopped and started again, the parts that are there are kept. Several processes, each with its own
--process=I/N, share the work. Parts are Parquet of embed, else JSON lines, one for each image: {"image": NAME} with
"classes", "caption", "map", or "objects" of "name", "label", "score", "box" (left, top, right, bottom in pixels) and,
of models of masks, "mask" (COCO's RLE).

Of --texts embed takes each line; search --index finds the texts that fit an image in what it has written. detect writes
COCO's JSON into one file, with a score for each object; files are named below the folder that all images share. segment
writes a PNG for each image, whose values are the numbers of classes, and names.txt, their names in order: a folder of
maps that training reads, too.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from visionfm_jax import index, parts
from visionfm_jax.api import PROMPTS, Detected, Model, NothingRead, load
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.images import DamagedImage, decode_map, opened
from visionfm_jax.data.sources import KINDS, Source, open_images, read_record
from visionfm_jax.data.sources.layout import IMAGE_SUFFIXES
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.errors import ConfigError, DataError, complain, entry_point, printable
from visionfm_jax.inference import Stored, encoded
from visionfm_jax.logs import quiet_logs
from visionfm_jax.storage import not_written, replacing
from visionfm_jax.telemetry import pictures
from visionfm_jax.telemetry.report import DPI, GREY, INK, drawable, save

SIDE = 192  # pixels, of an image in a picture
PICTURED = 24  # images in a picture
LINES = ".jsonl"  # parts of records


def images_of(words: Sequence[str], split: str) -> dict[str, str | Stored]:
    """The images that are named, by name: files, all below folders, patterns, datasets; each once, in order.

    Args:
      words: as people write them.
      split: of datasets; "": the usual one.

    Raises:
      DataError: there is no such file or dataset, or no image.
    """
    found: dict[str, str | Stored] = {}
    for word in words:
        path = Path(word)
        if path.is_dir():
            below = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
            tars = any(path.glob("*.tar"))
            if heic := sum(p.suffix.lower() in (".heic", ".heif") for p in path.rglob("*")):
                complain(f"{printable(word)}: {heic:,} HEIC files are left out; convert them to JPEG, PNG or AVIF")
            if tars:
                found |= _of_dataset(f"tars:{word}", split)
            if not below and not tars:
                raise DataError(f"{printable(word)}: no image below this folder ({', '.join(sorted(IMAGE_SUFFIXES))})")
        elif path.is_file():
            below = [word]
        elif _is_dataset(word):
            below = []
            found |= _of_dataset(word, split)
        elif not (below := sorted(p for p in glob.glob(word, recursive=True) if Path(p).is_file())):
            raise DataError(
                f"{printable(word)}: there is no such file or folder, nothing that fits it as a pattern, and it is no "
                f"KIND:PATH of a dataset ({', '.join(KINDS)})"
            )
        if any(name.endswith(".tar") for name in below):
            raise DataError(f"{printable(word)}: is a tar; name its folder, all of whose tars are read")
        found |= {name: name for name in below}
    return found


def _is_dataset(word: str) -> bool:
    return word.partition(":")[0] in KINDS and ":" in word


def _of_dataset(word: str, split: str) -> dict[str, Stored]:
    """The images of a dataset KIND:PATH, of which captions and labels are not needed."""
    source = _opened(word, split)
    place = f"{word}#" if not split else f"{word}@{split}#"
    return {
        (name := f"{place}{i} {source.key(i)}"): Stored(name, functools.partial(_image, source, i))
        for i in range(len(source))
    }


@functools.cache
def _opened(word: str, split: str) -> Source:
    return open_images(word, split or None)


def _image(source: Source, index: int) -> Any:
    return read_record(source, index)["image"]


def _again(name: str) -> str | Stored:
    """The image that `images_of` has given this name."""
    found = None if Path(name).exists() else re.match(r"(.*?)#(\d+) ", name, re.DOTALL)
    if not found or not _is_dataset(name):
        return name
    word, split = found[1], ""
    if not Path(word.partition(":")[2]).exists() and "@" in word:
        word, _, split = word.rpartition("@")
    return Stored(name, functools.partial(_image, _opened(word, split), int(found[2])))


Images = Mapping[str, str | Stored]  # by name


def embed(model: Model, images: Images, arguments: Namespace) -> None:
    """Embeddings; with --features, or where a model has none, what the backbone makes of images."""
    out = Path(arguments.out)
    by_features = arguments.features or not (arguments.texts or "embeddings" in model.config.task.predictions)
    share, about = _share_of(arguments), _about(model, features=by_features)
    if arguments.texts:
        texts = read_lines(arguments.texts)
        index.write_index(out, texts, model.embed_texts, about, share, "texts")
        print(f"{len(texts):,} texts: {arguments.out}")
        return
    make, lost = model.features if by_features else model.embed_images, 0

    def rows(names: Sequence[str]) -> np.ndarray:
        nonlocal lost
        try:
            found = make([images[name] for name in names])
            lost += int(np.isnan(found).any(1).sum())
            return found
        except NothingRead:
            if parts.is_file(out, index.FORMS):
                raise
            lost += len(names)
            width = make(np.zeros((8, 8, 3), np.uint8)).shape[1]  # a part of many, which has its place
            return np.full((len(names), width), np.nan, np.float32)

    index.write_index(out, list(images), rows, about, share)
    left = f" ({lost:,} of them could not be read: NaN)" if lost else ""
    print(f"{len(images):,} images{left}: {arguments.out}")


def _about(model: Model, **settings: Any) -> dict[str, Any]:
    """What results depend on beside the images."""
    return {"model": model.digest, "preprocess": model.transform.settings, **settings}


def _share(word: str, out: str, has_parts: bool) -> tuple[int, int]:
    """(i, n) of --process=i/n."""
    first, _, count = word.partition("/")
    if not (first.isdecimal() and count.isdecimal() and int(first) < int(count)):
        raise ConfigError(f"--process={printable(word)}: is not I/N, such as 0/4 for the first of four; give that")
    if int(count) > 1 and not has_parts:
        raise ConfigError(f"--out={printable(out)}: is no folder of parts, which several processes share; name one")
    return int(first), int(count)


def _share_of(arguments: Namespace) -> tuple[int, int]:
    return _share(arguments.process, arguments.out, _has_parts(arguments))


Records = list[dict[str, Any]]


def _records(
    make: Callable[[Images], Records],
    images: Images,
    arguments: Namespace,
    about: dict[str, Any],
    there: Callable[[dict[str, Any]], bool] = lambda record: True,
) -> Records | None:
    """What `make` finds in images, a record for each. None: a line for each is in the parts of a folder, --out.

    `there` says of a record of a finished part whether what belongs to it is still there.
    """
    if not _has_parts(arguments):
        return make(images)

    def is_whole(path: Path, names: Sequence[str]) -> bool:
        found = [json.loads(line) for line in path.read_text().splitlines()]
        return [record["image"] for record in found] == list(map(parts.utf8, names)) and all(map(there, found))

    share = _share_of(arguments)
    for path, names in parts.missing(Path(arguments.out), list(images), about, share, LINES, is_whole):
        found = make({name: images[name] for name in names})
        lines = "".join(json.dumps({**record, "image": parts.utf8(record["image"])}) + "\n" for record in found)
        parts.write(path, lambda file, lines=lines: file.write(lines.encode()))
    print(f"{len(images):,} images: {arguments.out}")
    return None


def _has_parts(arguments: Namespace) -> bool:
    """Whether --out is a folder of parts."""
    return bool(arguments.out) and not parts.is_file(arguments.out, COMMANDS[arguments.command].forms)


def _first_records(out: str) -> Records:
    """Of the first part in a folder, which is whole by now."""
    first = next(iter(sorted(Path(out).glob(f"part-*{LINES}"))), None)
    return [json.loads(line) for line in first.read_text().splitlines()] if first else []


def search(model: Model, images: Images, arguments: Namespace) -> None:
    """The images that fit a text, or another image, best: by embeddings, or by features where a model has none."""
    by_features = not (arguments.text or "embeddings" in model.config.task.predictions)
    make = model.features if by_features else model.embed_images
    if arguments.index:
        about, found = index.open_index(arguments.index)
        wanted = _about(model, features=by_features)
        if different := [name for name in wanted if about.get(name) != wanted[name]]:
            raise DataError(
                f"--index={printable(arguments.index)}: was made otherwise ({', '.join(different)}); make it with this "
                "model by visionfm embed"
            )
    else:
        found = iter([index.Part(list(images), make(images.values()))])
    try:
        query = model.embed_texts(arguments.text) if arguments.text else make(arguments.image)
    except NothingRead as error:
        raise DataError(f"--image={printable(arguments.image)}: cannot be read; the warning says why") from error
    ranked = index.search_index(found, query, arguments.count)
    if not ranked:
        raise DataError("not one of the images could be read when they were embedded: there is nothing to find")
    for place, (name, cosine) in enumerate(ranked, 1):
        print(f"{place:4}  {cosine:6.3f}  {printable(name)}")
    _write_json(arguments.out, [{"image": name, "cosine": cosine} for name, cosine in ranked])
    names, labels = [name for name, _ in ranked], [f"{cosine:.3f}" for _, cosine in ranked]
    _draw(arguments.picture, lambda path: _contact_sheet(names, labels, path, arguments.text or arguments.image))


def classify(model: Model, images: Images, arguments: Namespace) -> None:
    """The likeliest classes of each image."""
    classes, prompts = _class_names(arguments.names), arguments.prompts or PROMPTS
    prompts = (prompts,) if "{}" in prompts else read_lines(prompts)

    def make(some: Images) -> Records:
        try:
            best = model.classify(some.values(), classes, prompts).best(arguments.count)
        except NothingRead:
            if not _has_parts(arguments):
                raise
            best = [[] for _ in some]
        return [{"image": name, "classes": dict(found) or None} for name, found in zip(some, best, strict=True)]

    about = _about(model, classes=classes, prompts=prompts if classes else None, count=arguments.count)
    if (records := _records(make, images, arguments, about)) is None:
        return
    for record in records:
        classes_of = ", ".join(f"{k} {100 * p:.1f} %" for k, p in (record["classes"] or {}).items())
        print(f"{printable(record['image'])}: {classes_of or 'cannot be read'}")
    _write_json(arguments.out, {record["image"]: record["classes"] for record in records})


def _class_names(word: str) -> tuple[str, ...] | None:
    """Of --names: separated by commas, or a list as `text_lists.read_lines` takes it; None: not given.

    Raises:
      ConfigError: one is blank or there twice, or a single word is no list.
    """
    if not word:
        return None
    try:
        names = tuple(name.strip() for name in word.split(",")) if "," in word else read_lines(word)
    except DataError as error:
        raise ConfigError(f"--names={printable(word)}: has no comma and is no list: {error}") from error
    if "" in names or len(set(names)) < len(names):
        what = "a blank name" if "" in names else f"{printable(max(names, key=names.count))} twice"
        raise ConfigError(f"--names={printable(word)}: has {what}; give each class one name of its own")
    return names


def caption(model: Model, images: Images, arguments: Namespace) -> None:
    """A text for each image."""

    def make(some: Images) -> Records:
        return [{"image": name, "caption": text} for name, text in zip(some, model.caption(some.values()), strict=True)]

    if (records := _records(make, images, arguments, _about(model))) is None:
        return
    for record in records:
        text = record["caption"]
        print(f"{printable(record['image'])}: {'cannot be read' if text is None else printable(text)}")
    _write_json(arguments.out, {record["image"]: record["caption"] for record in records})


def detect(model: Model, images: Images, arguments: Namespace) -> None:
    """The objects of each image: as COCO's JSON, or a line for each image."""

    def make(some: Images) -> Records:
        return [
            {"image": name, **_objects(found)}
            for name, found in zip(some, model.detect(some.values(), arguments.least_score), strict=True)
        ]

    records = _records(make, images, arguments, _about(model, least_score=arguments.least_score))
    if records is not None:
        read_ones = [record for record in records if record["objects"] is not None]
        coco = _coco(read_ones, _below(images), model.class_names)
        _write_json(arguments.out, coco)
        count = len(coco["annotations"])
        print(f"{count:,} objects of score {arguments.least_score:g} or more in {len(read_ones):,} images")

    def draw(path: str) -> None:
        shown, stored = [], {**{parts.utf8(name): image for name, image in images.items()}, **images}
        for record in _first_records(arguments.out) if records is None else records:
            if record["objects"] is not None and len(shown) < PICTURED:
                image = _small(stored[record["image"]])
                scale, objects = image.shape[0] / record["height"], record["objects"]
                boxes = np.array([one["box"] for one in objects]).reshape(-1, 4) * scale
                names, scores = [one["name"] for one in objects], np.array([one["score"] for one in objects])
                name = Path(record["image"]).name
                shown.append({"image": image, "key": name, "boxes": boxes, "names": names, "scores": scores})
        pictures.detections(shown, path, model.config.name)

    _draw(arguments.picture, draw)


def _objects(found: Detected | None) -> dict[str, Any]:
    """Of an image, in plain values; boxes are left, top, right and bottom edge."""
    if found is None:
        return {"height": None, "width": None, "objects": None}
    values = zip(found.names, found.labels.tolist(), found.scores.tolist(), found.boxes.tolist(), strict=True)
    objects = [dict(zip(("name", "label", "score", "box"), each, strict=True)) for each in values]
    for one, mask in zip(objects, found.masks or (), strict=False):
        one["mask"] = {"size": list(mask["size"]), "counts": _text(mask["counts"])}
    return {"height": found.size[0], "width": found.size[1], "objects": objects}


def _text(counts: str | bytes) -> str:
    return counts.decode() if isinstance(counts, bytes) else counts


def _coco(records: Records, files: Mapping[str, str], class_names: Sequence[str]) -> dict[str, Any]:
    """COCO's JSON, with a score for each object."""
    entries, notes = [], []
    for number, record in enumerate(records):
        size = {"height": record["height"], "width": record["width"]}
        entries.append({"id": number, "file_name": files[record["image"]], **size})
        for found in record["objects"]:
            left, top, right, bottom = found["box"]
            width, height = right - left, bottom - top
            note = {"id": len(notes) + 1, "image_id": number, "category_id": found["label"] + 1}
            note |= {"score": found["score"], "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0}
            notes.append(note | ({"segmentation": found["mask"]} if "mask" in found else {}))
    categories = [{"id": i, "name": name} for i, name in enumerate(class_names, 1)]
    return {"images": entries, "annotations": notes, "categories": categories}


def segment(model: Model, images: Images, arguments: Namespace) -> None:
    """A map of classes for each image, and a line that names it."""
    folder, maps = Path(arguments.out), _map_names(images)
    dtype = np.uint8 if len(model.class_names) <= 255 else np.uint16  # whose largest value is no class

    def make(some: Images) -> Records:
        records = []
        for name, found in zip(some, model.iterate_segment(some.values()), strict=True):
            if found is not None:
                values = np.where(found < 0, np.iinfo(dtype).max, found).astype(dtype)
                _write(arguments.out, folder / maps[name], functools.partial(_png, values))
            records.append({"image": name, "map": None if found is None else maps[name]})
        return records

    _records(
        make,
        images,
        arguments,
        _about(model),
        lambda record: record["map"] is None or (folder / record["map"]).is_file(),
    )
    _write(arguments.out, folder / "names.txt", lambda file: file.write("\n".join([*model.class_names, ""]).encode()))

    def draw(path: str) -> None:
        shown, stored = [], {**{parts.utf8(name): image for name, image in images.items()}, **images}
        for record in _first_records(arguments.out):
            if record["map"] is not None and len(shown) < PICTURED:
                image, found = _small(stored[record["image"]]), decode_map((folder / record["map"]).read_bytes())
                rows, columns = (np.arange(n) * m // n for n, m in zip(image.shape, found.shape, strict=False))
                name = Path(record["image"]).name
                shown.append({"image": image, "key": name, "map": found[np.ix_(rows, columns)].astype(np.int32)})
        pictures.areas(shown, model.class_names, path, model.config.name)

    _draw(arguments.picture, draw)


class Command(NamedTuple):
    """One of this module: what it does, the endings of a file that `--out` may be, and how."""

    run: Callable[[Model, Images, Namespace], None]
    forms: tuple[str, ...]
    writes: bool = False  # --out must be given
    parts: bool = True  # --out may be a folder of parts


COMMANDS = {
    "embed": Command(embed, index.FORMS, writes=True),
    "search": Command(search, (".json",), parts=False),
    "classify": Command(classify, (".json",)),
    "caption": Command(caption, (".json",)),
    "detect": Command(detect, (".json",)),
    "segment": Command(segment, (), writes=True),
}


def _below(images: Images) -> dict[str, str]:
    """The path of each file below the folder that all of them share; of a record, its key."""
    files = [name for name, image in images.items() if isinstance(image, str)]
    base = os.path.commonpath([os.path.abspath(os.path.dirname(name)) for name in files]) if files else ""
    keys = {name: name.partition("#")[2].partition(" ")[2] for name in images}
    return {name: keys[name] if isinstance(images[name], Stored) else os.path.relpath(name, base) for name in images}


def _map_names(images: Images) -> dict[str, str]:
    """The file of each image's map, as the image's but for the ending."""
    maps = {name: os.path.splitext(file)[0] + ".png" for name, file in _below(images).items()}
    for name, file in maps.items():
        if os.path.isabs(file) or ".." in Path(file).parts:  # a tar may name its members so
            raise DataError(f"{printable(name)}: its map {printable(file)} would be outside --out; rename the record")
    owners: dict[str, str] = {}
    for name, file in maps.items():
        if (other := owners.setdefault(file, name)) != name:
            raise ConfigError(f"{printable(other)} and {printable(name)} would share the map {file}; rename one")
    return maps


def _check(mode: str, arguments: Namespace) -> None:
    """Refuse what does not go together, before any work.

    Raises:
      ConfigError: something does not.
    """
    command, out = COMMANDS[mode], arguments.out
    if command.parts and (command.writes or out):
        parts.check_out(out, command.forms)
    elif out and not out.endswith(command.forms):
        raise ConfigError(f"--out={printable(out)}: {mode} writes a file {' or '.join(command.forms)}; name one")
    if command.parts:
        _share_of(arguments)
    for field, least, most in (("count", 1, 2**31), ("least_score", 0, 1)):
        if field in arguments and not least <= getattr(arguments, field) <= most:
            raise ConfigError(f"--{field}={getattr(arguments, field)}: must be from {least} to {most:,}")
    if mode == "classify":
        _class_names(arguments.names)
    if (picture := getattr(arguments, "picture", "")) and not picture.lower().endswith(".png"):
        raise ConfigError(f"--picture={printable(picture)}: a PNG is drawn; name a file .png")
    if mode == "search" and bool(arguments.text) == bool(arguments.image):
        raise ConfigError("search needs --text=TEXT or --image=FILE; give one of them")
    if mode == "search" and bool(arguments.index) == bool(arguments.images):
        raise ConfigError("search needs images, or --index=FILE of visionfm embed; give one of them")
    if mode == "embed" and arguments.texts and (arguments.images or arguments.features):
        raise ConfigError(f"--texts={printable(arguments.texts)}: leave images and --features out")
    others = {"search": "index", "embed": "texts"}  # in place of images
    if not (arguments.images or getattr(arguments, others.get(mode, ""), "")):
        raise ConfigError("no images are given; name files, folders, patterns or datasets (KIND:PATH)")
    if out:
        parts.check_writable(Path(out))


def _write(field: str, path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file, whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part, open(part, "wb") as file:
            write(file)
    except OSError as error:
        raise not_written(f"--out={printable(field)}", error) from error


def _png(values: np.ndarray, file: BinaryIO) -> None:
    Image.fromarray(values).save(file, "PNG")


def _write_json(path: str, value: Any) -> None:
    if path:
        text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        _write(path, Path(path), lambda file: file.write(text.encode(errors="replace")))


def _draw(path: str, draw: Callable[[str], None]) -> None:
    if path:
        try:
            draw(path)
        except OSError as error:
            raise not_written(f"--picture={printable(path)}", error) from error
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
        axes.imshow(_small(_again(name)))
        title = f"{label}  {Path(name).name.rpartition('#')[2]}"
        axes.set_title(drawable(title if len(title) <= 28 else f"{title[:27]}…"), fontsize=8, color=GREY)
    save(figure, path)


def _small(image: str | Stored) -> np.ndarray:
    """An image with at most `SIDE` pixels along its longer side; a grey one where it cannot be read any more."""
    try:
        with opened(encoded(image)) as picture:
            scale = min(1.0, SIDE / max(picture.size))
            size = tuple(max(1, round(scale * side)) for side in picture.size)
            return picture.parts([((0, 0, *picture.size), size)], exact=True)[0]
    except (DamagedImage, DamagedRecord) as error:
        complain(f"{printable(str(image))} is not drawn: {error}")
        return np.full((SIDE, SIDE, 3), 200, np.uint8)


FLAGS: dict[str, tuple[str, dict[str, Any]]] = {  # which commands have them, and what argparse knows of them
    "--split": (" ".join(COMMANDS), {"help": "of KIND:PATH, such as test"}),
    "--out": (" ".join(COMMANDS), {"help": "file to write, .npz, .parquet or .json, or a folder of parts; see above"}),
    "--process": (
        "embed classify caption detect segment",
        {"default": "0/1", "help": "I/N: the share of parts that this of N processes makes (%(default)s)"},
    ),
    "--texts": ("embed", {"help": "a file of texts, one a line, in place of images"}),
    "--features": (
        "embed",
        {
            "action": "store_true",
            "default": False,
            "help": "features of the backbone, also where a model has embeddings",
        },
    ),
    "--text": ("search", {"help": "what is looked for"}),
    "--image": ("search", {"help": "an image like those that are looked for"}),
    "--index": ("search", {"help": "what embed has written, in place of images"}),
    "--names": ("classify", {"help": "names of classes, separated by commas, or a file or shipped list of them"}),
    "--prompts": ("classify", {"help": "a text with {}, or a file or shipped list of such texts"}),
    "--count": ("search classify", {"type": int, "default": 5, "help": "how many answers (%(default)s)"}),
    "--least_score": ("detect", {"type": float, "default": 0.3, "help": "of an object (%(default)s)"}),
    "--picture": ("search detect segment", {"help": "PNG to draw"}),
}


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.predict", mode: str = "") -> None:
    """Load the run, predict, write."""
    if not mode:
        first = Parser(program, __doc__)
        first.add_argument("command", choices=COMMANDS, help="and its own arguments; COMMAND --help lists them")
        mode, argv, program = first.parse_args(argv[:1]).command, argv[1:], f"{program} {argv[0]}"
    parser = Parser(program, __doc__)
    parser.set_defaults(command=mode)
    parser.add_argument("run", help="folder of a run, or of a model of timm, Hugging Face or OpenCLIP")
    parser.add_argument("images", nargs="*", help="files, folders, patterns, or datasets KIND:PATH")
    for name, (commands, about) in FLAGS.items():
        if mode in commands.split():
            parser.add_argument(name, **{"default": "", **about})
    arguments = parser.parse_args(argv)
    quiet_logs()
    _check(mode, arguments)
    images = images_of(arguments.images, arguments.split)
    if arguments.split and not any(isinstance(image, Stored) for image in images.values()):
        raise ConfigError(f"--split={printable(arguments.split)}: is of datasets KIND:PATH, and there is none")
    COMMANDS[mode].run(load(arguments.run), images, arguments)


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
