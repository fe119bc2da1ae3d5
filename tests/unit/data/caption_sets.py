"""Folders as those of COCO and Visual Genome, of bundled pictures."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tar_sets import picture


def write_coco(folder: Path, captions: Sequence[Sequence[str]], split: str = "train2017") -> Path:
    """Picture i has id 10 * i and `captions[i]`, whose annotations are listed backwards."""
    images = [{"id": 10 * i, "file_name": f"{i:012d}.jpg", "height": 64, "width": 64} for i in range(len(captions))]
    notes = [(10 * i, caption) for i, own in enumerate(captions) for caption in own]
    annotations = [{"id": n, "image_id": i, "caption": caption} for n, (i, caption) in enumerate(notes)]
    write_json(
        folder / f"annotations/captions_{split}.json",
        {"info": {"year": 2017}, "images": images, "licenses": [], "annotations": annotations[::-1]},
    )
    write_pictures(folder / split, {image["file_name"]: i for i, image in enumerate(images)})
    return folder


def write_visual_genome(folder: Path, phrases: Sequence[Sequence[str]]) -> Path:
    """Picture i has id i + 1 and a region for each of `phrases[i]`; every second picture is in the second folder."""
    entries = [
        {
            "regions": [
                {"region_id": 100 * i + r, "image_id": i, "phrase": phrase, "x": 0, "y": 0, "width": 9, "height": 9,
                 "synsets": [{"synset_name": "cat.n.01", "entity_name": "cat"}]}
                for r, phrase in enumerate(own)
            ],
            "id": i,
        }
        for i, own in enumerate(phrases, start=1)
    ]  # fmt: skip
    write_json(folder / "region_descriptions.json", entries)
    for k, name in enumerate(("VG_100K", "VG_100K_2")):
        write_pictures(folder / name, {f"{i + 1}.jpg": i for i in range(k, len(phrases), 2)})
    return folder


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_pictures(folder: Path, pictures: Mapping[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, i in pictures.items():
        (folder / name).write_bytes(picture(i))
