"""Sets of image benchmarks, as CLIP_benchmark publishes them for WebDataset, or as class folders.

    PATH/classnames.txt                     the name of each class on a line, in the order of the labels
    PATH/test/0.tar, …                      KEY.jpg beside KEY.cls, a number, or KEY.txt, a caption on each line
    PATH/test/CLASS/FILE.jpg                or class folders

What stands in prompts for a class folder is, without classnames.txt: for a WordNet id its name in ImageNet, for a
number the name in the shipped list of this set, else the name of the folder.
"""

from __future__ import annotations

from typing import Any

from visionfm_jax.data.sources import Source
from visionfm_jax.data.sources.folder import FolderSource
from visionfm_jax.data.sources.kinds import BenchmarkConfig, FolderConfig
from visionfm_jax.data.sources.layout import check_path, describe
from visionfm_jax.data.sources.places import Place, place_of
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.tars import TarPairs
from visionfm_jax.data.text_lists import benchmarks, read_lines
from visionfm_jax.errors import DataError, printable

NAMES = "classnames.txt"
SPLITS = ("test", "val", "validation")  # of held-out images, the first that is there


def set_name(path: Place) -> str:
    """The name of a set by its folder: "cifar10" of "wds_vtab-cifar10"."""
    name = path.name.lower().removeprefix("wds_").replace("-", "_")
    return name.removeprefix("vtab_")


def open_benchmark(config: BenchmarkConfig) -> Source:
    """The images of a split with labels, or with captions where there are no classes.

    Raises:
      DataError: there are neither tars nor class folders, or the names of the classes do not fit.
    """
    path = check_path(config)
    split = path / config.split
    names = read_lines(path / NAMES) if (path / NAMES).is_file() else None
    if not any(split.glob("*.tar")):
        source = FolderSource(FolderConfig(path=config.path, split=config.split))
        source.class_names = names or _names_of(config, source.folders)
        if len(source.class_names) != source.num_classes:
            raise DataError(
                f"{describe(config)}: {NAMES} has {len(source.class_names)} lines, and there are {source.num_classes} "
                "class folders; give one name a folder, in sorted order"
            )
        return source
    return LabelledTars(split, names) if names else _captioned(split)


def _names_of(config: BenchmarkConfig, folders: tuple[str, ...]) -> tuple[str, ...]:
    """A name for each class folder."""
    synsets = read_lines("imagenet_synsets")
    if set(folders) <= set(synsets):
        names = dict(zip(synsets, read_lines("imagenet_classes"), strict=True))
        return tuple(names[folder] for folder in folders)
    if not all(folder.isdecimal() for folder in folders):
        return tuple(folder.replace("_", " ") for folder in folders)
    name = set_name(place_of(config.path))
    known = read_lines("imagenet_classes") if name.startswith("imagenet") else benchmarks().get(name, {}).get("classes")
    first = min(map(int, folders))
    if known is None or max(map(int, folders)) - first >= len(known) or (first and len(folders) != len(known)):
        raise DataError(
            f"{describe(config)}: the class folders are numbers, and which class is which is not known; "
            f"write their names into {NAMES}, one a line, in the sorted order of the folders"
        )
    return tuple(known[int(folder) - first] for folder in folders)


class LabelledTars(TarPairs):
    """Pictures of a folder of tars, with labels from members KEY.cls.

    Args:
      path: the folder.
      names: of the classes, in the order of the labels.
    """

    def __init__(self, path: Place, names: tuple[str, ...]):
        super().__init__(str(path), caption_key="cls")
        self.has_captions, self.most_captions = False, 0
        self.class_names, self.num_classes = names, len(names)
        if not len(self):
            raise DataError(f"{self.name}: no image has a label, a member KEY.cls beside it; the folder has {NAMES}")

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The encoded picture and its class; as `TarPairs`."""
        picture, text = self.pair(index)
        label = text.decode().strip()
        if not (label.isdecimal() and int(label) < self.num_classes):
            raise DamagedRecord(f"its label {printable(label)[:20]!r} is no number below {self.num_classes}")
        return {"image": picture, "label": int(label)}


def _captioned(split: Place) -> TarPairs:
    """Pictures of a folder of tars, with a caption on each line of members KEY.txt."""
    source = TarPairs(str(split), caption_key="txt:lines")
    if not len(source):
        raise DataError(
            f"{source.name}: no image has a caption, a member KEY.txt beside it; for labels in members KEY.cls "
            f"write the names of the classes into {split.parent / NAMES}"
        )
    return source
