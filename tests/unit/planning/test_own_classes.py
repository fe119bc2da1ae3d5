"""Plans of models and transforms whose classes the package does not know."""

import importlib
import subprocess
import sys

from visionfm_jax.config import load
from visionfm_jax.planning.compiled import _pickled, _sources

FILE = """
from dataclasses import dataclass
from visionfm_jax.config import *
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig


@dataclass(kw_only=True)
class MineConfig(ViTConfig):
    extra: int = 3


def get_config(variant=""):
    return Config(name="mine", model=MineConfig(extra=7), task=ClassificationConfig())
"""


def test_a_compile_in_another_process_gets_them_and_the_cache_knows_their_code(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FILE)
    config = load.load_file(str(file))
    program = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print(type(c.model).__name__, c.model.extra)"
    done = subprocess.run([sys.executable, "-c", program], input=_pickled(config), capture_output=True, timeout=120)
    assert done.stdout.decode() == "MineConfig 7\n", done.stderr.decode()
    sources = dict(_sources(config))
    assert sources["mine.py"] == FILE.encode()
    assert "models/backbones/vit.py" in sources


def test_the_cache_knows_the_code_of_a_transform_and_of_the_classes_it_is_derived_from(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    base = "from visionfm_jax.data.transforms import Flip\n\nclass Base(Flip):\n    pass\n"
    (tmp_path / "base_of_mine.py").write_text(base)
    (tmp_path / "flip_of_mine.py").write_text("import base_of_mine\n\nclass Mine(base_of_mine.Base):\n    pass\n")
    config = load.load_file("configs/vit_huge.py")
    config.data.transforms = (importlib.import_module("flip_of_mine").Mine(),)
    sources = dict(_sources(config))
    assert sources["base_of_mine.py"] == base.encode()
    assert b"Mine" in sources["flip_of_mine.py"]
