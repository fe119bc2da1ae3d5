"""Perplexity of masked words, with the image and without it. Shapes: B batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.data.fields import Texts
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.multimodal import MultimodalEval


class PerplexityEval(MultimodalEval):
    """The `evals.eval.Eval` of masked words in captions: perplexity, exp of the mean NLL per masked token.

    `perplexity_without_image` is that of the same words without the image, `image_gain` how many times higher it is:
    above 1, the image is used. Of several captions of an image the first counts. Which words are masked depends on
    the record's number alone.
    """

    def more_settings(self) -> dict[str, Any]:
        """Texts, and how many of their words are masked."""
        self.tokenizer = open_tokenizer(self.run_config.task.tokenizer)
        return {
            "tokenizer": Path(self.tokenizer.name).name,
            "context": self.run_config.model.text.context,
            "word_mask_ratio": self.run_config.task.word_mask_ratio,
        }

    def run(self, predict: Predict) -> dict[str, float]:
        """Over all masked words of the source, each text once."""
        nll = without = words = texts = np.float64(0)
        for batch in self.batches(Texts(self.tokenizer, self.run_config.model.text.context)):
            out = predict(batch, "masked_language")
            keep = out["mask"] > 0
            nll += out["nll"][keep].sum(dtype=np.float64)
            without += out["nll_without_image"][keep].sum(dtype=np.float64)
            words += out["words"][keep].sum(dtype=np.float64)
            texts += keep.sum()
        with np.errstate(all="ignore"):  # a model far off has a perplexity of inf, no words have one of nan
            scores = {
                "perplexity": float(np.exp(nll / words)),
                "perplexity_without_image": float(np.exp(without / words)),
                "image_gain": float(np.exp((without - nll) / words)),
                "words": float(words),
                "texts": float(texts),
            }
        self.describe()
        return scores
