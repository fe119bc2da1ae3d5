"""Top-1 and top-5 accuracy on held-out images. Shapes: B batch."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from visionfm_jax.config import ClassificationConfig, Config, EvalConfig
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.loader import eval_loader
from visionfm_jax.data.sources import open_source
from visionfm_jax.evals.subject import Predict, require_task

PICTURED = 64


class ClassificationEval:
    """The `evals.registry.Eval` of labelled images: loss in nats, top1 and top5 as shares.

    After a run, `pictured` holds the first images with label and best guess.
    """

    metrics = ("top1", "top5")
    protocol = ""
    details: ClassVar = {}

    def __init__(self, config: EvalConfig, run: Config, host: int, hosts: int):
        self.config, self.run_config, self.host, self.hosts = config, run, host, hosts
        require_task(config, run, ClassificationConfig)
        self.source, self.labels = open_source(config.source), Labels(run.task.num_classes)
        self.labels.check(self.source)
        self.pictured: dict[str, np.ndarray] = {}

    def run(self, predict: Predict) -> dict[str, float]:
        """Scores over the whole source, each record once."""
        totals = dict.fromkeys(("loss", "top1", "top5"), 0.0)
        count = 0.0
        self.pictured = {}
        for batch in self._batches():
            out = predict(batch)
            hits = out["top"] == out["label"][:, None]
            count += out["mask"].sum()
            totals["loss"] += (out["loss"] * out["mask"]).sum()
            totals["top1"] += (hits[:, 0] * out["mask"]).sum()
            totals["top5"] += (hits.any(1) * out["mask"]).sum()
            if not self.pictured:
                self._remember(batch, out)
        return {k: float(v / count) for k, v in totals.items()} | {"images": float(count)}

    def _batches(self):
        return eval_loader(
            self.source,
            self.labels,
            image_size=self.run_config.image_size,
            batch_size=self.config.batch_size or self.run_config.train.batch_size,
            host=self.host,
            hosts=self.hosts,
            threads=self.run_config.data.threads,
        )

    def _remember(self, batch: dict[str, np.ndarray], out: dict[str, np.ndarray]) -> None:
        if self.host:  # predictions cover all hosts' rows; images only this one's, which are the first on host 0
            return
        rows = np.flatnonzero(batch["mask"])[:PICTURED]
        if len(rows):
            self.pictured = {
                "image": batch["image"][rows],
                "label": out["label"][rows],
                "guess": out["top"][rows, 0],
            }
