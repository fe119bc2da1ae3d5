"""Sources of images with objects and class maps, a task that reads them, and the mapping to its canvas by hand."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visionfm_jax.config import BackboneConfig, Config, DataConfig, TaskConfig, TrainConfig
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.evals import base
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config

SIDE, BATCH = 32, 8


class Listed:
    """Records from a list."""

    has_captions, most_captions, name = False, 0, "a list"

    def __init__(self, records, class_names):
        self.records, self.class_names, self.num_classes = records, class_names, len(class_names)

    def __len__(self):
        return len(self.records)

    def __getitem__(self, i):
        return self.records[i]

    def key(self, i):
        return f"image {i}"

    def fingerprint(self):
        return {"list": str(len(self.records))}


class Rows:
    """Fields of a row that hold nothing of what is compared."""

    spec: ClassVar = {}

    def __call__(self, record, rng=None):
        return {}

    def check(self, source):
        assert source.num_classes


@dataclass(kw_only=True)
class DenseConfig(TaskConfig):
    num_classes: int = 3
    model_class: ClassVar[type] = BackboneConfig
    predictions: ClassVar[frozenset[str]] = frozenset({"boxes", "class_map"})

    def fields(self, run):
        return Rows()

    def make(self, run, dtype, gather_params):
        raise NotImplementedError


def make(monkeypatch, kind, records, class_names, hosts=1, **settings):
    """The eval of these records, one for each host."""
    monkeypatch.setattr(base, "open_source", lambda config: Listed(records, class_names))
    run = Config(
        name="fake",
        model=SwinV2Config(image_size=SIDE),
        task=DenseConfig(num_classes=len(class_names)),
        data=DataConfig(threads=2),
        train=TrainConfig(batch_size=BATCH),
        evals=(kind(name="held_out", source=TfdsConfig(path="numbers"), **settings),),
    )
    return [make_evals(run, host, hosts)["held_out"] for host in range(hosts)]


def on_canvas(boxes, size):
    """Boxes on an image of (H, W) that is fitted into the upper left corner of the canvas."""
    height, width = size
    wide = width >= height
    rows, columns = (SIDE * height // width, SIDE) if wide else (SIDE, SIDE * width // height)
    return np.asarray(boxes, float).reshape(-1, 4) * np.array([columns / width, rows / height] * 2)
