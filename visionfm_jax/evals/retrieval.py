"""Retrieval of captions by image and of images by caption. Shapes: B batch, N pairs, E embedding, L tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config import Config, ContrastiveConfig, EvalConfig
from visionfm_jax.data.batches import Row, Spec
from visionfm_jax.data.fields import Texts
from visionfm_jax.data.loader import eval_loader
from visionfm_jax.data.sources import Source, open_source
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import DataError
from visionfm_jax.evals.contrastive import (
    caption_of,
    image_of,
    measured_on,
    plain,
    protocol_of,
    sample,
)
from visionfm_jax.evals.metrics import best, ranks, recall
from visionfm_jax.evals.subject import Predict, require_task

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
PICTURED = 6  # queries each way
ANSWERS = 5


class Pairs(Texts):
    """`text` as `Texts`, and `caption`, int32 (2,): a hash of the caption itself, which may be longer than L tokens.

    The hash travels with the rows: no host has the captions of the others, and all must know which are the same.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.spec: Spec = {**self.spec, "caption": ((2,), np.int32)}

    def __call__(self, record: Mapping[str, Any]) -> Row:
        row = super().__call__(record)
        caption = record["caption"]
        caption = caption if isinstance(caption, bytes) else caption.encode("utf-8", "surrogatepass")
        return {**row, "caption": np.frombuffer(hashlib.blake2b(caption, digest_size=8).digest(), np.int32)}


class Embedded(NamedTuple):
    """Readable pairs of one or more sources, of all hosts, in order."""

    image: np.ndarray  # (N, E)
    text: np.ndarray  # (N, E)
    caption: np.ndarray  # (N,) int64, equal where the captions are
    source: np.ndarray  # (N,) number of the source: 0 the eval's own, then the gallery's
    record: np.ndarray  # (N,) number of the record in it


class RetrievalEval:
    """The `evals.registry.Eval` of captioned images and a contrastive model: R@1, 5 and 10 as shares, both ways.

    Queries are the source's images and captions; candidates are its captions and images and those of the gallery.
    Right is every candidate whose caption is the same text as the query's: of several records with one caption, each
    is as good an answer as the others. Ties and embeddings that are not finite count against the model, see
    `evals.metrics`.

    Attributes:
      protocol: 8 hex digits of what was measured: source, gallery, image size, tokenizer.
      details: after a run, for JSON: protocol and its settings, metrics.
      pictured: after a run, on host 0: `captions` and `images`, lists of queries with their best answers.
    """

    metrics = tuple(f"{way}_r{k}" for way in WAYS for k in KS)

    def __init__(self, config: EvalConfig, run: Config, host: int, hosts: int):
        require_task(config, run, ContrastiveConfig)
        self.config, self.run_config, self.host, self.hosts = config, run, host, hosts
        configs = (config.source, *config.gallery)
        self.sources = [open_source(s) for s in configs]
        self.source = self.sources[0]
        for source in self.sources:
            if not source.has_captions:
                raise DataError(
                    f"config.evals {config.name!r}: {source.name} has no captions, which retrieval needs; "
                    "set caption_key, or another source"
                )
        self.tokenizer = open_tokenizer(run.task.tokenizer)
        self.settings = {
            "sources": [measured_on(s, c.path, c.split) for s, c in zip(self.sources, configs, strict=True)],
            "image_size": run.image_size,
            "tokenizer": Path(self.tokenizer.name).name,
            "context": run.model.text.context,
        }
        self.protocol = protocol_of(self.settings)
        self.details: dict[str, Any] = {}
        self.pictured: dict[str, Any] = {}

    def run(self, predict: Predict) -> dict[str, float]:
        """Recalls and median ranks over all queries, each once."""
        parts = [self._embed(predict, number, source) for number, source in enumerate(self.sources)]
        pairs = Embedded(*map(np.concatenate, zip(*parts, strict=True)))
        count = len(parts[0].image)
        ids = pairs.caption[:count], pairs.caption
        places = {
            "image_to_text": ranks(pairs.image[:count], pairs.text, *ids),
            "text_to_image": ranks(pairs.text[:count], pairs.image, *ids),
        }
        scores = {f"{way}_r{k}": recall(places[way], k) for way in WAYS for k in KS}
        scores |= {f"{way}_median_rank": float(np.median(places[way])) for way in WAYS}
        scores |= {"queries": float(count), "candidates": float(len(pairs.image))}
        self.details = {"protocol": self.protocol, "settings": self.settings, "metrics": plain(scores)}
        if self.host == 0:
            self.pictured = self._pictured(pairs, count, places)
        return scores

    def _embed(self, predict: Predict, number: int, source: Source) -> Embedded:
        size = self.config.batch_size or self.run_config.train.batch_size
        batches = eval_loader(
            source, Pairs(self.tokenizer, self.run_config.model.text.context), image_size=self.run_config.image_size,
            batch_size=size, host=self.host, hosts=self.hosts, threads=self.run_config.data.threads,
        )  # fmt: skip
        parts = []
        for step, batch in enumerate(batches):
            out = predict(batch)
            keep = np.flatnonzero(out["mask"])
            caption = np.ascontiguousarray(out["caption"][keep], np.int32).view(np.int64)[:, 0]
            parts.append((out["image_embedding"][keep], out["text_embedding"][keep], caption, step * size + keep))
        image, text, caption, record = (np.concatenate(p) for p in zip(*parts, strict=True))
        return Embedded(image, text, caption, np.full(len(record), number), record)

    def _pictured(self, pairs: Embedded, count: int, places: dict[str, np.ndarray]) -> dict[str, list[dict[str, Any]]]:
        """Queries spread over the source, with the best candidates, their scores, and which of them are right."""

        def caption(row: int) -> str:
            return caption_of(self.sources[pairs.source[row]], int(pairs.record[row]))

        def image(row: int) -> np.ndarray:
            return image_of(self.sources[pairs.source[row]], int(pairs.record[row]), self.run_config.image_size)

        out = {}
        for name, way, queries, candidates, ask, answer in (
            ("captions", "image_to_text", pairs.image, pairs.text, image, caption),
            ("images", "text_to_image", pairs.text, pairs.image, caption, image),
        ):
            rows = sample(np.arange(count), PICTURED)
            found, scores = best(queries[rows], candidates, ANSWERS)
            out[name] = [
                {
                    "query": ask(row),
                    "answers": [answer(i) for i in indices],
                    "scores": values,
                    "right": pairs.caption[indices] == pairs.caption[row],
                    "own": answer(row),
                    "rank": places[way][row],
                }
                for row, indices, values in zip(rows, found, scores, strict=True)
            ]
        return out
