"""What the command line says of an evaluation: a run's folder, and an eval that it does not have."""

import json
from pathlib import Path

import pytest

from visionfm_jax.cli.evaluate import add_arguments, with_eval
from visionfm_jax.config import Config
from visionfm_jax.config.arguments import Parser
from visionfm_jax.config.load import load_file
from visionfm_jax.config.schema import to_dict
from visionfm_jax.data.sources.kinds import BenchmarkConfig, FolderConfig, TarsConfig
from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.errors import ConfigError
from visionfm_jax.evals.kinds import KnnConfig, RetrievalConfig, ZeroShotConfig
from visionfm_jax.main import main


@pytest.fixture
def run(tmp_path) -> Path:
    """A run's folder, as far as its settings go, which has been moved."""
    config = load_file("configs/swinv2_g_clip.py:tiny")
    config.workdir = "/where/it/was"
    (tmp_path / "config.json").write_text(json.dumps({"config": to_dict(config)}))
    return tmp_path


def parsed(*words: str) -> Config:
    parser = Parser("visionfm evaluate", "")
    add_arguments(parser)
    return parser.parse_with_config(words, with_eval)[0]


def test_a_run_is_evaluated_by_its_own_evals(run):
    config, file = parsed(f"--config={run}"), load_file("configs/swinv2_g_clip.py:tiny")
    assert (config.folder, config.evals, config.model) == (str(run), file.evals, file.model)


def test_an_eval_from_the_command_line(run):
    config = parsed(
        f"--config={run}", "--eval=zero_shot", "--data=/data/pets", "--split=test",
        "--config.evals[0].prompts=a photo of a {}",
    )  # fmt: skip
    [made] = config.evals
    own = load_file("configs/swinv2_g_clip.py:tiny").evals[0].preprocess
    source = FolderConfig(path="/data/pets", split="test")
    assert made == ZeroShotConfig(name="zero_shot", source=source, prompts="a photo of a {}", preprocess=own)


def test_names_and_prompts_from_the_command_line(run, monkeypatch, tmp_path):
    [made] = parsed(
        f"--config={run}", "--eval=zero_shot", "--data=benchmark:/data/flowers", "--classes=flowers_classes",
        "--prompts=flowers_prompts",
    ).evals  # fmt: skip
    assert (made.source, made.classes) == (BenchmarkConfig(path="/data/flowers"), "flowers_classes")
    assert (len(read_lines(made.classes)), read_lines(made.prompts)) == (102, ("a photo of a {}, a type of flower.",))
    seen = []
    monkeypatch.setattr(Parser, "parse_with_config", lambda self, argv, change: seen.extend(argv) or exit(0))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"--run=a: there is no such folder; name that of a run"):
        main(["--run=a"], mode="evaluate")
    (tmp_path / "a").mkdir()
    with pytest.raises(SystemExit):
        main(["--run=a", "--eval=knn", "--run", "b"], mode="evaluate")
    assert seen == ["--config=a", "--eval=knn", "--config", "b"]


def test_data_of_other_kinds_and_a_gallery(run):
    [made] = parsed(f"--config={run}", "--eval=knn", "--data=folder:a/b", "--gallery=a/c:d").evals
    assert isinstance(made, KnnConfig)
    assert (made.source, made.gallery) == (FolderConfig(path="a/b"), (FolderConfig(path="a/c:d"),))
    [made] = parsed(f"--config={run}", "--eval=retrieval", "--data=tars:/data/pairs").evals
    assert isinstance(made, RetrievalConfig)
    assert made.source == TarsConfig(path="/data/pairs")
    words = ("--eval=linear_probe", "--data=/data/birds", "--split=test", "--gallery=/data/birds", "--gallery_split=")
    [made] = parsed(f"--config={run}", *words).evals
    assert (made.source.split, made.gallery[0].split) == ("test", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--eval=zeroshot", "--data=a"), "--eval=zeroshot: no such kind of eval; there is classification, "),
        (("--eval=zero_shot",), "--eval=zero_shot: needs data; add --data=PATH"),
        (("--data=a",), "--data=a: needs --eval=KIND"),
        (("--eval=zero_shot", "--data=fold:a"), "--data=fold:a: 'fold' is no kind of data; there is "),
        (("--eval=zero_shot", "--data=a", "--gallery=b"), "--gallery=b: --eval=zero_shot has none; leave it out"),
        (("--eval=knn", "--data=a", "--classes=b"), "--classes=b: --eval=knn has none; leave it out"),
        (
            ("--eval=retrieval", "--data=tars:a", "--split=b"),
            "--data=tars:a: tars has no splits, and 'b' is given; leav",
        ),
        (("--split=test",), "--split=test: needs --eval=KIND"),
        (("--eval=knn", "--data=a", "--gallery_split=b"), "--gallery_split=b: is of --gallery; add that"),
        (("--eval=captioning", "--data=tars:a"), "captioning"),
    ],
)
def test_an_eval_that_cannot_be(run, words, message):
    with pytest.raises(ConfigError, match=message):
        parsed(f"--config={run}", *words)


def test_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(ConfigError, match=r"it has no config\.json; name the folder of a run"):
        parsed(f"--config={tmp_path}")
