"""Zero-shot classification: images against the names of classes. Shapes: B batch, N images, C classes, E embedding."""

from __future__ import annotations

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import Labels
from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import DataError
from visionfm_jax.evals.by_class import LabelledEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import ZeroShotConfig
from visionfm_jax.evals.metrics import class_embeddings, classify
from visionfm_jax.evals.protocol import texts_of
from visionfm_jax.evals.text_embedding import embed_texts

PROMPTS = "imagenet_prompts_short"


class ZeroShotEval(LabelledEval):
    """The `evals.eval.Eval` of labelled images and a contrastive model: top1, top5, balanced_accuracy as shares.

    Beside them stands `majority`, the share of the largest class: what a model that always guesses it has as top1.

    Attributes:
      protocol: 8 hex digits of what was measured: prompts, names, dataset, preprocessing, tokenizer.
      details: after a run, for JSON: protocol and its settings, and `ByClass.details`.
      pictured: after a run, on host 0: images with label and guess, and the confusion matrix.
    """

    def __init__(self, config: ZeroShotConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.classes, self.prompts = self._classes(), self._prompts()
        self.tokenizer = open_tokenizer(run.task.tokenizer)
        self.settings |= texts_of(self.tokenizer, run.model.text.context)
        self.settings |= {"prompts": self.prompts, "classes": self.classes}

    def run(self, predict: Predict) -> dict[str, float]:
        """Every image once, against class embeddings of the weights that `predict` has now."""
        texts = [prompt.replace("{}", name) for prompt in self.prompts for name in self.classes]
        classes = class_embeddings(
            embed_texts(
                predict, texts, self.tokenizer, context=self.run_config.model.text.context,
                batch_size=self.batch_size, host=self.host, hosts=self.hosts,
            ),
            len(self.classes),
        )  # fmt: skip
        images, labels, records = self._images(predict)
        result = classify(images, classes, labels)
        return {"top1": result.top1, "top5": result.top5, **self.by_class(labels, result.guess, records)}

    def _classes(self) -> tuple[str, ...]:
        """The names, one a class of the dataset."""
        source = self.source
        if not source.num_classes:
            raise DataError(f"{source.name} has no labels, which zero-shot needs; set another source")
        if not self.config.classes:
            if source.class_names is None:
                raise DataError(f"{source.name} has no names of its classes; set classes to a list of them")
            return tuple(source.class_names)
        names = read_lines(self.config.classes)
        if len(names) != source.num_classes:
            raise DataError(
                f"classes {self.config.classes!r} has {len(names)} names, but {source.name} has "
                f"{source.num_classes} classes; give one name a class, in the order of the labels"
            )
        return names

    def _prompts(self) -> tuple[str, ...]:
        prompts = self.config.prompts or PROMPTS
        lines = (prompts,) if "{}" in prompts else read_lines(prompts)
        lines = tuple(line.replace("{c}", "{}") for line in lines)  # as CLIP_benchmark's files have it
        for number, line in enumerate(lines, 1):
            if line.count("{}") != 1:
                raise DataError(
                    f"prompts {prompts!r}, line {number}: {line!r} "
                    "needs exactly one {}, where the name of the class goes; write it there"
                )
        return lines

    def _images(self, predict: Predict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Embeddings (N, E), labels (N,) and numbers (N,) of the readable records, of all hosts."""
        parts = []
        for batch in self.batches(self.source, Labels(len(self.classes))):
            out = predict(batch)
            keep = np.flatnonzero(out["mask"])
            parts.append((out["image_embedding"][keep], out["label"][keep], out["record"][keep]))
        images, labels, records = (np.concatenate(p) for p in zip(*parts, strict=True))
        return images, labels, records
