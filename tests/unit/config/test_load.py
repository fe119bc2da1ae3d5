from pathlib import Path

import pytest

from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError

ROOT = Path(__file__).parents[3]
QUICK = str(ROOT / "configs" / "quickstart.py")

OVERRIDES = [
    "--config.optim.lr=3e-4",
    "--config.train.batch_size=128",
    "--config.data.train[0].split=test",
    "--config.data.augment.flip",
    "--config.data.augment.crop_scale=(0.3, 0.9)",
    "--config.telemetry.progress=false",
    "--config.workdir=/tmp/a=b",
    "--config.checkpoint.keep_best=0",
    "--config.checkpoint.best_metric=",
    "--config.evals=()",
]


def test_overrides_are_typed():
    config, rest = load.from_arguments([f"--config={QUICK}", *OVERRIDES, "--other=1"])
    assert rest == ["--other=1"]
    assert config.optim.lr == 3e-4
    assert config.data.train[0].split == "test"
    assert config.data.augment.flip is True
    assert config.data.augment.crop_scale == (0.3, 0.9)
    assert config.telemetry.progress is False
    assert config.evals == ()
    assert config.workdir == "/tmp/a=b"


@pytest.mark.parametrize("text", ["(0.3, 0.9)", "[0.3,0.9]", "0.3,0.9", " ( 0.3 , 9e-1, ) "])
def test_tuples_in_any_brackets(text):
    config, _ = load.from_arguments([f"--config={QUICK}", f"--config.data.augment.crop_scale={text}"])
    assert config.data.augment.crop_scale == (0.3, 0.9)


def test_a_flag_for_steps_overrides_epochs_and_the_reverse():
    def length(*words):
        train = load.from_arguments(words)[0].train
        return train.epochs, train.steps

    assert length(f"--config={QUICK}", "--config.train.steps=90") == (0, 90)
    assert length(f"--config={QUICK}", "--config.train.epochs=2") == (2, 0)
    tiny = f"--config={QUICK.replace('quickstart', 'vit_huge')}:tiny"
    assert length(tiny, "--config.train.epochs=2", "--config.data.num_examples=6400") == (2, 0)
    assert length(tiny, "--config.train.epochs=0", "--config.train.steps=90") == (0, 90)
    with pytest.raises(ConfigError, match="both set the length of the run; give one"):
        load.from_arguments([tiny, "--config.train.epochs=2", "--config.train.steps=90"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one --config"),
        (["--config"], "give one --config"),
        (["--config="], "give one --config"),
        (["--config", "--config.seed=1"], "give one --config"),
        ([f"--config={QUICK}", f"--config={QUICK}"], "given 2 times"),
        (["--config=" + "x" * 5000], "x… (5,000 characters): "),
        ([f"--config={QUICK}", "--config.=1"], "--config.: no such field"),
        ([f"--config={QUICK}", "--config.seed"], "--config.seed: has no value; write --config.seed=VALUE"),
        ([f"--config={QUICK}", "--config.seed=" + "9" * 5000], "9… (5,000 characters): is no int; such as 0"),
        ([f"--config={QUICK}", "--config.seed=1e20"], "is no int"),
        ([f"--config={QUICK}", "--config.train.steps=1e400"], "is no int"),
        ([f"--config={QUICK}", "--config.optim.lr=1e400"], "config.optim.lr = inf: must be finite"),
        ([f"--config={QUICK}", "--config.data.augment.std=(1e400, 1, 1)"], "std[0] = inf: must be finite"),
        ([f"--config={QUICK}", "--config.data.augment.rand_augment=(1.9, 9)"], "is no tuple[int, float]"),
        ([f"--config={QUICK}", "--config.data.augment.crop_scale={1, 0.5}"], "is no tuple[float, float]"),
        ([f"--config={QUICK}", "--config.data.augment.crop_scale='ab'"], "is no tuple[float, float]"),
        ([f"--config={QUICK}", "--config.data.augment.crop_scale=" + "(" * 9999], "is no tuple[float, float]"),
        ([f"--config={QUICK}", "--config.evals=(1, 2)"], "=(1, 2): a flag can empty it by (), only a file can fill"),
        ([f"--config={QUICK}", "--config.model=ViT"], "no such field; did you mean model."),
        ([f"--config={QUICK}", "--config.name=a/../../b"], "config.name = 'a/../../b': must be"),
        (["--config=configs/quickstrat.py"], "no such file; did you mean configs/quickstart.py"),
        (["--config=pyproject.toml"], "is no Python file"),
        (["--config=configs/vit_huge.py:tinny"], "no variant 'tinny'; there is tiny"),
        ([f"--config={QUICK}", "--config.optim.rl=1"], "no such field; did you mean optim.lr"),
        ([f"--config={QUICK}", "--config.lr=1"], "optim.lr"),
        ([f"--config={QUICK}", "--config.train.batch_size=many"], "is no int; such as 32"),
        ([f"--config={QUICK}", "--config.data.augment.flip=maybe"], "is no bool"),
        ([f"--config={QUICK}", "--config.data.augment.crop_scale=(1,)"], "such as"),
        ([f"--config={QUICK}", "--config.train.batch_size=0"], "must lie in [1, 65536]"),
    ],
)
def test_bad_words_get_one_clear_line(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        load.from_arguments(words)
    assert message in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(variant=''):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py: ZeroDivisionError in the file: division by zero"):
        load.load_file(str(path))
    path.write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ConfigError, match=r"broken.py: SystemExit in the file: 3"):
        load.load_file(str(path))
    path.write_text("def get_config(variant=''):\n    return {}\n")
    with pytest.raises(ConfigError, match="returned dict"):
        load.load_file(str(path))


def test_a_file_whose_function_takes_no_variant_is_told_how_to(tmp_path):
    (tmp_path / "c.py").write_text("def get_config():\n    return None\n")
    with pytest.raises(ConfigError, match=r'define it as get_config\(variant: str = ""\)'):
        load.load_file(str(tmp_path / "c.py"))
