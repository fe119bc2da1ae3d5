"""The base of the evals of this package. Shapes: B rows of this host in a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from visionfm_jax.config import Config, EvalConfig
from visionfm_jax.data.batches import Batch
from visionfm_jax.data.chain import EvalTransform
from visionfm_jax.data.fields import Fields
from visionfm_jax.data.loader import eval_loader
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.evals.protocol import measured_on, protocol_of


class OpenedEval:
    """An eval whose data are open: an `evals.eval.Eval` but for `run`.

    Attributes:
      sources: those of `EvalConfig.sources`; `source` is the first, the held-out data.
      settings: all that the numbers depend on beside the model. Subclasses add to the data and the preprocessing.
      details, pictured: as `evals.eval.Eval` says.
    """

    def __init__(self, config: EvalConfig, run: Config, host: int, hosts: int):
        self.config, self.run_config, self.host, self.hosts = config, run, host, hosts
        self.sources: list[Source] = [open_source(s) for s in config.sources]
        self.source = self.sources[0]
        self.transform = EvalTransform.of(config, run)
        self.settings: dict[str, Any] = {**measured_on(self.source, config.source), **self.transform.settings}
        self.details: dict[str, Any] = {}
        self.pictured: dict[str, Any] = {}

    @property
    def protocol(self) -> str:
        """8 hex digits of `settings`."""
        return protocol_of(self.settings)

    @property
    def batch_size(self) -> int:
        """Rows over all hosts."""
        return self.config.batch_size or self.run_config.train.batch_size

    def batches(self, source: Source, fields: Fields) -> Iterator[Batch]:
        """`eval_loader`'s, with `record`, int32 (B,): the rows' numbers in the source, past its end on padding."""
        rows = self.batch_size // self.hosts
        own = self.host * rows + np.arange(rows, dtype=np.int32)
        batches = eval_loader(
            source, fields, self.transform, batch_size=self.batch_size,
            host=self.host, hosts=self.hosts, threads=self.run_config.data.threads,
        )  # fmt: skip
        for step, batch in enumerate(batches):
            yield {**batch, "record": step * self.batch_size + own}

    def describe(self, **more: Any) -> None:
        """Fill `details`."""
        self.details = {"protocol": self.protocol, "settings": self.settings, **more}


def names_of(source: Source, classes: int) -> Sequence[str]:
    """A name for each class of a task: the source's, and beyond these the number."""
    names = tuple(source.class_names or ())
    return names + tuple(map(str, range(len(names), classes)))
