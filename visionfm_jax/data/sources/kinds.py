"""The formats of datasets: a configuration for each, and what a reader of it needs to know.

`KINDS` has their names for the command line, `--config.data.train[0].kind=folder`; add a line for one of your own. A
reader's module is imported when a source is opened, so that nobody pays for the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visionfm_jax.config.schema import SourceConfig

if TYPE_CHECKING:
    from visionfm_jax.data.sources import Source


class Format(SourceConfig):
    """A source of this package: opened by `reader`, "module:name" in `data.sources`, which is imported then."""

    reader: ClassVar[str]

    def make(self) -> Source:
        module, name = self.reader.split(":")
        return getattr(importlib.import_module(f"visionfm_jax.data.sources.{module}"), name)(self)


@dataclass(kw_only=True)
class TfdsConfig(Format):
    """A TFDS directory with ArrayRecord files."""

    kind: ClassVar[str] = "tfds"
    reader: ClassVar[str] = "tfds:TfdsSource"

    split: str = "train"  # TFDS split, also a slice such as train[:90%]
    image_key: str = "image"  # feature with the image
    label_key: str = "label"  # feature with the label
    caption_key: str = "caption"  # feature with the caption; empty: no captions, and no label is needed


@dataclass(kw_only=True)
class FolderConfig(Format):
    """Class folders of images: PATH/SPLIT/CLASS/FILE."""

    kind: ClassVar[str] = "folder"
    reader: ClassVar[str] = "folder:FolderSource"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # name of the folder; empty: PATH/CLASS/FILE


@dataclass(kw_only=True)
class NumpyConfig(Format):
    """Arrays of images and labels: PATH/SPLIT.npz."""

    kind: ClassVar[str] = "numpy"
    reader: ClassVar[str] = "archive:ArchiveSource"

    split: str = "train"  # name of the file, without .npz; empty: the path is the file
    image_key: str = "image"  # name of the array of images
    label_key: str = "label"  # name of the array of labels


@dataclass(kw_only=True)
class BundledConfig(Format):
    """A bundled set of images; `path` is its name."""

    kind: ClassVar[str] = "bundled"
    reader: ClassVar[str] = "bundled:BundledSource"

    split: str = "train"  # train | test; for emoji also combinations
    caption_key: str = "caption"  # empty: without captions


@dataclass(kw_only=True)
class TarsConfig(Format):
    """A folder of tars of images with captions, as img2dataset and WebDataset write them."""

    kind: ClassVar[str] = "tars"
    reader: ClassVar[str] = "tars:open_tars"

    caption_key: str = "caption"  # caption: the .txt of each image; or another suffix; empty: no captions
    selection: str = ""  # file of `python -m visionfm_jax.data.select`; empty: all pairs


@dataclass(kw_only=True)
class CocoCaptionsConfig(Format):
    """Images with several captions: PATH/annotations/captions_SPLIT.json beside PATH/SPLIT/FILE."""

    kind: ClassVar[str] = "coco_captions"
    reader: ClassVar[str] = "captioned:open_coco"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # as in the file names, e.g. train2017
    caption_key: str = "caption"  # key in an annotation; empty: all images, without captions


@dataclass(kw_only=True)
class VisualGenomeConfig(Format):
    """Images with the phrases of their regions: PATH/region_descriptions.json beside PATH/VG_100K."""

    kind: ClassVar[str] = "visual_genome"
    reader: ClassVar[str] = "captioned:open_visual_genome"
    loose_files: ClassVar[bool] = True

    caption_key: str = "caption"  # phrase, or another key of a region; empty: all images, without captions


KINDS = SourceConfig.kinds
KINDS |= {
    cls.kind: cls
    for cls in (
        TfdsConfig, FolderConfig, NumpyConfig, BundledConfig, TarsConfig, CocoCaptionsConfig, VisualGenomeConfig,
    )
}  # fmt: skip
