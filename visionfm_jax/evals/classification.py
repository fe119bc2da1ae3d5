"""Accuracy on held-out images. Shapes: B batch, N images, C classes."""

from __future__ import annotations

from typing import Any

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.loader import eval_loader
from visionfm_jax.data.sources import open_source
from visionfm_jax.evals.by_class import LabelledEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import AccuracyConfig
from visionfm_jax.evals.protocol import measured_on, protocol_of


class ClassificationEval(LabelledEval):
    """The `evals.eval.Eval` of labelled images: loss in nats; top1, top5 and balanced_accuracy as shares.

    Beside them stands `majority`, the share of the largest class: what a model that always guesses it has as top1.
    Images whose loss is not finite are never right.

    Attributes:
      protocol: 8 hex digits of what was measured: dataset, preprocessing, classes.
      details: after a run, for JSON: protocol and its settings, and `ByClass.details`.
      pictured: after a run, on host 0: images spread over the source with label and guess, and what was taken for what.
    """

    def __init__(self, config: AccuracyConfig, run: Config, host: int, hosts: int):
        self.config, self.run_config, self.host, self.hosts = config, run, host, hosts
        self.source, self.labels = open_source(config.source), Labels(run.task.num_classes)
        self.labels.check(self.source)
        names = tuple(self.source.class_names or ())
        self.classes = names + tuple(map(str, range(len(names), run.task.num_classes)))
        self.transform = EvalTransform.of(config, run)
        self.settings = {
            **measured_on(self.source, config.source.path, config.source.split),
            **self.transform.settings,
            "classes": run.task.num_classes,
        }
        self.protocol = protocol_of(self.settings)
        self.details: dict[str, Any] = {}
        self.pictured: dict[str, Any] = {}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        parts = []
        size = self.config.batch_size or self.run_config.train.batch_size
        batches = eval_loader(
            self.source, self.labels, self.transform, batch_size=size,
            host=self.host, hosts=self.hosts, threads=self.run_config.data.threads,
        )  # fmt: skip
        for step, batch in enumerate(batches):
            out = predict(batch)
            keep = np.flatnonzero(out["mask"])
            top = np.where(np.isfinite(out["loss"][keep, None]), out["top"][keep], -1)
            hit = (top == out["label"][keep, None]).any(1)
            parts.append((out["loss"][keep], top[:, 0], hit, out["label"][keep], step * size + keep))
        loss, guess, among_five, labels, records = (np.concatenate(p) for p in zip(*parts, strict=True))
        return {
            "loss": float(loss.mean(dtype=np.float64)),
            "top1": float((guess == labels).mean()),
            "top5": float(among_five.mean()),
            **self.by_class(labels, guess, records),
        }
