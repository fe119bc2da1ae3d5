"""The commands that the documents show are understood, up to where their work would begin; the files that they name
are there; so are the functions that docs/architecture.md names.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex

import pytest
from documents import OTHERS, OURS, ROOT, RUNS, commands

from visionfm_jax.__main__ import COMMANDS
from visionfm_jax.config.arguments import Parser
from visionfm_jax.config.load import load_file
from visionfm_jax.config.schema import to_dict


class Understood(BaseException):
    """Raised where the work would begin."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with the settings of the runs, and nothing else of them."""
    base = tmp_path_factory.mktemp("documents")
    for name, config in RUNS.items():
        file, _, variant = config.partition(":")
        folder = base / "runs" / name
        folder.mkdir(parents=True)
        loaded = load_file(f"{ROOT}/configs/{file}.py" + (f":{variant}" if variant else ""))
        (folder / "config.json").write_text(json.dumps({"config": to_dict(loaded)}))
    return base


OUR_COMMANDS = [(page, line) for page, line in commands() if OURS.match(line)]


@pytest.mark.parametrize(("page", "line"), OUR_COMMANDS, ids=lambda value: value[:90])
def test_a_command_is_understood(page, line, runs, monkeypatch):
    monkeypatch.chdir(runs)
    (runs / "configs").exists() or (runs / "configs").symlink_to(ROOT / "configs")
    for name in ("parse_args", "parse_with_config"):
        original = getattr(Parser, name)

        def parsed(self, *words, original=original, **more):
            original(self, *words, **more)
            raise Understood

        monkeypatch.setattr(Parser, name, parsed)
    words = shlex.split(line, comments=True)
    if words[0] == "visionfm":
        name, rest = COMMANDS[words[1]][0], words[2:]
        mode = {"mode": words[1]} if name in ("main", "predict") else {}
    else:
        name, rest, mode = words[2].removeprefix("visionfm_jax."), words[3:], {}
        if name == "data.tokenizer":
            name = "data.tokenizer.train"
    module = importlib.import_module(f"visionfm_jax.{name}")
    with pytest.raises(Understood):
        module.main(rest, "visionfm", **mode)
    for word in rest:
        if found := re.match(r"runs/(\w+)", word):
            assert found[1] in RUNS


def test_files_that_commands_name_are_there():
    found = [(page, line) for page, line in commands() if OTHERS.match(line) and not OURS.match(line)]
    assert len(found) > 10
    for page, line in found:
        for word in shlex.split(line, comments=True):
            if re.match(r"(\./)?(launch|benchmarks|tools|tests|docs|\.ci)/[\w./]+$", word):
                assert (ROOT / word).exists(), f"{page}: {line}"


def test_there_are_commands():
    assert len(OUR_COMMANDS) > 30
    assert {page for page, _ in OUR_COMMANDS} >= {"README.md", "BUILD.md", "docs/use.md", "docs/recipes.md"}


def test_names_in_the_walk_of_a_sample_are_there():
    walk = (ROOT / "docs/architecture.md").read_text().partition("from disk to its gradient")[2]
    names = [name for name in re.findall(r"`([a-z_]+(?:\.\w+)+)`", walk) if not name.startswith(("config.", "jax."))]
    assert len(names) > 10
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            try:
                value = importlib.import_module(".".join(["visionfm_jax", *parts[:end]]))
            except ModuleNotFoundError:
                continue
            for part in parts[end:]:
                value = getattr(value, part)
            break
        else:
            raise AssertionError(name)
