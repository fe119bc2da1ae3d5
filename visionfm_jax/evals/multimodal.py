"""The base of the evals of a multimodal model. Shapes: B rows of this host in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from visionfm_jax.config import Config, EvalConfig
from visionfm_jax.data.batches import Batch
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.fields import Fields, NoFields, Row
from visionfm_jax.data.loader import eval_loader
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.errors import DataError
from visionfm_jax.evals.captions import captions_of
from visionfm_jax.evals.protocol import measured_on, protocol_of


class MultimodalEval:
    """An eval that has opened and checked its source, with batches whose rows know their numbers.

    Attributes:
      protocol: 8 hex digits of what was measured: the source, the preprocessing and what `more_settings` has.
      details: after a run, for JSON: protocol and its settings.
      pictured: after a run, on host 0: what there is to see.
    """

    needs_captions = True

    def __init__(self, config: EvalConfig, run: Config, host: int, hosts: int):
        self.config, self.run_config, self.host, self.hosts = config, run, host, hosts
        self.source: Source = open_source(config.source)
        if self.needs_captions and not self.source.has_captions:
            raise DataError(
                f"{self.source.name} has no captions, which {config.kind} needs; set caption_key, or another source"
            )
        self.transform = EvalTransform.of(config, run)
        self.settings = {
            **measured_on(self.source, config.source.path, config.source.split),
            **self.transform.settings,
            **self.more_settings(),
        }
        self.protocol = protocol_of(self.settings)
        self.details: dict[str, Any] = {}
        self.pictured: dict[str, Any] = {}

    def more_settings(self) -> dict[str, Any]:
        """What the numbers depend on beside the images."""
        raise NotImplementedError

    @property
    def batch_size(self) -> int:
        """Rows over all hosts."""
        return self.config.batch_size or self.run_config.train.batch_size

    def batches(self, fields: Fields) -> Iterator[Batch]:
        """`eval_loader`'s, with `record`, int32 (B,): the rows' numbers in the source, past its end on padding."""
        rows = self.batch_size // self.hosts
        own = self.host * rows + np.arange(rows, dtype=np.int32)
        batches = eval_loader(
            self.source, fields, self.transform, batch_size=self.batch_size,
            host=self.host, hosts=self.hosts, threads=self.run_config.data.threads,
        )  # fmt: skip
        for step, batch in enumerate(batches):
            yield {**batch, "record": step * self.batch_size + own}

    def describe(self, **more: Any) -> None:
        """Fill `details`."""
        self.details = {"protocol": self.protocol, "settings": self.settings, **more}


class CaptionedImages(NoFields):
    """Nothing beside the image; those without a readable caption are damaged."""

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        if not captions_of(record):
            raise DamagedRecord("there is no caption that is UTF-8 and not empty")
        return {}
