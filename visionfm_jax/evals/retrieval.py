"""Retrieval of captions by image and of images by caption.

Shapes: B batch, N images, C captions an image at most, T captions, E embedding, L tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Row, Spec, Texts
from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.tokenizer import Tokenizer, open_tokenizer
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.captions import captions_of, require_captions
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import RetrievalConfig
from visionfm_jax.evals.metrics import best, ranks, recall
from visionfm_jax.evals.protocol import measured_on, texts_of
from visionfm_jax.evals.sampling import image_of, sample

KS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
PICTURED = 6  # queries each way
ANSWERS = 5


class AllCaptions(Texts):
    """The captions of an image, all: `text` int32 (C, L), `captions` int32, how many there are, `caption` int32 (C, 2).

    That is a hash of each caption itself, which may be longer than L tokens. It travels with the rows: no host has the
    captions of the others, and all must know which are the same.
    """

    def __init__(self, tokenizer: Tokenizer, length: int, most: int):
        super().__init__(tokenizer, length)
        self.most = most
        self.spec: Spec = {
            "text": ((most, length), np.int32),
            "caption": ((most, 2), np.int32),
            "captions": ((), np.int32),
        }

    def __call__(self, record: Mapping[str, Any], rng: np.random.Generator | None = None) -> Row:
        captions = captions_of(record)
        if not captions:
            raise DamagedRecord("there is no caption that is neither empty nor damaged")
        row: Row = {key: np.zeros(shape, dtype) for key, (shape, dtype) in self.spec.items()}
        for i, caption in enumerate(captions):
            row["text"][i] = self.tokenizer(caption, self.length)
            digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()
            row["caption"][i] = np.frombuffer(digest, np.int32)
        return {**row, "captions": len(captions)}


class Embedded(NamedTuple):
    """Readable records of one or more sources, of all hosts, in order."""

    image: np.ndarray  # (N, E)
    ids: np.ndarray  # (N, C) int64, those of the image's captions; some repeated where it has fewer
    source: np.ndarray  # (N,) number of the source: 0 the eval's own, then the gallery's
    record: np.ndarray  # (N,) number of the record in it
    text: np.ndarray  # (T, E)
    caption: np.ndarray  # (T,) int64, equal where the captions are
    owner: np.ndarray  # (T,) the caption's image
    place: np.ndarray  # (T,) among the captions of its record


class RetrievalEval(OpenedEval):
    """The `evals.eval.Eval` of captioned images and a contrastive model: R@1, 5 and 10 as shares, both ways.

    Queries are the source's images and captions; candidates are its captions and images and those of the gallery. Each
    of several captions of an image is a query and a candidate (Lin et al. 2014). Right for an image is any of its
    captions, and for a caption its image; and likewise where another image has the very same caption: each is as good
    an answer as the other. Ties and embeddings that are not finite count against the model, see `evals.metrics`.

    Attributes:
      protocol: 8 hex digits of what was measured: source, gallery, preprocessing, tokenizer.
      details: after a run, for JSON: protocol and its settings.
      pictured: after a run, on host 0: `captions` and `images`, lists of queries with their best answers.
    """

    def __init__(self, config: RetrievalConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        require_captions(self.sources, config.kind)
        self.tokenizer = open_tokenizer(run.task.tokenizer)
        self.settings = {
            "sources": list(map(measured_on, self.sources, config.sources)),
            **self.transform.settings,
            **texts_of(self.tokenizer, run.model.text.context),
        }
        if (most := max(s.most_captions for s in self.sources)) > 1:
            self.settings["captions"] = most

    def run(self, predict: Predict) -> dict[str, float]:
        """Recalls and median ranks over all queries, each once."""
        parts = [self._embed(predict, number, source) for number, source in enumerate(self.sources)]
        images, texts = len(parts[0].image), len(parts[0].text)
        pairs = _joined(parts)
        del parts  # gigabytes
        places = {
            "image_to_text": ranks(pairs.image[:images], pairs.text, pairs.ids[:images], pairs.caption),
            "text_to_image": ranks(pairs.text[:texts], pairs.image, pairs.caption[:texts], pairs.ids),
        }
        scores = {f"{way}_r{k}": recall(places[way], k) for way in WAYS for k in KS}
        scores |= {f"{way}_median_rank": float(np.median(places[way])) for way in WAYS}
        scores |= {"queries": float(images), "candidates": float(len(pairs.image))}
        if pairs.ids.shape[1] > 1:
            scores |= {"caption_queries": float(texts), "caption_candidates": float(len(pairs.text))}
        self.describe()
        if self.host == 0:
            self.pictured = self._pictured(pairs, images, texts, places)
        return scores

    def _embed(self, predict: Predict, number: int, source: Source) -> Embedded:
        most = source.most_captions
        fields = AllCaptions(self.tokenizer, self.run_config.model.text.context, most)
        parts, images = [], 0
        for batch in self.batches(source, fields):
            texts = batch.pop("text")
            out = predict({**batch, "text": texts[:, 0]})
            keep = np.flatnonzero(out["mask"])
            there = np.arange(most) < out["captions"][keep, None]
            ids = np.ascontiguousarray(out["caption"][keep], np.int32).view(np.int64)[..., 0]
            row, place = np.nonzero(there)
            text = np.empty((len(row), out["text_embedding"].shape[1]), np.float32)
            for i in range(most):  # one after another: the memory of a batch is that of training's
                found = out if i == 0 else predict({"text": texts[:, i]})
                text[place == i] = found["text_embedding"][keep[row[place == i]]]
            parts.append(
                Embedded(
                    image=out["image_embedding"][keep],
                    ids=np.where(there, ids, ids[:, :1]),
                    source=np.full(len(keep), number),
                    record=out["record"][keep],
                    text=text,
                    caption=ids[there],
                    owner=images + row,
                    place=place,
                )
            )
            images += len(keep)
        return Embedded(*map(np.concatenate, zip(*parts, strict=True)))

    def _pictured(
        self, pairs: Embedded, images: int, texts: int, places: dict[str, np.ndarray]
    ) -> dict[str, list[dict[str, Any]]]:
        """Queries spread over the source, with the best candidates, their scores, and which of them are right."""

        def caption(text: int) -> str:
            row = pairs.owner[text]
            record = read_record(self.sources[pairs.source[row]], int(pairs.record[row]))
            return captions_of(record)[pairs.place[text]]

        def image(row: int) -> np.ndarray:
            return image_of(self.sources[pairs.source[row]], int(pairs.record[row]), self.transform)

        captions = []
        asked = sample(np.arange(images), PICTURED)
        found, scores = best(pairs.image[asked], pairs.text, ANSWERS)
        for row, answers, values in zip(asked, found, scores, strict=True):
            captions.append(
                {
                    "query": image(row),
                    "answers": [caption(i) for i in answers],
                    "scores": values,
                    "right": np.isin(pairs.caption[answers], pairs.ids[row]),
                    "own": caption(np.searchsorted(pairs.owner, row)),
                    "rank": places["image_to_text"][row],
                }
            )
        pictures = []
        asked = sample(np.arange(texts), PICTURED)
        found, scores = best(pairs.text[asked], pairs.image, ANSWERS)
        for text, answers, values in zip(asked, found, scores, strict=True):
            pictures.append(
                {
                    "query": caption(text),
                    "answers": [image(i) for i in answers],
                    "scores": values,
                    "right": (pairs.ids[answers] == pairs.caption[text]).any(1),
                    "own": image(pairs.owner[text]),
                    "rank": places["text_to_image"][text],
                }
            )
        return {"captions": captions, "images": pictures}


def _joined(parts: Sequence[Embedded]) -> Embedded:
    """The records of all sources as one; one source after another."""
    most, before, out = max(part.ids.shape[1] for part in parts), 0, []
    for part in parts:
        ids = np.pad(part.ids, ((0, 0), (0, most - part.ids.shape[1])), mode="edge")  # repeats one of its own
        out.append(part._replace(ids=ids, owner=before + part.owner))
        before += len(part.image)
    return Embedded(*map(np.concatenate, zip(*out, strict=True)))
