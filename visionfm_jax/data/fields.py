"""What a task wants of a record beside its image: a label or a caption. Shapes: L tokens of a text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from visionfm_jax.config import ClipConfig, Config
from visionfm_jax.data.batches import Row, Spec
from visionfm_jax.data.sources import Source
from visionfm_jax.data.tokenizer import Tokenizer, open_tokenizer
from visionfm_jax.errors import ConfigError, DataError


class DamagedCaption(Exception):
    """A caption without a letter in it, or that is not UTF-8."""


class Fields(Protocol):
    """Makes the part of a row that is not its image; can be pickled for worker processes."""

    spec: Spec  # of a row

    def __call__(self, record: Mapping[str, Any]) -> Row:
        """The fields of `spec`.

        Raises:
          DamagedCaption: the record must be left out.
        """
        ...

    def check(self, source: Source) -> None:
        """Refuse a source whose records lack the fields.

        Raises:
          DataError: with what to set instead.
        """
        ...


class Labels:
    """`label`, int32 below `num_classes`."""

    def __init__(self, num_classes: int):
        self.spec: Spec = {"label": ((), np.int32)}
        self.num_classes = num_classes

    def __call__(self, record: Mapping[str, Any]) -> Row:
        return {"label": record["label"]}

    def check(self, source: Source) -> None:
        if not source.num_classes:
            raise DataError(
                f"{source.name} has no labels, which this task learns from; set label_key, or another source"
            )
        if source.num_classes > self.num_classes:
            raise DataError(
                f"{source.name} has labels up to {source.num_classes - 1}, but config.task.num_classes = "
                f"{self.num_classes}; set it to {source.num_classes}"
            )


class Texts:
    """`text`, int32 (L,): the caption's tokens between those of begin and end, then zeros."""

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.spec: Spec = {"text": ((length,), np.int32)}
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, record: Mapping[str, Any]) -> Row:
        caption = record["caption"]
        try:
            caption = caption.decode() if isinstance(caption, bytes) else caption
        except UnicodeDecodeError as error:
            raise DamagedCaption("the caption is not UTF-8") from error
        if not caption.strip():
            raise DamagedCaption("the caption is empty")
        return {"text": self.tokenizer(caption, self.length)}

    def check(self, source: Source) -> None:
        if not source.has_captions:
            raise DataError(
                f"{source.name} has no captions, which this task learns from; set caption_key, or another source"
            )


def fields_of(config: Config) -> Fields:
    """What the run's task wants.

    Raises:
      ConfigError: the tokenizer's vocabulary is not the text tower's.
      DataError: no such tokenizer.
    """
    if not isinstance(config.model, ClipConfig):
        return Labels(config.task.num_classes)
    text, tokenizer = config.model.text, open_tokenizer(config.task.tokenizer)
    if tokenizer.vocab_size > text.vocab_size:
        raise ConfigError(
            f"config.model.text.vocab_size = {text.vocab_size}: {tokenizer.name} has {tokenizer.vocab_size} entries; "
            f"set it to {tokenizer.vocab_size} or more"
        )
    if tokenizer.end != text.end_token:
        raise ConfigError(
            f"config.model.text.end_token = {text.end_token}: {tokenizer.name} ends a text by {tokenizer.end}; set "
            f"it to {tokenizer.end}"
        )
    return Texts(tokenizer, text.context)
