"""The command that trains a SentencePiece model on a configuration's captions: what it writes, says and refuses."""

import hashlib
import subprocess
import sys
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from visionfm_jax.data import tokenizer
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.tokenizer import train as train_tokenizer
from visionfm_jax.errors import ConfigError, DataError, UserError, entry_point

SHIPPED = resources.files("visionfm_jax.data.text") / "emoji.model"
CONFIG = """
from visionfm_jax.config import *
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.models.text import TextConfig
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig

def get_config(variant):
    source = BundledConfig(path="twemoji")
    bare = BundledConfig(path="digits")
    image = SwinV2Config(size="P", image_size=64, window=4)
    if variant == "labels":
        return Config(
            name="words", model=ViTConfig(), task=ClassificationConfig(), data=DataConfig(train=(source,)),
            train=TrainConfig(steps=20_000),
        )  # fmt: skip
    return Config(
        name="words",
        model=ClipConfig(image=image, text=TextConfig(size="P", vocab_size=1024, context=12, end_token=2)),
        task=ContrastiveConfig(tokenizer=variant or "words.model"),
        data=DataConfig(train=(bare, source)),
        optim=OptimConfig(warmup_steps=1),
        train=TrainConfig(steps=10, batch_size=8),
    )
"""


class Captioned:
    """Records with what `captions` holds; damaged where that is None."""

    name, has_captions = "texts", True

    def __init__(self, captions):
        self.captions = captions
        self.most_captions = max(len(c) if isinstance(c, tuple) else 1 for c in captions if c is not None)

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, i):
        if self.captions[i] is None:
            raise DamagedRecord("damaged")
        return {"caption": self.captions[i]}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.py").write_text(CONFIG)
    return "--config=words.py"


def test_the_shipped_model_is_made_by_the_command(config: str, capsys: pytest.CaptureFixture):
    train_tokenizer.main(["train", config])
    out = capsys.readouterr().out
    assert "3,183 captions read\n1,024 pieces: 261 special tokens and bytes, 763 of the captions\n" in out
    assert "10.1 tokens a caption; 0.000% of the tokens unknown, 0.0" in out
    assert "of the captions are longer than the 10 tokens that model.text.context=12 leaves them\n" in out
    assert f"words.model: {Path('words.model').stat().st_size:,} bytes" in out
    made, shipped = (sentencepiece.SentencePieceProcessor(model_file=str(f)) for f in ("words.model", SHIPPED))
    pieces = [[core.id_to_piece(i) for i in range(core.get_piece_size())] for core in (made, shipped)]
    assert pieces[0] == pieces[1]
    assert pieces[0][:6] == ["<pad>", "<s>", "</s>", "<unk>", "<mask>", "<0x00>"]
    credit = (Path(str(SHIPPED)).parent / "CREDITS.md").read_text()
    assert hashlib.sha256(SHIPPED.read_bytes()).hexdigest() in credit


def test_twice_the_same_bytes(config: str):
    train_tokenizer.main(["train", config, "--vocab_size=400", "--out=one.model"])
    train_tokenizer.main(["train", config, "--vocab_size=400", "--out=deep/two.model"])
    assert Path("one.model").read_bytes() == Path("deep/two.model").read_bytes()
    assert sorted(p.name for p in Path().iterdir()) == ["deep", "one.model", "words.py"]
    assert tokenizer.open_tokenizer("one.model").mask == 4


def test_some_of_the_captions(config: str, capsys: pytest.CaptureFixture):
    train_tokenizer.main(["train", config, "--vocab_size=400", "--sentences=300"])
    out = capsys.readouterr().out
    assert out.startswith("300 captions read\n400 pieces")
    assert "another size: set config.model.text.vocab_size=400\n" in out


def test_captions_are_evenly_spaced_and_all_of_an_image_count(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(train_tokenizer, "MEASURED", 10)
    pairs = Captioned([(f"{i} one", f"{i} two".encode()) for i in range(100)])
    more = Captioned([f"more {i}" for i in range(50)])
    captions = train_tokenizer.Captions([pairs, more], 10**9, threads=4)
    assert list(captions) == [t for i in range(100) for t in (f"{i} one", f"{i} two")] + [
        f"more {i}" for i in range(50)
    ]
    assert (captions.read, captions.damaged, len(captions.sample)) == (250, 0, 10)
    some = list(train_tokenizer.Captions([pairs, more], 50, threads=2))
    first = [int(t.split()[0]) for t in some if t.endswith("one")]
    assert (len(some), first[0], first[-1], np.ptp(np.diff(first))) == (50, 0, 99, 1)


def test_damaged_captions_are_counted():
    source = Captioned(["a cat", None, " ", b"\xff\xfe", "half \ud83d", "x" * 5000, ("two", "")])
    captions = train_tokenizer.Captions([source], 100, threads=1)
    assert list(captions) == ["a cat", "half ", "x" * 1000, "two"]
    assert (captions.read, captions.damaged) == (4, 4)
    with pytest.raises(DataError, match=r"texts: none of the 2 captions can be read"):
        train_tokenizer.train(train_tokenizer.Captions([Captioned([" ", ""])], 9, threads=1), 300)


def test_an_interrupt_while_captions_are_read_stays_one():
    def captions():
        yield "a cat"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_tokenizer.train(captions(), 300)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--vocab_size=32000"], ConfigError, r"^--vocab_size=32000: the captions hold only 7776 .*; set 7776 or less"),
        (["--vocab_size=270"], ConfigError, r"^--vocab_size=270: .*characters are 330 pieces; set 330 or more"),
        (["--vocab_size=2"], ConfigError, r"^--vocab_size=2: special tokens and bytes are 261 pieces; set more"),
        (["--sentences=0"], ConfigError, r"^--sentences=0: must be at least 1"),
        (["--out=words.json"], ConfigError, r"^--out=words.json: .* ends in .model"),
        (["--out=words.py/a.model"], UserError, r"^--out=words.py/a.model: .*name a file that can be written"),
        (["--config.data.train[1].path=digits"], DataError, r"^config.data.train: no source has captions"),
        (["--config.data.trian=3"], ConfigError, r"no such field; did you mean data.train"),
    ],
)
def test_refusals(config: str, arguments: list[str], error: type, message: str):
    with pytest.raises(error, match=message) as caught:
        train_tokenizer.main(["train", config, *arguments])
    assert "\n" not in str(caught.value)
    assert [p.name for p in Path().iterdir()] == ["words.py"]


def test_names_that_are_not_written_over(config: str):
    for name in ("clip", "emoji"):
        with pytest.raises(ConfigError, match=rf"config.task.tokenizer = '{name}' names no file to write; set --out"):
            train_tokenizer.main(["train", f"{config}:{name}"])
    with pytest.raises(ConfigError, match=r"words: its task reads no captions"):
        train_tokenizer.main(["train", f"{config}:labels"])
    Path("words.model").write_text("mine")
    with pytest.raises(UserError, match=r"^words.model: exists; add --overwrite"):
        train_tokenizer.main(["train", config])
    assert Path("words.model").read_text() == "mine"
    train_tokenizer.main(["train", config, "--overwrite", "--vocab_size=400"])
    assert tokenizer.open_tokenizer("words.model").vocab_size == 400


def test_the_command_itself(config: str, capfd: pytest.CaptureFixture):
    command = [sys.executable, "-m", "visionfm_jax.data.tokenizer", "train"]
    assert subprocess.run([*command, "--help"], check=False).returncode == 0
    assert "--overwrite" in capfd.readouterr().out
    assert entry_point(train_tokenizer.main)(["train", "--config=nothing.py"]) == 2
    assert capfd.readouterr().err.startswith(
        "visionfm_jax: error: --config=nothing.py: no such file; name a Python file"
    )
