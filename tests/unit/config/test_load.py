import subprocess
import sys
from pathlib import Path

import pytest

from visionfm_jax.config import load
from visionfm_jax.config.schema import to_dict
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


def test_both_parsers_agree():
    program = (
        "import sys, json; from absl import app; from visionfm_jax.config import load, schema\n"
        "holder = load.define_flag()\n"
        "app.run(lambda _: print(json.dumps(schema.to_dict(load.from_flag(holder)))))"
    )
    import json

    words = [f"--config={QUICK}", *OVERRIDES]
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(to_dict(load.from_arguments(words)[0])))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give one --config"),
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


def test_a_broken_file_is_named(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text("def get_config(variant=''):\n    return 1 / 0\n")
    with pytest.raises(ConfigError, match=r"broken.py: ZeroDivisionError in the file: division by zero"):
        load.load_file(str(path))
    path.write_text("def get_config(variant=''):\n    return {}\n")
    with pytest.raises(ConfigError, match="returned dict"):
        load.load_file(str(path))
