"""Perplexity of masked words, with the image and without it. Shapes: B batch."""

from __future__ import annotations

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Texts
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.captions import require_captions
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import PerplexityConfig
from visionfm_jax.evals.protocol import texts_of


class PerplexityEval(OpenedEval):
    """The `evals.eval.Eval` of masked words in captions: perplexity, exp of the mean NLL per masked token.

    `perplexity_without_image` is that of the same words without the image, `image_gain` how many times higher it is:
    above 1, the image is used. Of several captions of an image the first counts. Which words are masked depends on
    the record's number alone.
    """

    def __init__(self, config: PerplexityConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        require_captions(self.sources, config.kind)
        self.tokenizer = open_tokenizer(run.task.tokenizer)
        self.settings |= texts_of(self.tokenizer, run.model.text.context)
        self.settings |= {"word_mask_ratio": run.task.word_mask_ratio}

    def run(self, predict: Predict) -> dict[str, float]:
        """Over all masked words of the source, each text once."""
        nll = without = words = texts = np.float64(0)
        for batch in self.batches(self.source, Texts(self.tokenizer, self.run_config.model.text.context)):
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
