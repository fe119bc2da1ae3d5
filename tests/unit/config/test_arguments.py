"""Command lines: the words of every program, what is wrong with them, and what --help lists."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from visionfm_jax.config import load
from visionfm_jax.config.arguments import Parser, comments, field_help
from visionfm_jax.config.schema import OptimConfig
from visionfm_jax.errors import entry_point
from visionfm_jax.tasks.contrastive import ContrastiveConfig

ROOT = Path(__file__).parents[3]
QUICK = "--config=configs/quickstart.py"


def refused(capsys, main, *words):
    """The one line on stderr."""
    assert entry_point(main)(list(words)) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line.removeprefix("visionfm_jax: error: ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode=evaluate"], "give one --config=FILE.py"),
        ([QUICK, "--mode=eval"], "argument --mode: invalid choice: 'eval'"),
        ([QUICK, "--mode"], "argument --mode: expected one argument"),
        ([QUICK, "--processes=many"], "argument --processes: invalid int value: 'many'"),
        ([QUICK, "--procesess=2"], "no argument '--procesess'; did you mean --processes?"),
        ([QUICK, "-config.optim.lr=1"], "no argument '-config.optim.lr'; did you mean --config.optim.lr?"),
        ([QUICK, "--zzz"], "no argument '--zzz'; see python -m visionfm_jax.main --help"),
        (
            [QUICK, "optim.lr=1"],
            "unexpected argument 'optim.lr=1': arguments have the form --NAME=VALUE",
        ),
        ([QUICK, "--config.optim.rl=1"], "--config.optim.rl: no such field; did you mean optim.lr"),
    ],
)
def test_wrong_words_are_one_line_and_exit_code_2(capsys, monkeypatch, words, message):
    from visionfm_jax.main import main

    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, main, *words)


@pytest.mark.parametrize(
    ("program", "words", "message"),
    [
        ("bench", [QUICK, "--stpes=3"], "did you mean --steps?"),
        ("bench", [QUICK, "--steps=3.5"], "argument --steps: invalid int value: '3.5'"),
        ("plan", [QUICK, "--claster=h100:1x8"], "did you mean --cluster?"),
        ("data.select", ["--path=x", "--out=y"], "--where and --keep are both missing"),
        ("data.select", ["--path=x", "--where=a", "--out=y", "--jobs=1000000"], "[1, 1024]"),
        ("data.select", ["--path=x", "--where=" + "(" * 1000, "--out=y"], "((( … (1,002 characters): "),
        ("data.tokenizer.train", [QUICK], "the following arguments are required: action"),
        ("data.tokenizer.train", ["train", QUICK, "--sentence=3"], "did you mean --sentences?"),
    ],
)
def test_so_do_the_other_programs(capsys, monkeypatch, program, words, message):
    monkeypatch.chdir(ROOT)
    assert message in refused(capsys, importlib.import_module(f"visionfm_jax.{program}").main, *words)


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as end:
        Parser("python -m visionfm_jax.main", "What it does.\n\nExit codes: 0 done").parse_with_config(
            [*words, "--help"]
        )
    assert end.value.code == 0
    return capsys.readouterr().out


def test_help_names_the_configuration_and_how_to_see_its_fields(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = help_of(capsys)
    for words in ("--config FILE.py[:VARIANT]", "--config.FIELD=VALUE", "Exit codes", "vit_huge"):
        assert words in text
    assert "python -m visionfm_jax.main --config=FILE.py --help" in text


def test_help_of_a_configuration_lists_every_field(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = help_of(capsys, "--config=configs/aurora_xl.py:tiny", "--config.seed=3", "--config.optim.lr=inf")
    config = load.overridden(["configs/aurora_xl.py:tiny"], [("seed", "3")])
    for name in load.fields(config):
        assert f"\n  {name} " in text
    for words in (
        "seed                             3  ",
        "int [1, 65536]",
        "'bundled'",
        "A whole run.",
        "tfds | folder",
    ):
        assert words in text


def test_help_ends_quietly_when_nobody_reads_on():
    read, write = os.pipe()
    os.close(read)
    code = "from visionfm_jax.config.arguments import Parser; Parser('main', '').parse_with_config(['--help'])"
    with open(write, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_fields_are_explained_by_the_comments_beside_them(capsys):
    assert comments(OptimConfig)["lr"] == "peak learning rate"
    assert comments(ContrastiveConfig)["tokenizer"].startswith("clip, or a path: of a tokenizer.json, or")
    lines = field_help(load.load_file(str(ROOT / "configs" / "quickstart.py"))).splitlines()
    line = {x.split()[0]: x for x in lines if x.startswith("  ")}
    assert line["optim.weight_decay"].endswith("pooling probes; float [0, 100]; default 0.1")
    assert line["optim.lr"].endswith("0.001                    peak learning rate; float [1e-12, 100]")
    assert "interpolation: bicubic_antialias | " in line["model.pos_resize"]  # a comment within brackets
    assert line["model.attention"].endswith("xla | cudnn; str")
