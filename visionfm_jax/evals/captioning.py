"""Captions that the model writes, against the true ones. Shapes: B batch, N images, L tokens, H W image."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.data.sources import read_record
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals.caption_metrics import bleu4, cider, exact
from visionfm_jax.evals.captions import captions_of
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import CaptioningConfig
from visionfm_jax.evals.multimodal import CaptionedImages, MultimodalEval
from visionfm_jax.evals.sampling import image_of, sample
from visionfm_jax.models.generate import Decoding

PICTURED = 12
KEPT = 200  # captions in the details


class CaptioningEval(MultimodalEval):
    """The `evals.eval.Eval` of captioned images: exact (a share), BLEU-4 and CIDEr of one caption written for each.

    All captions of an image are its references. Nucleus sampling draws from the record's number alone.

    Attributes:
      details: also `captions`, of the first images: key, what was written, references.
      pictured: `generated`, a list of image (H, W, 3), what was written, the first true caption, and whether it is
        right, that is one of the true ones.
    """

    def more_settings(self) -> dict[str, Any]:
        """How texts are written and read."""
        self.tokenizer = open_tokenizer(self.run_config.task.tokenizer)
        self.decoding = decoding_of(self.config)
        return {
            "tokenizer": Path(self.tokenizer.name).name,
            "context": self.run_config.model.text.context,
            "decoding": self.decoding._asdict(),
        }

    def run(self, predict: Predict) -> dict[str, float]:
        """One caption for every image."""
        written, records = [], []
        for batch in self.batches(CaptionedImages()):
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
