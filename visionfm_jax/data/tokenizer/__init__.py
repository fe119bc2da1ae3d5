"""Captions to token ids and back: CLIP's tokenizer, a Hugging Face `tokenizer.json`, or a SentencePiece model.

`clip` gives the ids of OpenCLIP's `SimpleTokenizer` (open_clip_torch 3.3): ftfy mends the text, HTML entities are
resolved twice, runs of blanks become one, letters become small, then byte pairs (Radford et al. 2021). One difference:
the words `<start_of_text>` and `<end_of_text>` in a caption are text like any other.

The text tower reads a text off at its first end token, so no text may hold that id itself: a file's special tokens are
not recognised inside of captions, and an unknown word that a file maps to its end token is dropped.

    python -m visionfm_jax.data.tokenizer train --config=configs/NAME.py --vocab_size=32000

makes a SentencePiece model of a configuration's captions, see `data.tokenizer.train`.
"""

from __future__ import annotations

import functools
import gzip
import html
import zlib
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from visionfm_jax.errors import ConfigError, DataError, one_line
from visionfm_jax.storage import read

if TYPE_CHECKING:  # imported where they are used: bare GPU images, which train on no captions, lack them
    import tokenizers

# What files call the tokens of begin and end, in the order of preference.
BEGIN_END = (
    ("<|startoftext|>", "<|endoftext|>"),
    ("<start_of_text>", "<end_of_text>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<s>", "</s>"),
    ("[CLS]", "[SEP]"),
)
MASKS = ("<mask>", "[MASK]")
PADS = ("<pad>", "[PAD]")
SHIPPED = ("emoji",)  # SentencePiece models beside CLIP's vocabulary; data/text/CREDITS.md
CLIP_VOCABULARY = "bpe_simple_vocab_16e6.txt.gz"
CLIP_MERGES = 49_152 - 256 - 2
CLIP_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_TEXTS = "visionfm_jax.data.text"
_NAMES = ", ".join(map(repr, ("clip", *SHIPPED)))
SHORTEST = 3  # tokens: begin, one of the text, end


class Model(NamedTuple):
    """The encoder and the special tokens of a tokenizer."""

    vocab_size: int  # one more than the largest id
    begin: int
    end: int
    mask: int | None  # stands for a token to guess
    pad: int | None
    encode: Callable[[str], list[int]]  # a text's ids, without begin and end
    decode: Callable[[list[int]], str]


class Tokenizer:
    """Texts to ids; made by `open_tokenizer`. Threads may share it; another process opens the same name again."""

    def __init__(self, name: str, model: Model):
        self.name = name
        self.vocab_size, self.begin, self.end, self.mask, self._pad, self._encode, self._decode = model

    def __call__(self, text: str, length: int) -> np.ndarray:
        """int32 (length,): begin, as many tokens as leave room for the end, end, zeros.

        Raises:
          ConfigError: `length` is below 3.
        """
        if length < SHORTEST:
            raise ConfigError(
                f"model.text.context = {length}: a text needs {SHORTEST} tokens (begin, one of its own, end); raise it"
            )
        ids = self.encode(text)[: length - 2]
        row = np.zeros(length, np.int32)
        row[: len(ids) + 2] = (self.begin, *ids, self.end)
        return row

    def encode(self, text: str) -> list[int]:
        """The ids of a text, however long, without begin and end; none of them is that of the end."""
        return [i for i in self._encode(text) if i != self.end]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids (L,) up to the first end; begin, padding, mask and ids past the vocabulary are left out."""
        ids = [int(i) for i in ids]
        ids = ids[: ids.index(self.end)] if self.end in ids else ids
        silent = (self.begin, self.mask, self._pad)
        return self._decode([i for i in ids if i not in silent and 0 <= i < self.vocab_size]).strip()

    def __reduce__(self) -> tuple[Callable[[str], Tokenizer], tuple[str]]:
        return open_tokenizer, (self.name,)


@functools.cache  # a process opens a name once
def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer `name`: "clip", "emoji", or the path of a file whose name ends in .json or .model.

    Raises:
      ConfigError: another name.
      DataError: no such file, one that cannot be read, or one without a token of begin or end.
    """
    if name == "clip":
        return Tokenizer(name, _clip())
    if name in SHIPPED:
        return Tokenizer(name, _sentencepiece(str(resources.files(_TEXTS) / f"{name}.model")))
    opener = {".json": _huggingface, ".model": _sentencepiece}.get(Path(name).suffix)
    if opener is None:
        raise ConfigError(f"tokenizer {name!r}: neither {_NAMES} nor a file .json or .model; give one of them")
    if not read(Path(name).is_file, lambda: f"tokenizer {name}"):
        raise DataError(f"tokenizer {name}: no such file; give {_NAMES}, or the path of a .json or .model file")
    return Tokenizer(name, opener(name))


def content_of(name: str) -> bytes | None:
    """Of the file `name`; None: it is a tokenizer that ships.

    Raises:
      DataError: it cannot be read.
    """
    if name == "clip" or name in SHIPPED:
        return None
    try:
        return Path(name).read_bytes()
    except OSError as error:
        raise DataError(f"tokenizer {name}: cannot be read ({error.strerror}); give this user access") from error


def file_digest(name: str) -> str:
    """Of the tokenizer `name`: what ships by its name, a file by its content.

    Raises:
      DataError: it cannot be read.
    """
    content = content_of(name)
    return name if content is None else f"{zlib.crc32(content):08x}"


def _clip() -> Model:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    signs, merges = clip_pairs()
    words = [*signs, *(sign + "</w>" for sign in signs), *map("".join, merges)]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocabulary, merges, end_of_word_suffix="</w>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(CLIP_WORDS), "removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    begin, end = len(words), len(words) + 1
    byte_of = {**dict(zip(signs, clip_bytes(), strict=True)), " ": ord(" ")}

    def decode(ids: list[int]) -> str:
        text = "".join(words[i] for i in ids if i < begin).replace("</w>", " ")
        return bytes(byte_of[sign] for sign in text).decode(errors="replace")

    return Model(end + 1, begin, end, None, None, lambda text: core.encode(_cleaned(text)).ids, decode)


def clip_bytes() -> list[int]:
    """The bytes in the order of CLIP's vocabulary: first those whose sign is a character that can be seen."""
    seen = [b for b in range(256) if chr(b).isprintable() and not chr(b).isspace()]
    return seen + [b for b in range(256) if b not in seen]


def clip_pairs() -> tuple[list[str], list[tuple[str, str]]]:
    """The signs of the 256 bytes in CLIP's order, and the pairs that become one word, in order."""
    lines = gzip.decompress((resources.files(_TEXTS) / CLIP_VOCABULARY).read_bytes()).decode().split("\n")
    # A byte's sign: itself where that can be seen; the others follow in order, as signs from 256 on.
    seen = [chr(b) for b in clip_bytes() if chr(b).isprintable() and not chr(b).isspace()]
    signs = seen + [chr(256 + i) for i in range(256 - len(seen))]
    return signs, [tuple(line.split()) for line in lines[1 : 1 + CLIP_MERGES]]


def _cleaned(text: str) -> str:
    import ftfy

    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


def _huggingface(path: str) -> Model:
    from tokenizers import Tokenizer

    try:
        core = Tokenizer.from_file(path)
    except Exception as error:  # the library raises no narrower class
        raise DataError(
            f"tokenizer {path}: not a tokenizer.json of Hugging Face tokenizers ({one_line(error)}); name another file"
        ) from None
    core.no_truncation()
    core.no_padding()
    core.encode_special_tokens = True  # those in a text are text
    begin, end = _begin_and_end(core, path)

    def encode(text: str) -> list[int]:
        return core.encode(_whole(text), add_special_tokens=False).ids

    def first(tokens: Sequence[str]) -> int | None:
        return next((i for i in map(core.token_to_id, tokens) if i is not None), None)

    size = 1 + max(core.get_vocab().values())
    return Model(size, begin, end, first(MASKS), first(PADS), encode, core.decode)


def _begin_and_end(core: tokenizers.Tokenizer, path: str) -> tuple[int, int]:
    found = [tuple(core.token_to_id(token) for token in pair) for pair in BEGIN_END]
    for begin, end in found:
        if begin is not None and end is not None:
            return begin, end
    lacking = [
        f"it has {pair[ids[0] is None]} but no {pair[ids[0] is not None]}"
        for pair, ids in zip(BEGIN_END, found, strict=True)
        if ids != (None, None)
    ]
    raise DataError(
        f"tokenizer {path}: no tokens of begin and end ({'; '.join(lacking) or 'it has none of the usual ones'}); "
        f"it needs a pair of {', '.join(' '.join(pair) for pair in BEGIN_END)}: add it or take another tokenizer"
    )


def _sentencepiece(path: str) -> Model:
    from sentencepiece import SentencePieceProcessor

    try:
        core = SentencePieceProcessor(model_file=path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"tokenizer {path}: not a SentencePiece model ({one_line(error)}); name another file") from None
    ids = {"begin (bos)": core.bos_id(), "end (eos)": core.eos_id()}
    if lacking := [what for what, i in ids.items() if i < 0]:
        raise DataError(
            f"tokenizer {path}: the model has no token of {' and no token of '.join(lacking)}; train it with bos_id "
            "and eos_id, or take another"
        )
    found = (core.piece_to_id(piece) for piece in MASKS)  # the id of the unknown where there is none
    mask = next((i for i in found if not core.is_unknown(i)), None)
    pad = core.pad_id() if core.pad_id() >= 0 else None

    def encode(text: str) -> list[int]:
        return core.encode(_whole(text))

    return Model(core.get_piece_size(), core.bos_id(), core.eos_id(), mask, pad, encode, core.decode)


def _whole(text: str) -> str:
    """Halves of surrogate pairs joined, or replaced where alone: the libraries refuse them."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
