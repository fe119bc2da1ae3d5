"""Trains a SentencePiece model on the captions of a configuration's training data.

    python -m visionfm_jax.data.tokenizer train --config=configs/NAME.py --vocab_size=32000

Byte pairs (Sennrich et al. 2016) by SentencePiece's own trainer, whose counts are whole numbers: the same captions give
the same file, byte for byte. Characters too rare for the vocabulary are spelt in bytes, so no text has unknown words.
Ids: 0 padding, 1 begin, 2 end, 3 unknown, 4 mask ("<mask>", which no text can hold).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable

from visionfm_jax.errors import ConfigError, DataError

COVERAGE = 0.9999  # share of the captions' characters that get a piece of their own
LONGEST = 1000  # characters of a caption that are read; SentencePiece skips lines of more than 4,192 bytes
TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def train(captions: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces, those of padding, begin, end, unknown, mask and 256 bytes included.

    Raises:
      ConfigError: the captions hold fewer pieces, or more characters.
      DataError: there is no caption.
    """
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(captions), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            character_coverage=COVERAGE, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            control_symbols=["<mask>"], shuffle_input_sentence=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if most := TOO_HIGH.search(text):
            raise ConfigError(
                f"--vocab_size={vocab_size}: the captions hold only {most[1]} different pieces; set {most[1]} or less, "
                "or read more captions"
            ) from None
        if least := TOO_LOW.search(text):
            raise ConfigError(
                f"--vocab_size={vocab_size}: the captions' characters, 256 bytes and the special tokens are "
                f"{least[1]} pieces already; set more"
            ) from None
        raise DataError(f"SentencePiece cannot train on these captions ({text})") from None
    return model.getvalue()
