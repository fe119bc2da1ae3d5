"""Accuracy on held-out images. Shapes: B batch, N images, C classes."""

from __future__ import annotations

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Labels
from visionfm_jax.evals.base import names_of
from visionfm_jax.evals.by_class import LabelledEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import AccuracyConfig


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
        super().__init__(config, run, host, hosts)
        self.labels = Labels(run.task.num_classes)
        self.labels.check(self.source)
        self.classes = names_of(self.source, run.task.num_classes)
        self.settings |= {"classes": run.task.num_classes}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        parts = []
        for batch in self.batches(self.source, self.labels):
            out = predict(batch)
            keep = np.flatnonzero(out["mask"])
            top = np.where(np.isfinite(out["loss"][keep, None]), out["top"][keep], -1)
            hit = (top == out["label"][keep, None]).any(1)
            parts.append((out["loss"][keep], top[:, 0], hit, out["label"][keep], out["record"][keep]))
        loss, guess, among_five, labels, records = (np.concatenate(p) for p in zip(*parts, strict=True))
        return {
            "loss": float(loss.mean(dtype=np.float64)),
            "top1": float((guess == labels).mean()),
            "top5": float(among_five.mean()),
            **self.by_class(labels, guess, records),
        }
