from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from visionfm_jax.config import load
from visionfm_jax.data.sources.kinds import KINDS, BundledConfig, FolderConfig, NumpyConfig, TarsConfig
from visionfm_jax.errors import ConfigError, entry_point

ROOT = Path(__file__).parents[3]
QUICK = str(ROOT / "configs" / "quickstart.py")

OVERRIDES = [
    "--config.optim.lr=3e-4",
    "--config.train.batch_size=128",
    "--config.data.train[0].split=test",
    "--config.data.shuffle",
    "--config.data.transforms[0].scale=(0.3, 0.9)",
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
    assert config.data.shuffle is True
    assert config.data.transforms[0].scale == (0.3, 0.9)
    assert config.telemetry.progress is False
    assert config.evals == ()
    assert config.workdir == "/tmp/a=b"


def test_steps_per_epoch_are_printed_where_the_size_of_the_data_is_given():
    short = ["--config.train.epochs=0", "--config.optim.warmup_steps=1"]
    for size, said in ((4000, True), (0, False)):
        words = [f"--config={QUICK}", *short, f"--config.data.num_examples={size}", "--config.train.steps=1"]
        config, _ = load.from_arguments([*words, "--config.optim.warmup_steps=0"])
        assert ("steps_per_epoch" in load.describe(config)) == said
    with pytest.raises(ConfigError, match=r"must be below the run's 1 step \(train\.steps\)"):
        load.from_arguments(words)


@pytest.mark.parametrize(
    ("text", "value"),
    [("56", 56), ("(14, 28)", (14, 28)), ("'(14, 28)'", None), ("14,28", (14, 28)), ("[14, 28]", (14, 28)),
     ("(14,)", None), ("14 28", None), ("14x28", None)],
)  # fmt: skip
def test_a_size_is_one_number_or_two(text, value):
    words = [f"--config={QUICK}", f"--config.model.image_size={text}", f"--config.evals[0].image_size={text}"]
    if value is None:
        with pytest.raises(ConfigError, match=r"image_size=.*: is not of type int \| tuple\[int, int\]; e.g. 28"):
            load.from_arguments(words)
    else:
        config, _ = load.from_arguments(words)
        assert config.model.image_size == config.evals[0].image_size == value


@pytest.mark.parametrize("reverse", [False, True])
def test_a_flag_makes_a_source_one_of_another_kind(reverse):
    words = [
        "--config.data.train[0].kind=folder",
        "--config.data.train[0].path=/data/pictures",
        "--config.evals[0].source.kind=tars",
        "--config.evals[0].source.selection=good.pairs",
        "--config.evals[0].source.split=train",  # which tars have not: as it is when nobody sets it
    ]
    config, _ = load.from_arguments([f"--config={QUICK}", *(reversed(words) if reverse else words)])
    assert config.data.train == (FolderConfig(path="/data/pictures", split="train"),)
    assert config.evals[0].source == TarsConfig(path="digits", selection="good.pairs")
    assert config.evals[1].source == BundledConfig(path="digits", split="test")


def test_what_is_set_of_a_source_stays_when_its_kind_changes():
    words = ["--config.data.train[0].weight=2", "--config.data.train[0].split=val", "--config.data.train[0].kind=numpy"]
    config, _ = load.from_arguments([f"--config={QUICK}", *words])
    assert config.data.train == (NumpyConfig(path="digits", split="val", weight=2.0),)


def test_a_kind_of_ones_own_is_a_line_in_the_table(monkeypatch):
    @dataclass(kw_only=True)
    class LmdbConfig(FolderConfig):
        kind: ClassVar[str] = "lmdb"
        key: str = "jpg"

    monkeypatch.setitem(KINDS, "lmdb", LmdbConfig)
    words = ["--config.data.train[0].kind=lmdb", "--config.data.train[0].key=png"]
    config, _ = load.from_arguments([f"--config={QUICK}", *words])
    assert config.data.train == (LmdbConfig(path="digits", key="png"),)


@pytest.mark.parametrize("text", ["(0.3, 0.9)", "[0.3,0.9]", "0.3,0.9", " ( 0.3 , 9e-1, ) "])
def test_tuples_in_any_brackets(text):
    config, _ = load.from_arguments([f"--config={QUICK}", f"--config.data.transforms[0].scale={text}"])
    assert config.data.transforms[0].scale == (0.3, 0.9)


def test_a_flag_for_steps_overrides_epochs_and_the_reverse():
    def length(*words):
        train = load.from_arguments(words)[0].train
        return train.epochs, train.steps

    assert length(f"--config={QUICK}", "--config.train.steps=90") == (0, 90)
    assert length(f"--config={QUICK}", "--config.train.epochs=2") == (2, 0)
    tiny = f"--config={QUICK.replace('quickstart', 'vit_huge')}:tiny"
    assert length(tiny, "--config.train.epochs=2", "--config.data.num_examples=6400") == (2, 0)
    assert length(tiny, "--config.train.epochs=0", "--config.train.steps=190") == (0, 190)
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
        ([f"--config={QUICK}", "--config.seed=" + "9" * 5000], "9… (5,000 characters): is not of type int; e.g. 0"),
        ([f"--config={QUICK}", "--config.seed=1e20"], "is not of type int"),
        ([f"--config={QUICK}", "--config.train.steps=1e400"], "is not of type int"),
        ([f"--config={QUICK}", "--config.optim.lr=1e400"], "config.optim.lr = inf: must be finite"),
        ([f"--config={QUICK}", "--config.data.augment.std=(1e400, 1, 1)"], "std[0] = inf: must be finite"),
        ([f"--config={QUICK}", "--config.data.transforms[0].size=(1.9, 9)"], "is not of type tuple[int, int]"),
        ([f"--config={QUICK}", "--config.data.transforms[0].scale={1, 0.5}"], "is not of type tuple[float, float]"),
        ([f"--config={QUICK}", "--config.data.transforms[0].scale='ab'"], "is not of type tuple[float, float]"),
        ([f"--config={QUICK}", "--config.data.transforms[0].scale=" + "(" * 9999], "is not of type tuple[float,"),
        ([f"--config={QUICK}", "--config.evals=(1, 2)"], "=(1, 2): a flag can only set it to (); set other values in"),
        ([f"--config={QUICK}", "--config.model=ViT"], "no such field; did you mean model."),
        ([f"--config={QUICK}", "--config.name=a/../../b"], "config.name = 'a/../../b': must be"),
        (["--config=configs/quickstrat.py"], "no such file; did you mean configs/quickstart.py"),
        (["--config=pyproject.toml"], "is not a Python file"),
        (["--config=configs/vit_huge.py:tinny"], "no variant 'tinny'; there is tiny"),
        ([f"--config={QUICK}", "--config.optim.rl=1"], "no such field; did you mean optim.lr"),
        ([f"--config={QUICK}", "--config.lr=1"], "did you mean optim.lr?"),
        ([f"--config={QUICK}", "--config.optim.learning_rate=1"], "did you mean optim.lr or"),
        ([f"--config={QUICK}", "--config.optim.wd=1"], "did you mean optim.weight_decay or"),
        ([f"--config={QUICK}", "--config.train.bs=1"], "did you mean train.batch_size or"),
        ([f"--config={QUICK}", "--config.train.batch_size=many"], "is not of type int; e.g. 32"),
        ([f"--config={QUICK}", "--config.data.shuffle=maybe"], "is not of type bool"),
        ([f"--config={QUICK}", "--config.data.transforms[0].scale=(1,)"], "tuple[float, float]; e.g. (0.7, 1.0)"),
        ([f"--config={QUICK}", "--config.train.batch_size=0"], "must lie in [1, 65536]"),
        ([f"--config={QUICK}", "--config.data.train[0].kind=jpeg"], "no such kind; there is tfds, folder, "),
        ([f"--config={QUICK}", "--config.data.train[0].kind=fodler"], "did you mean folder?"),
        ([f"--config={QUICK}", "--config.data.train[0].kind"], "no such kind"),
        ([f"--config={QUICK}", "--config.data.train[0].selection=x"], "[0].selection: no such field"),
        ([f"--config={QUICK}", "--config.evals[0].source.kind=tars"], "a TarsConfig has no split, which is 'test'"),
        (
            ["--config=configs/vit_huge_coco.py:tiny", "--config.data.train[0].kind=coco"],
            "has no scenes, which is 2048, size, which is 64, most, which is 4; to drop this, set the defaults: "
            "--config.data.train[0].scenes=4096 --config.data.train[0].size=128 --config.data.train[0].most=8",
        ),
    ],
)
def test_bad_words_get_one_clear_line(words, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError) as error:
        load.from_arguments(words)
    assert message in str(error.value)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


HEAD = (
    "from visionfm_jax.config import *\n"
    "from visionfm_jax.models.backbones.vit import ViTConfig\n"
    "from visionfm_jax.tasks.classification import ClassificationConfig\n"
    "def get_config(variant=''):\n"
    "    config = Config(name='x', model=ViTConfig(), task=ClassificationConfig())\n"
)
ODD = "class Odd(BaseException):\n    def __str__(self): raise self\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config(variant=''):\n    return 1 / 0", "line 2: ZeroDivisionError: division by zero; fix the file"),
        ("import sys\nsys.exit(3)", "line 2: SystemExit: 3; fix the file"),
        ("\n\nraise SystemExit", "line 3: SystemExit: no reason given; fix the file"),
        ("x = 1\n\ndef get_config(:", "line 3: SyntaxError: invalid syntax"),
        ("def get_config(variant=''):\n    return get_config()", "line 2: RecursionError: maximum recursion depth"),
        (ODD + "raise Odd", "line 3: Odd: its text cannot be had (Odd); fix the file"),
        ("raise GeneratorExit('a\\nb\\x1b[31m')", "line 1: GeneratorExit: a b"),
        ("import json\njson.loads('{')", "line 2: JSONDecodeError: Expecting property name"),
        ("from visionfm_jax.errors import CheckpointError\nraise CheckpointError('x')", "line 2: CheckpointError: x"),
        ("x = 1", "defines no get_config(variant); define it"),
        ("get_config = 1", "defines no get_config(variant); define it"),
        ("def get_config():\n    return None", "define it as get_config(variant: str = "),
        ("def get_config(a, b):\n    return None", "TypeError: get_config() missing 1 required positional"),
        ("def get_config(variant=''):\n    return {}", "get_config returned dict; return a visionfm_jax.config.Config"),
        (
            HEAD
            + "    class Mine(Config): pass\n    return Mine(name='x', model=ViTConfig(), task=ClassificationConfig())",
            "returned a subclass of Config; return",
        ),
        (HEAD + "    return Config", "get_config returned type; return"),
        (
            HEAD + "    class Mine(TaskConfig): pass\n    config.task = Mine()\n    return config",
            "TypeError: Can't instantiate abstract class Mine",
        ),
        (HEAD + "    del config.optim\n    return config", "config.optim: was deleted; give it a value"),
        (HEAD + "    del config.name\n    return config", "config.name: was deleted; give it a value"),
        (HEAD + "    del config.data.augment\n    return config", "config.data.augment: was deleted; give it a value"),
        (HEAD + "    config.data = config\n    return config", "config.data: is of type Config; set one of type Data"),
        (
            HEAD + "    config.model = config\n    return config",
            "config.model: is of type Config; set one of type ModelConfig",
        ),
        (
            HEAD + "    config.evals = (1,)\n    return config",
            "config.evals[0]: is of type int; set one of type EvalConfig",
        ),
    ],
)
def test_a_broken_file_is_one_line_with_its_place(tmp_path, text, line):
    path = tmp_path / "broken.py"
    path.write_text(text + "\n")
    with pytest.raises(ConfigError) as error:
        load.load_file(str(path))
    assert str(error.value).startswith(f"--config={path}: ")
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_cannot_be_written_is_refused_by_its_type(tmp_path):
    path = tmp_path / "broken.py"
    path.write_text(HEAD + "    class Odd:\n        __repr__ = 1\n    config.optim.lr = Odd()\n    return config\n")
    with pytest.raises(ConfigError, match=r"config.optim.lr = \(Odd, which cannot be written: TypeError\): must be"):
        load.from_arguments([f"--config={path}"])


@pytest.mark.parametrize(
    ("called", "name"), [("/env/bin/visionfm", "visionfm"), ("/src/visionfm_jax/main.py", "visionfm_jax")]
)
def test_an_error_names_the_program_and_nothing_in_it_is_obeyed_by_a_terminal(called, name, capsys, monkeypatch):
    @entry_point
    def fails():
        raise ConfigError("red \x1b[31m, wide \x9b, é\nnext line")

    monkeypatch.setattr("sys.argv", [called])
    assert fails() == 2
    assert capsys.readouterr().err == f"{name}: error: red \\x1b[31m, wide \\x9b, é\nnext line\n"


INCOMPLETE = """
from dataclasses import dataclass
from typing import ClassVar
from visionfm_jax.config import *
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig

@dataclass(kw_only=True)
class Net(BackboneConfig):
    image_size: int = 28
    patch_size: int = 7
    attention: str = "xla"
    remat: str = "none"
    strides, widths, features, embed_width = (7,), (8,), 8, 8

    def make(self, dtype, gather_params): ...

@dataclass(kw_only=True)
class Objective(TaskConfig):
    model_class: ClassVar[type] = BackboneConfig

    def fields(self, run): ...
    def make(self, run, dtype, gather_params): ...

@dataclass(kw_only=True)
class Metric(EvalConfig):
    metrics: ClassVar[tuple[str, ...]] = ("x",)

    def make(self, run, host, hosts): ...

def get_config(variant):
    config = Config(name="own", model=ViTConfig(), task=ClassificationConfig())
    config.model = Net() if variant == "model" else config.model
    config.task = Objective() if variant == "task" else config.task
    config.evals = (Metric(source=BundledConfig(path="digits")),) if variant == "eval" else ()
    return config
"""


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        ("model", "config.model: Net sets no flops, which BackboneConfig declares; set it in the class"),
        ("task", "config.task: Objective sets no predictions, which TaskConfig declares; set it"),
        ("eval", r"config.evals\[0\]: Metric sets no measures, which EvalConfig declares; set it"),
    ],
)
def test_a_class_of_the_users_that_leaves_something_out(tmp_path, variant, says):
    (tmp_path / "own.py").write_text(INCOMPLETE)
    with pytest.raises(ConfigError, match=says):
        load.load_file(f"{tmp_path}/own.py:{variant}")
    assert load.load_file(f"{tmp_path}/own.py").name == "own"
