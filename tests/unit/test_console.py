"""`visionfm COMMAND`, and the configurations that come with the package."""

import functools
import os
import re
import shlex
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from documents import OURS, commands
from hatchling.builders.wheel import WheelBuilder
from PIL import Image
from runs import environment

from visionfm_jax import __main__ as console
from visionfm_jax import scripts
from visionfm_jax.config import load
from visionfm_jax.errors import ConfigError, complain
from visionfm_jax.interop.leaves import some

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", console.COMMANDS)
def test_every_command_has_help_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as end:
        console.main([*name.split(), "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: visionfm {name} [-h]")
    assert not re.search(r"--mode\b", text)


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


@pytest.mark.parametrize("own", [None, "glibc.malloc.tcache_count=9"])
def test_a_program_runs_with_large_pages_unless_its_user_has_other_settings(own, tmp_path):
    """By a script that names its settings where the module of a command would run."""
    script = tmp_path / "visionfm"
    script.write_text(
        "import os, sys, types, visionfm_jax.__main__ as console\n"
        "ran = types.SimpleNamespace(main=lambda *words, **_: print(os.environ.get('GLIBC_TUNABLES'), *words))\n"
        "sys.modules['visionfm_jax.plan'] = ran\n"
        "console.main()\n"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "VISIONFM_STARTED")}
    env |= {"PYTHONPATH": str(ROOT)} | ({"GLIBC_TUNABLES": own} if own else {})

    def shown(*program, **more):
        run = [sys.executable, *program, "plan", "a b"]
        return subprocess.run(run, env=env, capture_output=True, text=True, check=True, **more).stdout

    assert shown(str(script)) == f"{own or 'glibc.malloc.hugetlb=1'} ['a b'] visionfm plan\n"
    assert shown("-", input=script.read_text()) == f"{own} ['a b'] visionfm plan\n"  # could not be read again


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """What a wheel installs."""
    folder = tmp_path_factory.mktemp("wheel")
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def of_wheel(installed: Path) -> dict[str, str]:
    """The environment of a process of the wheel."""
    return {**environment(1), "PYTHONPATH": str(installed)}


def in_empty_folder(installed: Path, folder: Path, *words: str) -> str:
    """The output of Python outside the repository, where the package is that of the wheel."""
    done = subprocess.run([sys.executable, *words], cwd=folder, env=of_wheel(installed), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_wheel_has_all_that_the_package_needs_and_finds_its_configurations(installed, tmp_path):
    folder = ROOT / "visionfm_jax"
    files = {str(p.relative_to(ROOT)) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    files |= {f"visionfm_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    files |= {f"visionfm_jax/launch/{name}" for name in scripts.NAMES}
    found = {str(p.relative_to(installed)) for p in installed.rglob("*") if p.is_file()}
    assert files == {name for name in found if ".dist-info/" not in name}
    code = (
        "import visionfm_jax; from visionfm_jax.config import load; print(visionfm_jax.__file__);"
        "print(load.load_file('configs/vit_huge.py:tiny').name, *load.shipped().values())"
    )
    place, found = in_empty_folder(installed, tmp_path, "-c", code).splitlines()
    assert place.startswith(str(installed))
    assert found.startswith(f"vit_huge_tiny {installed}/visionfm_jax/configs/aurora_xl.py ")


@pytest.mark.slow
def test_the_tour_works_from_a_wheel_outside_the_repository(installed, tmp_path):
    """A model is trained by the script that the wheel copies; then every other command of docs/tour.md is run, in one
    process, and what is exported is read back.
    """
    run = functools.partial(in_empty_folder, installed, tmp_path)
    assert run("-m", "visionfm_jax", "scripts").startswith("env.sh, ")
    assert os.access(tmp_path / "launch/slurm.sbatch", os.X_OK)
    tour = [line for page, line in commands() if page == "docs/tour.md" and OURS.match(line)]
    begin, *lines = [shlex.split(line)[1:] for line in tour if not line.startswith("visionfm search clip ")]
    small = ["--config.train.steps=2", "--config.train.batch_size=16", "--config.model.image.depths=(1, 1, 1, 1)"]
    small += ["--config.optim.warmup_steps=1", "--config.evals[0].gallery=()"]
    script = ["bash", str(tmp_path / "launch/local.sh"), "1", *begin[1:], *small]
    env = {**of_wheel(installed), "PYTHON": sys.executable}
    subprocess.run(script, cwd=tmp_path, env=env, check=True, capture_output=True, timeout=300)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 0, 0)).save(tmp_path / f"photos/{i}.png")
    code = (
        "import visionfm_jax as v; from visionfm_jax.__main__ import main\n"
        f"for words in {lines}:\n    assert main(words) == 0, words\n"
        "print(v.load('exported/swinv2').features('photos/0.png').shape)"
    )
    assert run("-c", code).splitlines()[-1] == "(1, 256)"
    assert (tmp_path / "runs/swinv2_g_clip_tiny/report.html").is_file()
    assert (tmp_path / "found.png").is_file()


def test_scripts_that_were_changed_are_not_overwritten(tmp_path, capsys):
    assert console.main(["scripts", str(tmp_path)]) == 0
    assert console.main(["scripts", str(tmp_path)]) == 0
    (tmp_path / "launch/mpi.sh").write_text("mine")
    assert console.main(["scripts", str(tmp_path)]) == 2
    assert "mpi.sh: differ from those of this version; move them away" in capsys.readouterr().err
    assert (tmp_path / "launch/mpi.sh").read_text() == "mine"


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
