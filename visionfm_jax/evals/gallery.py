"""Evals that read labelled images to learn from, the gallery, beside those that they measure: what they share.

Shapes: N readable images, D features, P pixels, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Labels, check_classes
from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import KnnConfig, LinearProbeConfig
from visionfm_jax.evals.protocol import measured_on


class GalleryEval(OpenedEval):
    """An eval whose sources are the held-out images and, after these, the gallery, of the same classes.

    The features are the task's prediction "features". A gallery that is the held-out data is refused: each image would
    be judged by itself.
    """

    def __init__(self, config: KnnConfig | LinearProbeConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.gallery = self.sources[1:]
        if not self.gallery:
            raise DataError(f"gallery = (): a {config.kind} eval needs labelled images to learn from; add a source")
        for source in self.sources:
            if not source.num_classes:
                raise DataError(
                    f"{source.name} has no labels, which {config.kind} needs; set label_key, or another source"
                )
            if source.num_classes != self.source.num_classes:
                raise DataError(
                    f"{source.name} has {source.num_classes} classes, and {self.source.name} has "
                    f"{self.source.num_classes}; set sources of the same classes"
                )
            check_classes("gallery", source, self.source.class_names or (), "source")
        galleries = list(map(measured_on, self.gallery, config.gallery))
        for source, about in zip(self.gallery, galleries, strict=True):
            if all(about[k] == self.settings[k] for k in ("records", "content")) and _same_image(source, self.source):
                raise DataError(
                    f"gallery: {source.name} holds the images that are measured, so that each would be judged by "
                    "itself; set another split or path of either"
                )
        self.settings |= {"gallery": galleries}

    def read(
        self,
        predict: Predict,
        sources: Sequence[Source],
        more: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]] = lambda batch: {},
    ) -> dict[str, np.ndarray]:
        """`features` (N, D), `label` (N,) and what `more` makes of a batch, of the readable records, of all hosts."""
        parts = []
        for source in sources:
            for batch in self.batches(source, Labels(source.num_classes)):
                added = more(batch)
                out = predict({**batch, **added}, "features")
                keep = np.flatnonzero(out["mask"])
                parts.append({name: out[name][keep] for name in ("features", "label", *added)})
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}


def _same_image(one: Source, other: Source) -> bool:
    """Whether two sources of the same names and sizes begin with the same image: two parts may be alike in those."""
    try:
        images = [read_record(source, 0)["image"] for source in (one, other)]
    except DamagedRecord:
        return True
    return np.array_equal(*images) if isinstance(images[0], np.ndarray) else images[0] == images[1]
