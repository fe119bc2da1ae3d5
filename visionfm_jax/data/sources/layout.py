"""The format of what a path holds: to open it, and to say which kind would fit where the configured one does not."""

from __future__ import annotations

import dataclasses
from itertools import chain, islice

from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.data.sources.kinds import (
    Ade20kConfig,
    ClassMapsConfig,
    CocoCaptionsConfig,
    CocoConfig,
    CocoPanopticConfig,
    FolderConfig,
    NumpyConfig,
    ParquetConfig,
    TableConfig,
    TarsConfig,
    TfdsConfig,
    VisualGenomeConfig,
    VocConfig,
    YoloConfig,
)
from visionfm_jax.data.sources.places import Place, RemotePath, place_of, scandir
from visionfm_jax.errors import DataError, printable

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".jpx"}
)
VISUAL_GENOME = "region_descriptions.json"  # its captions
_LOOK = 1000  # entries of a folder that are looked at to guess its format


def describe(config: SourceConfig) -> str:
    """A source's name in logs and errors."""
    return printable(f"{config.kind} {config.path}" + (f" [{config.split}]" if config.split else ""))


def check_path(config: SourceConfig) -> Place:
    """`config.path`, which exists and is not an empty folder or file.

    Raises:
      DataError: it is missing or empty.
      OSError: it cannot be read.
    """
    path = place_of(config.path)
    if isinstance(path, RemotePath):
        if not path.exists():
            raise DataError(f"{describe(config)}: the path does not exist; set the dataset's path")
        return path
    if not path.exists():
        parent = next(p for p in path.absolute().parents if p.exists())
        raise DataError(f"{describe(config)}: the path does not exist (but {parent} does); set the dataset's path")
    if (path.is_dir() and not any(path.iterdir())) or (path.is_file() and not path.stat().st_size):
        raise DataError(f"{describe(config)}: the path is empty; set the dataset's path, or fill it")
    return path


def misfit(config: SourceConfig, expected: str) -> DataError:
    """The error for a path that holds something else than `expected`, or names what is there otherwise."""
    found, remedy = _guess(place_of(config.path))
    texts = (field.name for field in dataclasses.fields(config) if isinstance(getattr(config, field.name), str))
    names = [name for name in texts if name not in ("path", "split")]
    if names and remedy.startswith(f"use {type(config).__name__} ") and "named here" not in remedy:
        remedy = f"set the names of files and folders to those that are there ({', '.join(names)})"
    return DataError(f"{describe(config)}: expected {expected}, found {found}; {remedy}")


def no_split(config: SourceConfig, splits: list[str]) -> DataError:
    """The error for a split that is not there."""
    there = ", ".join(splits[:20]) + (" …" if len(splits) > 20 else "")
    return DataError(f"{describe(config)}: no split {config.split!r}; the splits are {there}")


def tfds_versions(path: Place) -> list[Place]:
    """TFDS version folders at `path` or up to three levels below it: data_dir/dataset/config/version."""
    level = [path]
    for _ in range(4):
        if found := [folder for folder in level if (folder / "dataset_info.json").is_file()]:
            return sorted(found)
        entries = (entry for folder in level for entry in _entries(folder))
        level = [entry for entry in islice(entries, _LOOK) if entry.is_dir()]  # bounded: it may be a tree of images
    return []


def splits_of(path: Place, place: str) -> list[str]:
    """What stands for {split} in the files or folders `place` below `path`, sorted."""
    before, split, after = place.partition("{split}")
    if not split:
        return []
    found = (file.relative_to(path).as_posix() for file in path.glob(place.replace("{split}", "*")))
    return sorted(file[len(before) : len(file) - len(after)] for file in found)


def coco_splits(path: Place, of: str = "captions") -> list[str]:
    """Splits of which `path` holds captions, or instances, as COCO's annotations/captions_SPLIT.json, sorted."""
    return sorted(p.stem.removeprefix(f"{of}_") for p in path.glob(f"annotations/{of}_*.json"))


def _coco_elsewhere(path: Place) -> list[str]:
    """JSON files, below `path`, where others than COCO's authors keep what its annotations/instances_SPLIT.json has."""
    found = chain(path.glob("annotations/*.json"), path.glob("*/_annotations.coco.json"))
    return sorted(file.relative_to(path).as_posix() for file in islice(found, _LOOK))


def class_splits(path: Place) -> list[str]:
    """Names of the folders in `path` that hold class folders with images, sorted."""
    return sorted(e.name for e in _entries(path) if any(_has_image(c) for c in _entries(e)[:20]))


def _guess(path: Place) -> tuple[str, str]:
    """What is at `path`, and what to do about it."""
    if path.is_file():
        if path.suffix == ".npz":
            return "an .npz file", _use(NumpyConfig, "split=''")
        if path.suffix == ".tar":
            return "a .tar file", _use(TarsConfig, "its folder as path")
        if path.suffix == ".parquet":
            return "a .parquet file", _use(ParquetConfig, "split=''")
        if path.suffix in (".csv", ".tsv", ".jsonl"):
            return f"a {path.suffix} file", _use(TableConfig)
        return f"a {path.suffix or 'suffixless'} file", "set a folder or an .npz file"
    entries = _entries(path)
    if any(e.suffix == ".npz" for e in entries):
        return "a folder of .npz files", _use(NumpyConfig, "a file's name without .npz as split")
    if tfds_versions(path):
        return "a TFDS directory", _use(TfdsConfig)
    if splits := coco_splits(path):
        return "COCO's captions", _use(CocoCaptionsConfig, _one_of(splits))
    if splits := coco_splits(path, "instances"):
        return "COCO's objects", _use(CocoConfig, _one_of(splits))
    if splits := coco_splits(path, "panoptic"):
        return "COCO's segments", _use(CocoPanopticConfig, _one_of(splits))
    if (path / VISUAL_GENOME).is_file():
        return "Visual Genome", _use(VisualGenomeConfig)
    if (path / "Annotations").is_dir() and (path / "JPEGImages").is_dir():
        return "Pascal VOC", _use(VocConfig)
    if (path / "data.yaml").is_file():
        return "YOLO's files", _use(YoloConfig)
    if (path / "annotations" / "training").is_dir() and (path / "images" / "training").is_dir():
        return "ADE20K", _use(Ade20kConfig)
    if notes := _coco_elsewhere(path):
        where = f"annotations and images as they are named here, such as annotations={notes[0]!r}"
        return "JSON files of annotations", _use(CocoConfig, where)
    if (path / "annotations").is_dir() and (path / "images").is_dir():
        return "images and annotations", _use(ClassMapsConfig)
    if any(_has_image(e) for e in entries):
        return "class folders of images", _use(FolderConfig, "split=''")
    if splits := class_splits(path):
        return "class folders of images", _use(FolderConfig, _one_of(splits))
    if any(_is_image(e) for e in entries):
        return "images without class folders", f"sort them into PATH/SPLIT/CLASS/ and {_use(FolderConfig)}"
    if any(e.suffix == ".tar" for e in entries):
        remedy = f"for pairs with captions {_use(TarsConfig)}, for classes unpack them into PATH/SPLIT/CLASS/"
        return "tar files", f"{remedy} and {_use(FolderConfig)}"
    if any(e.suffix == ".parquet" for e in chain(entries, *(_entries(e)[:20] for e in entries[:20]))):
        return "Parquet files", _use(ParquetConfig)
    if any("tfrecord" in e.name or "array_record" in e.name for e in entries):
        return "record files without dataset_info.json", "copy the whole TFDS version directory"
    names = ", ".join(sorted(e.name for e in entries)[:3])
    return f"no format known here ({names} …)", "set the dataset's path"


def _use(cls: type[SourceConfig], how: str = "") -> str:
    """What to do in the configuration's file, and what on the command line, to read it as another kind."""
    return f"use {cls.__name__} (by a flag: kind={cls.kind})" + (f" with {how}" if how else "")


def _one_of(splits: list[str]) -> str:
    return f"split one of {', '.join(splits)}"


def _entries(path: Place) -> list[Place]:
    if not path.is_dir():
        return []
    with scandir(path) as entries:
        return [path / e.name for e in islice(entries, _LOOK)]


def _is_image(path: Place) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _has_image(path: Place) -> bool:
    return path.is_dir() and any(_is_image(e) for e in _entries(path)[:20])
