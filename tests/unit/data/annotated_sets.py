"""The smallest folder of each format of objects and class maps: two pictures, of which nothing is annotated."""

import io
from pathlib import Path

import numpy as np
from caption_sets import write_json, write_pictures
from PIL import Image

from visionfm_jax.config import SourceConfig
from visionfm_jax.data.sources.kinds import KINDS

FILES = {"a.jpg": 0, "b.jpg": 1}
MAPS = {"class_maps": "annotations/train", "ade20k": "annotations/train", "coco_panoptic": "annotations/panoptic_train"}
IMAGES = {"voc": "JPEGImages", "coco": "train", "coco_panoptic": "train"}
XML = "<annotation><object><name>cat</name></object></annotation>"


def write(kind: str, folder: Path) -> SourceConfig:
    """The configuration that reads it."""
    write_pictures(folder / IMAGES.get(kind, "images/train"), FILES)
    more = {"split": "train"}
    if kind in MAPS:
        channels = (3,) if kind == "coco_panoptic" else ()
        file = io.BytesIO()
        Image.fromarray(np.ones((64, 64, *channels), np.uint8)).save(file, "PNG")
        for name in FILES:
            path = folder / MAPS[kind] / f"{name[0]}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(file.getvalue())
    if kind in ("coco", "coco_panoptic"):
        images = [{"id": i, "file_name": name} for name, i in FILES.items()]
        notes = [{"image_id": i, "file_name": f"{name[0]}.png", "segments_info": []} for name, i in FILES.items()]
        content = {"images": images, "categories": [{"id": 1, "name": "cat"}]}
        name = "panoptic" if kind == "coco_panoptic" else "instances"
        write_json(
            folder / f"annotations/{name}_train.json", content | {"annotations": notes if name == "panoptic" else []}
        )
    elif kind == "voc":
        (folder / "Annotations").mkdir()
        for name in FILES:
            (folder / f"Annotations/{name[0]}.xml").write_text(XML)
        more = {"split": ""}
    elif kind == "yolo":
        (folder / "data.yaml").write_text("train: images/train\nnames: [cat]\n")
    elif kind == "class_maps":
        more |= {"num_classes": 2}
    return KINDS[kind](path=str(folder), **more)
