"""`visionfm COMMAND`, and the configurations that come with the package."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from visionfm_jax import __main__ as console
from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError, complain
from visionfm_jax.interop.leaves import some

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_has_help_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        console.main([name, "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: visionfm {name} [-h]")
    assert "--mode" not in text


def test_help_names_every_command(capsys):
    assert console.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {name} " in shown for name in console.COMMANDS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command is given; there are train, evaluate, "),
        (["trian"], "no command 'trian'; did you mean train?; see visionfm --help"),
        (["train", "--config=quickstart", "--step=3"], "no argument '--step'"),
        (["replay", "--config=quickstart"], "the following arguments are required: --step; see visionfm replay --help"),
    ],
)
def test_wrong_commands_are_one_line_and_exit_code_2(words, message, capsys):
    assert console.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"visionfm_jax: error: {message}")
    assert error.count("\n") == 1


def test_a_command_reaches_its_module_with_its_words(monkeypatch):
    from visionfm_jax import main

    calls = []
    monkeypatch.setattr(main, "main", lambda *words, **options: calls.append((words, options)))
    assert console.main(["evaluate", "--config=x"]) == 0
    assert calls == [((["--config=x"], "visionfm evaluate"), {"mode": "evaluate"})]


@pytest.mark.parametrize("spec", ["vit_huge:tiny", "vit_huge.py:tiny", "configs/vit_huge.py:tiny"])
def test_configurations_of_the_package_are_found_by_name_from_any_folder(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load.load_file(spec).name == "vit_huge_tiny"


def test_a_file_in_the_working_folder_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vit_huge.py").write_text("def get_config(variant):\n    return 3\n")
    with pytest.raises(ConfigError, match="get_config returned int"):
        load.load_file("vit_huge.py")
    with pytest.raises(ConfigError, match=r"--config=/configs/vit_huge\.py: no such file"):
        load.load_file("/configs/vit_huge.py")


def test_a_wheel_has_all_that_the_package_needs_and_finds_its_configurations(tmp_path):
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        names = set(archive.namelist())
    folder = ROOT / "visionfm_jax"
    files = {str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    configs = {f"visionfm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert files | configs == {name for name in names if ".dist-info/" not in name}
    empty = tmp_path / "empty"
    empty.mkdir()
    code = (
        "import visionfm_jax; from visionfm_jax.config import load; print(visionfm_jax.__file__);"
        "print(load.load_file('configs/vit_huge.py:tiny').name, *load.shipped().values())"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    place, found = done.stdout.splitlines()
    assert place.startswith(str(tmp_path))
    assert found.startswith(f"vit_huge_tiny {tmp_path}/installed/visionfm_jax/configs/aurora_xl.py ")


def test_the_script_is_installed_under_its_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["visionfm"].partition(":")
    assert (module, getattr(console, name)) == (console.__name__, console.main)


def test_an_error_with_names_without_end_is_cut(capsys):
    """What to set comes last, and stays."""
    complain(f"error: one\ntwo: {some(['x' * 100_000, 'short'])}\nthree: {'y' * 100_000}; set z")
    first, second, third = capsys.readouterr().err.splitlines()
    assert first.endswith(": error: one")
    assert second == f"two: {'x' * 150}… (100,000 characters), short"
    assert len(third) < 4100
    assert third.startswith("three: yyy")
    assert third.endswith("yyy; set z")
    assert " … (100,014 characters) … " in third
