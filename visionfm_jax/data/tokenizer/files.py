"""A tokenizer as files for Hugging Face transformers, whose ids are those of training."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from visionfm_jax.data.tokenizer import SHIPPED, clip_pairs, open_tokenizer
from visionfm_jax.errors import DataError, UserError
from visionfm_jax.storage import read, read_bytes

_TEXTS = "visionfm_jax.data.text"


def huggingface_files(name: str, length: int) -> dict[str, bytes]:
    """The files that `AutoTokenizer.from_pretrained` reads, by name; texts have at most `length` tokens.

    A SentencePiece model, which transformers cannot read as it is, comes alone, as `tokenizer.model`.

    Args:
      name: as of `open_tokenizer`.
      length: of a text, with begin and end.

    Raises:
      ConfigError, DataError: as `open_tokenizer`.
    """
    if name == "clip":
        return _clip_files(length)
    if name in SHIPPED:
        return {"tokenizer.model": (resources.files(_TEXTS) / f"{name}.model").read_bytes()}
    if Path(name).suffix == ".model":
        open_tokenizer(name)
        return {"tokenizer.model": read(Path(name).read_bytes, lambda: f"tokenizer {name}")}
    return _json_files(name, length)


def require_same_texts(name: str, padding_counts: bool) -> None:
    """Refuse a `tokenizer.json` whose library gives a text other ids than training here would: begin, text, end, zeros.

    Args:
      name: the file, in the folder of its model.
      padding_counts: the model reads what stands behind the end, too.

    Raises:
      UserError: it does.
      DataError: as `open_tokenizer`.
    """
    from tokenizers import Tokenizer

    ours, core = open_tokenizer(name), Tokenizer.from_file(name)
    core.no_truncation()
    core.no_padding()
    words = "two cats on a sofa"
    there, here = core.encode(words).ids, [ours.begin, *ours.encode(words), ours.end]
    if there != here:
        raise UserError(
            f"{name}: reads {words!r} as {there}, and here it would be {here}; use the model for images alone"
        )
    path = Path(name).with_name("tokenizer_config.json")
    try:
        said = json.loads(read_bytes(path) or b"{}").get("pad_token")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: is no JSON object; get the file again") from error
    pad = said.get("content") if isinstance(said, dict) else said
    if padding_counts and core.token_to_id(str(pad)) != 0:
        raise UserError(f"{name}: texts are padded by {pad!r}, and here by the token 0; use the model for images alone")


def _clip_files(length: int) -> dict[str, bytes]:
    signs, pairs = clip_pairs()
    begin, end = "<|startoftext|>", "<|endoftext|>"
    words = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, pairs), begin, end]
    settings = {
        "tokenizer_class": "CLIPTokenizer", "bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": "!",
        "model_max_length": length, "do_lower_case": True,
    }  # fmt: skip
    merges = ["#version: 0.2", *map(" ".join, pairs), ""]
    return {
        "vocab.json": _json({word: i for i, word in enumerate(words)}), "merges.txt": "\n".join(merges).encode(),
        "tokenizer_config.json": _json(settings),
    }  # fmt: skip


def _json_files(name: str, length: int) -> dict[str, bytes]:
    """Of a `tokenizer.json`, with the begin and the end that training puts around a text."""
    from tokenizers import Tokenizer, processors

    begin, end = (open_tokenizer(name).begin, open_tokenizer(name).end)
    core = Tokenizer.from_file(name)
    core.no_truncation()
    core.no_padding()
    words = [core.id_to_token(i) for i in (begin, end, 0)]
    core.post_processor = processors.TemplateProcessing(
        single=f"{words[0]} $A {words[1]}", special_tokens=list(zip(words[:2], (begin, end), strict=True))
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": words[0], "eos_token": words[1],
        "pad_token": words[2], "model_max_length": length,
    }  # fmt: skip
    return {"tokenizer.json": core.to_str(pretty=True).encode(), "tokenizer_config.json": _json(settings)}


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()
