"""Train a SentencePiece model on the captions in the training data of a configuration.

    python -m visionfm_jax.data.tokenizer train --config=configs/NAME.py --vocab_size=32000

Byte-pair encoding (Sennrich et al. 2016) with byte fallback: characters too rare for the vocabulary are encoded as
bytes, so no text has unknown words. The same captions give the same file, byte for byte. Special tokens: 0 padding, 1
begin, 2 end, 3 unknown, 4 mask ("<mask>", which cannot occur in a text).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from visionfm_jax.config import Config
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data.sources import Source, open_sources, read_record
from visionfm_jax.data.sources.record import DamagedRecord, has_text
from visionfm_jax.data.tokenizer import SHIPPED
from visionfm_jax.errors import ConfigError, DataError, UserError
from visionfm_jax.storage import replacing

COVERAGE = 0.9999  # share of the captions' characters that get a piece of their own
LONGEST = 1000  # characters of a caption that are read; SentencePiece skips lines of more than 4,192 bytes
RESERVED = 5 + 256  # pieces: padding, begin, end, unknown, mask, and the bytes
SENTENCES = 10_000_000  # captions; SentencePiece holds them in memory
MEASURED = 100_000  # captions on which the model is tried
CHUNK = 1024  # records that the threads read before the trainer gets them
TOO_HIGH = re.compile(r"Vocabulary size too high \(\d+\)\. Please set it to a value <= (\d+)")
TOO_LOW = re.compile(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)")


def train(captions: Iterable[str], vocab_size: int) -> bytes:
    """A SentencePiece model of `vocab_size` pieces, those of padding, begin, end, unknown, mask and 256 bytes included.

    Raises:
      ConfigError: the captions hold fewer pieces, or more characters.
      DataError: SentencePiece can do nothing with the captions.
    """
    from sentencepiece import SentencePieceTrainer

    if vocab_size <= RESERVED:
        raise ConfigError(f"--vocab_size={vocab_size}: special tokens and bytes are {RESERVED} pieces; set more")
    model, failed = io.BytesIO(), []

    def read() -> Iterator[str]:
        try:
            yield from captions
        except BaseException as error:  # SentencePiece would tell it as its own
            failed.append(error)
            raise

    try:
        SentencePieceTrainer.train(
            sentence_iterator=read(), model_writer=model, vocab_size=vocab_size, model_type="bpe",
            character_coverage=COVERAGE, byte_fallback=True, pad_id=0, bos_id=1, eos_id=2, unk_id=3,
            control_symbols=["<mask>"], shuffle_input_sentence=False, num_threads=1, minloglevel=2,
        )  # fmt: skip
    except (OSError, RuntimeError) as error:
        if failed:
            raise failed[0] from None
        text = " ".join(str(error).split())
        if most := TOO_HIGH.search(text):
            raise ConfigError(
                f"--vocab_size={vocab_size}: the captions hold only {most[1]} different pieces; set {most[1]} or less, "
                "or give more captions"
            ) from None
        if least := TOO_LOW.search(text):
            raise ConfigError(
                f"--vocab_size={vocab_size}: special tokens, bytes and the captions' characters are {least[1]} pieces; "
                f"set {least[1]} or more"
            ) from None
        raise DataError(f"SentencePiece cannot train on these captions ({text}); give others") from None
    return model.getvalue()


class Captions:
    """The captions of sources, one after another in the sources' order: about `sentences`, evenly spaced, or all.

    Attributes:
      read, damaged: captions given, and left out because they are empty, no UTF-8 or cannot be read.
      sample: some of those given, evenly spaced.
    """

    def __init__(self, sources: Sequence[Source], sentences: int, threads: int):
        expected = sum(len(s) * s.most_captions for s in sources)
        share = min(1.0, sentences / expected)
        self._rows = [np.linspace(0, len(s) - 1, max(1, int(len(s) * share))).astype(np.int64) for s in sources]
        self._sources, self._threads = sources, threads
        self._every = max(1, round(expected * share) // MEASURED)
        self.read, self.damaged, self.sample = 0, 0, []

    def __iter__(self) -> Iterator[str]:
        total = sum(map(len, self._rows))
        with ThreadPoolExecutor(self._threads) as pool, tqdm(total=total, desc="captions", unit="image") as bar:
            for source, rows in zip(self._sources, self._rows, strict=True):
                for start in range(0, len(rows), CHUNK):
                    chunk = rows[start : start + CHUNK]
                    for texts in pool.map(lambda row, source=source: _texts(source, int(row)), chunk):
                        for text in texts:
                            if text is None:
                                self.damaged += 1
                                continue
                            if self.read % self._every == 0:
                                self.sample.append(text)
                            self.read += 1
                            yield text
                    bar.update(len(chunk))
        if not self.read:
            raise DataError(
                f"{', '.join(s.name for s in self._sources)}: none of the {self.damaged:,} captions can be read; "
                "see the log for the reasons"
            )


def _texts(source: Source, row: int) -> list[str | None]:
    """A record's captions; None for one that is damaged."""
    try:
        captions = read_record(source, row)["caption"]
    except DamagedRecord:
        return [None]
    captions = captions if isinstance(captions, tuple) else (captions,)
    try:
        texts = [c.decode() if isinstance(c, bytes) else c for c in captions]
    except UnicodeDecodeError:
        return [None]
    return [text.encode(errors="ignore").decode()[:LONGEST] if has_text(text) else None for text in texts]


def run(config: Config, vocab_size: int, out: Path, sentences: int) -> str:
    """Train on the captions of `config.data.train`, write the model to `out`, and tell what was done.

    Raises:
      ConfigError: `vocab_size` does not suit the captions.
      DataError: there are no captions, or the sources cannot be opened.
      UserError: `out` cannot be written.
    """
    sources = [source for source in open_sources(config.data.train, "data.train") if source.has_captions]
    if not sources:
        raise DataError("config.data.train: no source has captions; add one that has, or set its caption_key")
    captions = Captions(sources, sentences, config.data.threads)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as part:  # opened first: what cannot be written is known before hours of work
            model = train(captions, vocab_size)
            part.write_bytes(model)
    except OSError as error:
        raise UserError(f"--out={out}: {error.strerror or error}; name a file that can be written") from error
    return report(config, captions, model) + f"\n{out}: {len(model):,} bytes"


def report(config: Config, captions: Captions, model: bytes) -> str:
    """What was read and what the model makes of it, for people."""
    from sentencepiece import SentencePieceProcessor

    core, text = SentencePieceProcessor(model_proto=model), config.model.text
    pieces = core.encode(captions.sample)
    lengths = np.array([len(p) for p in pieces])
    ids, counts = np.unique(np.concatenate(pieces), return_counts=True)
    spelt = sum(int(n) for i, n in zip(ids, counts, strict=True) if core.is_byte(int(i)))
    unknown = int(counts[ids == core.unk_id()].sum())
    left_out = f"; {captions.damaged:,} empty or unreadable ones are left out" if captions.damaged else ""
    size = core.get_piece_size()
    lines = [
        f"{captions.read:,} captions read{left_out}",
        f"{size:,} pieces: {RESERVED} special tokens and bytes, {size - RESERVED:,} of the captions",
        f"{lengths.mean():.1f} tokens a caption; {unknown / lengths.sum():.3%} of the tokens unknown, "
        f"{spelt / lengths.sum():.3%} single bytes",
        f"{(lengths > text.context - 2).mean():.2%} of the captions are longer than the {text.context - 2} tokens "
        f"that model.text.context={text.context} leaves them",
    ]
    if size != text.vocab_size:
        lines.append(f"the configuration has another size: set config.model.text.vocab_size={size}")
    return "\n".join(lines)


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.data.tokenizer") -> None:
    """Parse, train, print."""
    parser = Parser(program, __doc__)
    parser.add_argument("action", choices=("train",))
    parser.add_argument("--vocab_size", type=int, help="number of pieces (config.model.text.vocab_size)")
    parser.add_argument("--out", type=Path, help="file to write (config.task.tokenizer)")
    parser.add_argument(
        "--sentences", type=int, default=SENTENCES, help="maximum number of captions to read (%(default)s)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    config, known = parser.parse_with_config(argv)
    if not config.task.reads_captions:
        raise ConfigError(f"{config.name}: its task reads no captions; name a configuration that does")
    if known.sentences < 1:
        raise ConfigError(f"--sentences={known.sentences}: must be at least 1; raise it")
    out = known.out or Path(config.task.tokenizer)
    if known.out is None and config.task.tokenizer in ("", "clip", *SHIPPED):
        raise ConfigError(
            f"config.task.tokenizer = {config.task.tokenizer!r} names no file to write; set --out=FILE.model"
        )
    out = out.expanduser()
    if out.suffix != ".model":
        raise ConfigError(f"--out={out}: a SentencePiece model's name ends in .model; set such a one")
    if out.exists() and not known.overwrite:
        raise UserError(f"{out}: exists; add --overwrite to replace it, or name another by --out")
    vocab_size = config.model.text.vocab_size if known.vocab_size is None else known.vocab_size
    print(run(config, vocab_size, out, known.sentences))
