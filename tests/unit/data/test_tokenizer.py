"""Tokenizers of files, rows of ids, and what a person reads when a file will not do. CLIP's ids: `tests/parity`."""

import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import ConfigError, DataError

WORDS = ("a", "cat", "dog", "photo", "of")
TEXT = "A photo of a cat, it's 1 of 3!"
RARE = "\N{CYRILLIC CAPITAL LETTER ABKHASIAN HA}"  # no vocabulary here has it, but as bytes


def write_json(path: Path, special: tuple[str, ...], unknown: str = "<unk>") -> str:
    """A tokenizer of whole words: pads, cuts and adds tokens by itself, as downloaded ones do."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(("<pad>", unknown, *special, *WORDS)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(token, special=True) for token in special])
    if len(special) == 2:
        tokens = [(token, vocabulary[token]) for token in special]
        core.post_processor = processors.TemplateProcessing(f"{special[0]} $A {special[1]}", None, tokens)
    core.enable_truncation(4)
    core.enable_padding(length=12)
    core.save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def train_sentencepiece(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("sentencepiece")

    def train(name: str, **options: int) -> str:
        sentences = [f"{a} photo of {b}" for a in WORDS for b in ("cats", "dogs", "a house", "trees")]
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_prefix=str(folder / name), vocab_size=30,
            hard_vocab_limit=False, minloglevel=2, **options,
        )  # fmt: skip
        return str(folder / f"{name}.model")

    return train


@pytest.fixture(params=["clip", "json", "model"])
def name(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "clip":
        return "clip"
    if request.param == "json":
        return write_json(tmp_path / "tokenizer.json", ("<s>", "</s>"))
    return request.getfixturevalue("train_sentencepiece")("whole")


def test_rows(name: str):
    tokenizer = open_tokenizer(name)
    assert tokenizer.name == name
    row = tokenizer(TEXT, 40)
    used = int(np.flatnonzero(row)[-1]) + 1
    assert (row.shape, row.dtype, row.max() < tokenizer.vocab_size) == ((40,), np.int32, True)
    assert (row[0], row[used - 1]) == (tokenizer.begin, tokenizer.end)
    assert tokenizer.end not in row[: used - 1]
    for length in range(3, 40):
        cut = tokenizer(TEXT, length)
        expected = row[:length].copy()
        if length < used:
            expected[-1] = tokenizer.end
        np.testing.assert_array_equal(cut, expected)
    np.testing.assert_array_equal(tokenizer("", 4), [tokenizer.begin, tokenizer.end, 0, 0])
    assert len(tokenizer("a cat " * 20_000, 77)) == 77


def test_too_short_a_row(name: str):
    with pytest.raises(ConfigError, match=r"model.text.context = 2: a text needs 3 tokens"):
        open_tokenizer(name)(TEXT, 2)


def test_half_a_surrogate_pair_is_survived(name: str):
    tokenizer = open_tokenizer(name)
    np.testing.assert_array_equal(tokenizer("cat \ud83d\ude00", 20), tokenizer("cat \N{GRINNING FACE}", 20))
    np.testing.assert_array_equal(tokenizer("cat \ud83d", 20), tokenizer("cat \ufffd", 20))


def test_threads_share_it(name: str):
    tokenizer = open_tokenizer(name)
    texts = [f"{TEXT} {'a cat ' * (i % 7)}" for i in range(200)]
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda text: tokenizer(text, 32), texts))
    np.testing.assert_array_equal(rows, [tokenizer(text, 32) for text in texts])


def test_opened_once_and_again_in_another_process(name: str):
    tokenizer = open_tokenizer(name)
    assert open_tokenizer(name) is tokenizer
    assert len(pickle.dumps(tokenizer)) < 1000  # its name, not its vocabulary
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.apply(tokenizer, (TEXT, 20)), tokenizer(TEXT, 20))


@pytest.mark.parametrize("special", [("<|startoftext|>", "<|endoftext|>"), ("[CLS]", "[SEP]"), ("<bos>", "<eos>")])
def test_json_finds_its_tokens(tmp_path: Path, special: tuple[str, str]):
    tokenizer = open_tokenizer(write_json(tmp_path / "tokenizer.json", special))
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size) == (2, 3, 9)
    np.testing.assert_array_equal(tokenizer("a photo of a dog and cat", 10), [2, 4, 7, 8, 4, 6, 1, 5, 3, 0])


def test_no_text_holds_the_end_token(tmp_path: Path):
    tokenizer = open_tokenizer(write_json(tmp_path / "tokenizer.json", ("<s>", "</s>")))
    assert np.count_nonzero(tokenizer("a </s> cat </s>", 10) == tokenizer.end) == 1
    path = write_json(tmp_path / "unknown.json", ("<s>", "</s>"), unknown="</s>")
    np.testing.assert_array_equal(open_tokenizer(path)("a green cat", 6)[:5], [2, 3, 4, 1, 0])


def test_json_without_them(tmp_path: Path):
    half = write_json(tmp_path / "half.json", ("<|endoftext|>",))
    with pytest.raises(DataError, match=r"half.json: no tokens of begin and end \(it has <\|endoftext\|> but no <\|st"):
        open_tokenizer(half)
    other_half = write_json(tmp_path / "other.json", ("[CLS]",))
    with pytest.raises(DataError, match=r"it has \[CLS\] but no \[SEP\]"):
        open_tokenizer(other_half)
    none = write_json(tmp_path / "none.json", ())
    with pytest.raises(DataError, match=r"none of the usual ones\); it needs a pair of .*\[CLS\] \[SEP\]"):
        open_tokenizer(none)


def test_sentencepiece(train_sentencepiece):
    tokenizer = open_tokenizer(train_sentencepiece("small", bos_id=5, eos_id=7))
    core = sentencepiece.SentencePieceProcessor(model_file=tokenizer.name)
    ids = core.encode("photo of cats")
    assert (tokenizer.begin, tokenizer.end, tokenizer.vocab_size) == (5, 7, core.get_piece_size())
    np.testing.assert_array_equal(tokenizer("photo of cats", 30)[: len(ids) + 3], [5, *ids, 7, 0])
    assert np.count_nonzero(tokenizer("photo </s> of", 30) == 7) == 1


def test_sentencepiece_without_begin_or_end(train_sentencepiece):
    with pytest.raises(DataError, match=r"no token of begin \(bos\); train it with bos_id and eos_id"):
        open_tokenizer(train_sentencepiece("no_begin", bos_id=-1))
    with pytest.raises(DataError, match=r"no token of begin \(bos\) and no token of end \(eos\)"):
        open_tokenizer(train_sentencepiece("neither", bos_id=-1, eos_id=-1))


def test_ids_and_back(name: str):
    tokenizer = open_tokenizer(name)
    ids = tokenizer.encode("a cat of  3")
    assert tokenizer(TEXT, 99).tolist()[: 2 + len(tokenizer.encode(TEXT))] == [
        tokenizer.begin, *tokenizer.encode(TEXT), tokenizer.end
    ]  # fmt: skip
    assert tokenizer.decode([tokenizer.begin, *ids, tokenizer.end, *ids]) == tokenizer.decode(np.int32(ids))
    assert "cat" in tokenizer.decode(ids)
    assert tokenizer.decode([*ids, tokenizer.vocab_size + 7, -1]) == tokenizer.decode(ids)
    assert tokenizer.decode([]) == tokenizer.decode([tokenizer.begin, tokenizer.end]) == ""


def test_clip_and_back():
    tokenizer = open_tokenizer("clip")
    text = "ein Café für 3 \N{GRINNING FACE} & <b>!"
    assert tokenizer.decode(tokenizer(text, 60)) == "ein café für 3 \N{GRINNING FACE} & < b >!"
    assert tokenizer.decode(tokenizer.encode(RARE)[:1]) == "\N{REPLACEMENT CHARACTER}"
    assert tokenizer.mask is None


@pytest.mark.parametrize("mask", ["<mask>", "[MASK]"])
def test_json_mask(tmp_path: Path, mask: str):
    tokenizer = open_tokenizer(write_json(tmp_path / "tokenizer.json", ("<s>", "</s>", mask)))
    assert tokenizer.mask == 4
    assert tokenizer.decode([2, 5, 4, 6, 0, 3]) == "a cat"
    assert open_tokenizer(write_json(tmp_path / "without.json", ("<s>", "</s>"))).mask is None


def test_sentencepiece_mask(train_sentencepiece):
    assert open_tokenizer(train_sentencepiece("maskless")).mask is None
    tokenizer = open_tokenizer(train_sentencepiece("masked", pad_id=9, control_symbols=["<mask>"]))
    core = sentencepiece.SentencePieceProcessor(model_file=tokenizer.name)
    assert core.id_to_piece(tokenizer.mask) == "<mask>"
    assert tokenizer.mask not in tokenizer.encode("a <mask> of")
    ids = tokenizer.encode("photo of cats")
    assert tokenizer.decode([tokenizer.begin, 9, tokenizer.mask, *ids, 9]) == "photo of cats"


def test_emoji():
    tokenizer = open_tokenizer("emoji")
    assert (tokenizer.vocab_size, tokenizer.begin, tokenizer.end, tokenizer.mask) == (1024, 1, 2, 4)
    for split in ("train", "combinations"):
        source = open_source(BundledConfig(path="twemoji", split=split))
        captions = [source[i]["caption"] for i in range(len(source))]
        rows = np.stack([tokenizer(caption, 32) for caption in captions])
        assert [tokenizer.decode(row) for row in rows] == captions
        assert not np.isin(rows, (3, 4)).any()
        assert (rows[:, -1] == 0).all()  # none was cut
    assert tokenizer.decode(tokenizer.encode(f"ein {RARE}")) == f"ein {RARE}"
    assert pickle.loads(pickle.dumps(tokenizer)) is tokenizer


@pytest.mark.parametrize("suffix", ["json", "model"])
@pytest.mark.parametrize("content", [b"", b"{}", b"\x00\xff\x13 no tokenizer", b'{"version": "1.0"\n'])
def test_unreadable_file(tmp_path: Path, suffix: str, content: bytes):
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"broken.*: not a ") as error:
        open_tokenizer(str(path))
    assert "\n" not in str(error.value)


def test_no_such_file_or_kind(tmp_path: Path):
    with pytest.raises(DataError, match=r"missing.json: no such file; give 'clip', 'emoji', or"):
        open_tokenizer(str(tmp_path / "missing.json"))
    (tmp_path / "folder.model").mkdir()
    with pytest.raises(DataError, match="no such file"):
        open_tokenizer(str(tmp_path / "folder.model"))
    for name in ("t5", "", "vocab.txt"):
        with pytest.raises(ConfigError, match=r"neither 'clip', 'emoji' nor a file .json or .model"):
            open_tokenizer(name)
