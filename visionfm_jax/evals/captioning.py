"""Captions that the model writes, against the true ones. Shapes: B batch, N images, L tokens, H W image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.sources import read_record
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.caption_metrics import bleu4, cider, exact
from visionfm_jax.evals.captions import CaptionedImages, captions_of, require_captions
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import CaptioningConfig
from visionfm_jax.evals.protocol import texts_of
from visionfm_jax.evals.sampling import image_of, sample
from visionfm_jax.models.generate import Decoding

PICTURED = 12
KEPT = 200  # captions in the details


class CaptioningEval(OpenedEval):
    """The `evals.eval.Eval` of captioned images: exact (a share), BLEU-4 and CIDEr of one caption written for each.

    All captions of an image are its references. Nucleus sampling draws from the record's number alone.

    Attributes:
      details: also `captions`, of the first images: key, what was written, references.
      pictured: `generated`, a list of image (H, W, 3), what was written, the first true caption, and whether it is
        right, that is one of the true ones.
    """

    def __init__(self, config: CaptioningConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        require_captions(self.sources, config.kind)
        self.tokenizer = open_tokenizer(run.task.tokenizer)
        self.decoding = decoding_of(config)
        self.settings |= texts_of(self.tokenizer, run.model.text.context)
        self.settings |= {"decoding": self.decoding._asdict()}

    def run(self, predict: Predict) -> dict[str, float]:
        """One caption for every image."""
        written, records = [], []
        for batch in self.batches(self.source, CaptionedImages()):
            out = predict(batch, self.decoding)
            keep = np.flatnonzero(out["mask"])
            written += [self.tokenizer.decode(ids) for ids in out["generated"][keep].tolist()]
            records += out["record"][keep].tolist()
        with ThreadPoolExecutor(self.run_config.data.threads) as pool:
            references = list(pool.map(self._references, records))
        scores = {
            "exact": float(exact(written, references)),
            "bleu4": float(bleu4(written, references)),
            "cider": float(cider(written, references)),
            "images": float(len(written)),
        }
        first = zip(records, written, references, strict=True)
        captions = [
            {"record": self.source.key(record), "generated": text, "references": list(known)}
            for (record, text, known), _ in zip(first, range(KEPT), strict=False)
        ]
        self.describe(captions=captions)
        if self.host == 0:
            rows = sample(np.arange(len(written)), PICTURED)
            self.pictured = {"generated": [self._shown(records[r], written[r], references[r]) for r in rows]}
        return scores

    def _references(self, record: int) -> tuple[str, ...]:
        """From the source itself: a host has not loaded the others' rows, and captions have no longest length."""
        return captions_of(read_record(self.source, record))

    def _shown(self, record: int, text: str, references: tuple[str, ...]) -> dict[str, Any]:
        return {
            "image": image_of(self.source, record, self.transform),
            "generated": text,
            "caption": references[0],
            "right": exact([text], [references]) == 1,
        }


def decoding_of(config: CaptioningConfig) -> Decoding:
    """The eval's, without the settings of other methods, which change nothing."""
    return {
        "greedy": Decoding("greedy"),
        "beam": Decoding("beam", beams=config.beams),
        "nucleus": Decoding("nucleus", top_p=config.top_p),
    }[config.decoding]
