"""The formats of datasets: a configuration for each, and what a reader of it needs to know.

`KINDS` has their names for the command line, `--config.data.train[0].kind=folder`; add a line for one of your own. A
reader's module is imported when a source is opened, so that nobody pays for the others.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from visionfm_jax.config.limits import Limits, OneOf, Range
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
    objects_key: str = "objects"  # feature with the objects, read where there is no label; empty: none


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
class ScenesConfig(Format):
    """Scenes of bundled emoji, made when they are read; `path` is the set that they are drawn from: noto or twemoji."""

    kind: ClassVar[str] = "scenes"
    reader: ClassVar[str] = "scenes:ScenesSource"

    split: str = "train"  # train | test: concepts that are in no scene of train
    truth: str = "boxes"  # what is known: boxes | masks (and boxes) | class_map, where the background is a class too
    scenes: int = 4096  # number of them
    size: int = 128  # pixels, side of the square
    most: int = 8  # number of objects in a scene
    seed: int = 0  # of all that is drawn

    limits: ClassVar[Limits] = {
        **Format.limits,
        "truth": OneOf(("boxes", "masks", "class_map")),
        "scenes": Range(1, 2**31),
        "size": Range(32, 2048),  # pixels
        "most": Range(1, 1000),
        "seed": Range(0, 2**63),
    }


@dataclass(kw_only=True)
class TarsConfig(Format):
    """A folder of tars of images with captions, as img2dataset and WebDataset write them."""

    kind: ClassVar[str] = "tars"
    reader: ClassVar[str] = "tars:open_tars"

    caption_key: str = "caption"  # caption: the .txt of each image; or another suffix; json:FIELD; txt:lines; "": none
    image_key: str = ""  # suffix of the images, such as rgb.png; empty: any of an image
    selection: str = ""  # file of `visionfm data select`; empty: all pairs


@dataclass(kw_only=True)
class ParquetConfig(Format):
    """Parquet files with images in them, as Hugging Face's datasets and img2dataset write them."""

    kind: ClassVar[str] = "parquet"
    reader: ClassVar[str] = "parquet:ParquetSource"

    split: str = "train"  # how the names of its files, or that of their folder, begin; empty: all files
    image_key: str = "image"  # column with the image
    label_key: str = "label"  # column with the label, if it is there; empty: none
    caption_key: str = "caption"  # column with the caption or captions, if it is there; empty: none


@dataclass(kw_only=True)
class TableConfig(Format):
    """Images that a table names, with captions or labels: PATH is a .csv, .tsv or .jsonl file."""

    kind: ClassVar[str] = "table"
    reader: ClassVar[str] = "table:TableSource"

    root: str = ""  # folder or URL that paths of images begin at; empty: that of the table
    image_key: str = "image"  # column with the path of an image, or its URL
    caption_key: str = "caption"  # column with its caption; several rows of one image: several; empty: none
    label_key: str = ""  # column with its label; empty: none


@dataclass(kw_only=True)
class BenchmarkConfig(Format):
    """A set of a benchmark as CLIP_benchmark lays it out: PATH/SPLIT/0.tar, … or class folders PATH/SPLIT/CLASS/FILE.

    In tars a KEY.jpg has a KEY.cls, its label, or a KEY.txt, a caption a line. PATH/classnames.txt names the classes.
    """

    kind: ClassVar[str] = "benchmark"
    reader: ClassVar[str] = "benchmark:open_benchmark"

    split: str = "test"  # name of the folder


@dataclass(kw_only=True)
class CocoCaptionsConfig(Format):
    """Images with several captions: PATH/annotations/captions_SPLIT.json beside PATH/SPLIT/FILE."""

    kind: ClassVar[str] = "coco_captions"
    reader: ClassVar[str] = "captioned:open_coco"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # as in the file names, e.g. train2017
    caption_key: str = "caption"  # key in an annotation; empty: all images, without captions


@dataclass(kw_only=True)
class CocoConfig(Format):
    """Images with objects: PATH/annotations/instances_SPLIT.json beside PATH/SPLIT/FILE."""

    kind: ClassVar[str] = "coco"
    reader: ClassVar[str] = "coco:CocoSource"
    loose_files: ClassVar[bool] = True

    split: str = "train2017"  # what stands for {split} in the next two
    annotations: str = "annotations/instances_{split}.json"  # JSON file, below the path
    images: str = "{split}"  # folder of the images, below the path
    masks: bool = False  # also draw the objects' masks


@dataclass(kw_only=True)
class CocoPanopticConfig(Format):
    """Images of which each pixel has a class and a segment: PATH/annotations/panoptic_SPLIT.json, PATH/SPLIT/FILE."""

    kind: ClassVar[str] = "coco_panoptic"
    reader: ClassVar[str] = "panoptic:PanopticSource"
    loose_files: ClassVar[bool] = True

    split: str = "train2017"  # what stands for {split} in the next three
    annotations: str = "annotations/panoptic_{split}.json"  # JSON file, below the path
    maps: str = "annotations/panoptic_{split}"  # folder of the PNG files, below the path
    images: str = "{split}"  # folder of the images, below the path
    truth: str = "class_map"  # what is known: class_map | masks (of segments, and boxes)

    limits: ClassVar[Limits] = {**Format.limits, "truth": OneOf(("class_map", "masks"))}


@dataclass(kw_only=True)
class VocConfig(Format):
    """Images with objects, as Pascal VOC has them: PATH/JPEGImages, PATH/Annotations, PATH/ImageSets/Main/SPLIT.txt."""

    kind: ClassVar[str] = "voc"
    reader: ClassVar[str] = "voc:open_voc"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # name of the list of images; empty: all that have annotations


@dataclass(kw_only=True)
class YoloConfig(Format):
    """Images with objects, as YOLO has them: PATH/data.yaml, images/…/FILE.jpg beside labels/…/FILE.txt."""

    kind: ClassVar[str] = "yolo"
    reader: ClassVar[str] = "yolo:open_yolo"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # key of the split in the file
    file: str = "data.yaml"  # that names splits and classes, below the path


@dataclass(kw_only=True)
class ClassMapsConfig(Format):
    """Images with a class for each pixel: for each image of a folder a map in another, a picture of one channel."""

    kind: ClassVar[str] = "class_maps"
    reader: ClassVar[str] = "class_maps:ClassMapsSource"
    loose_files: ClassVar[bool] = True

    split: str = "train"  # what stands for {split} in the next two
    images: str = "images/{split}"  # folder of the images, below the path; folders within are read too
    maps: str = "annotations/{split}"  # folder of the maps, below the path
    image_suffix: str = ""  # end of the images' names; empty: any of an image
    map_suffix: str = ".png"  # what stands in its place in the name of a map
    num_classes: int = 0  # 0: as many as `names` has
    names: str = ""  # file of the names of classes, one on each line, below the path; empty: none
    first: int = 0  # value of class 0 in a map
    ignore: tuple[int, ...] = (255,)  # values of no class

    limits: ClassVar[Limits] = {
        **Format.limits,
        "num_classes": Range(0, 65_535),
        "first": Range(0, 65_535),
        "ignore": Range(0, 65_535),
    }


@dataclass(kw_only=True)
class Ade20kConfig(ClassMapsConfig):
    """ADE20K's 150 classes: the folder ADEChallengeData2016."""

    kind: ClassVar[str] = "ade20k"

    split: str = "training"  # training | validation
    num_classes: int = 150
    names: str = "objectInfo150.txt"  # left out where it is not there
    first: int = 1  # 0 is no class
    ignore: tuple[int, ...] = (0,)


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
        TfdsConfig, FolderConfig, NumpyConfig, BundledConfig, TarsConfig, ParquetConfig, TableConfig, BenchmarkConfig,
        CocoCaptionsConfig, VisualGenomeConfig, CocoConfig, CocoPanopticConfig, VocConfig, YoloConfig, ClassMapsConfig,
        Ade20kConfig, ScenesConfig,
    )
}  # fmt: skip
