"""Logistic regression on the raw pixels of the same split: what a model must beat to have learned anything."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.errors import DataError
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import PixelBaselineConfig
from visionfm_jax.evals.logistic import fit, zeros

MAX_PIXELS = 2**30  # of training images, held in memory as fp32: 4 GiB
# On the squared weights, beside the summed loss: of 3, 10 and 30 the one with which the baseline does best on the
# held-out digits, so that the comparison errs to its side.
PENALTY = 30.0


class PixelBaseline(OpenedEval):
    """The `evals.eval.Eval` that ignores the model: top-1 share of multinomial logistic regression (L-BFGS)."""

    protocol = ""

    def __init__(self, config: PixelBaselineConfig, run: Config, host: int, hosts: int):
        del host, hosts  # every host computes the same, of all rows
        super().__init__(config, run, 0, 1)
        self.train = [open_source(s) for s in run.data.train]
        pixels = sum(map(len, self.train)) * math.prod(self.transform.spec["image"][0])
        if pixels > MAX_PIXELS:
            raise DataError(f"{pixels:,} training pixels are too many for a baseline; remove the eval")

    def run(self, predict: Predict) -> dict[str, float]:
        """Fit on the training images without augmentation, score on the held-out ones."""
        pairs = [self._pixels(s) for s in self.train]
        x, y = (jnp.concatenate(parts) for parts in zip(*pairs, strict=True))
        weights = fit(x, y, PENALTY, zeros(x.shape[1], self.run_config.task.num_classes))
        test_x, test_y = self._pixels(self.source)
        return {"top1": float((weights(test_x).argmax(-1) == test_y).mean())}

    def _pixels(self, source: Source) -> tuple[np.ndarray, np.ndarray]:
        batches = self.batches(source, Labels(self.run_config.task.num_classes))
        rows = [(b["image"][b["mask"] > 0], b["label"][b["mask"] > 0]) for b in batches]
        images, labels = (np.concatenate(parts) for parts in zip(*rows, strict=True))
        return images.reshape(len(images), -1).astype(np.float32) / 255, labels
