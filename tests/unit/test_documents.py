"""Every block of the documents is executed, or it is said why not; what is not executed is at least understood. Also:
quotes that shells need, files and functions that the documents name, and links.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import os
import re
import runpy
import shlex
import signal
import sys
import tomllib
from unittest import mock
from urllib.parse import urlsplit

import pytest
import yaml
from documents import NOT_RUN, OTHERS, OURS, PAGES, ROOT, SHOWN, blocks, commands, is_run, kind_of

from visionfm_jax.__main__ import COMMANDS
from visionfm_jax.config.arguments import Parser

ALL = list(dict.fromkeys(commands()))
OUR_REST = [(page, line) for page, line in ALL if OURS.match(line) and not is_run(line) and "--to=onnx" not in line]
PROGRAMS = sorted({line for _, line in ALL if re.match(r"(\S+/)?python (benchmarks|tools/attack)/", line)})


class Understood(BaseException):
    """Raised where the work would begin."""


def test_every_block_is_executed_or_said_to_be_shown():
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        for block in blocks(page):
            assert kind_of(name, block), f"{name}: {block}"
        fences = set(re.findall(r"(?m)^```(\S+)", page.read_text()))
        # tests/e2e/test_extending.py runs the Python; the rest is the site's
        allowed = {"docs/extending.md": {"python"}, "docs/index.md": {"{toctree}"}, "docs/api.md": {"{eval-rst}"}}
        assert fences <= allowed.get(name, set()), name


def test_every_command_is_executed_or_it_is_said_why_not():
    for page, line in ALL:
        assert "…" not in line, f"{page}: {line}"
        assert OURS.match(line) or not is_run(line), f"{page}: neither executed nor in NOT_RUN: {line}"
    assert sum(is_run(line) for _, line in ALL) > 60


def test_what_is_said_of_blocks_and_commands_is_needed():
    for pattern, reason in NOT_RUN.items():
        assert any(re.match(pattern, line) for _, line in ALL), pattern
        for name in re.findall(r"(?:tests|\.ci)/[\w./]+", reason):
            assert (ROOT / name.rstrip(".")).exists(), name
    for page, beginnings in SHOWN.items():
        for beginning in beginnings:
            assert any(block.lstrip().startswith(beginning) for block in blocks(ROOT / page)), (page, beginning)


def test_shells_get_brackets_in_quotes():
    for page, line in ALL:
        bare = re.sub(r"'[^']*'|\"[^\"]*\"|\s#.*", "", line)
        assert not re.search(r"[\[\]*?!]", bare), f"{page}: zsh expands {bare!r}; put the word into quotes: {line}"


@pytest.mark.parametrize(("page", "line"), OUR_REST, ids=lambda value: value[:90])
def test_a_command_is_understood(page, line, monkeypatch):
    monkeypatch.chdir(ROOT)
    for name in ("parse_args", "parse_with_config"):
        original = getattr(Parser, name)

        def parsed(self, *words, original=original, **more):
            original(self, *words, **more)
            raise Understood

        monkeypatch.setattr(Parser, name, parsed)
    words = shlex.split(line, comments=True)
    command, rest = (words[1], words[2:]) if words[0] == "visionfm" else ("train", words[3:])
    if command == "data":
        command, rest = f"data {rest[0]}", rest[1:]
    name = COMMANDS[command][0]
    mode = {"mode": command} if name == "main" else {}
    with pytest.raises(Understood):
        importlib.import_module(f"visionfm_jax.{name}").main(rest, "visionfm", **mode)


@pytest.mark.parametrize("line", PROGRAMS)
def test_a_program_of_measurements_takes_its_arguments(line, monkeypatch):
    _, program, *words = shlex.split(line, comments=True)
    original = argparse.ArgumentParser.parse_known_args

    def parsed(self, *given, **more):
        _, unknown = original(self, *given, **more)
        # torch_vit.py and torch_swin.py hand these on to `visionfm bench`
        assert all(word.startswith("--config.") for word in unknown), unknown
        raise Understood

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parsed)
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with mock.patch.dict(os.environ), pytest.raises(Understood):
        runpy.run_path(str(ROOT / program), run_name="__main__")
    for number, handler in handlers.items():
        signal.signal(number, handler)


def test_files_that_commands_name_are_there():
    found = [(page, line) for page, line in ALL if OTHERS.match(line) and not OURS.match(line)]
    assert len(found) > 10
    for page, line in found:
        for word in shlex.split(line, comments=True):
            if re.match(r"(\./)?(launch|benchmarks|tools|tests|docs|\.ci)/[\w./]+$", word):
                assert (ROOT / word).exists(), f"{page}: {line}"


def test_links_to_other_sites_are_well_formed_and_spelled_once():
    spelled: dict[str, set[str]] = {}
    for page in PAGES:
        for link in re.findall(r"https?:[^\s)>\]\"'`]+", page.read_text()):
            parts = urlsplit(link.rstrip(".,;:"))
            assert parts.scheme == "https", f"{page.name}: {link}"
            assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]{2,}", parts.netloc), f"{page.name}: {link}"
            key = f"{parts.netloc.removeprefix('www.')}{parts.path.rstrip('/')}".lower()
            spelled.setdefault(key, set()).add(parts._replace(fragment="", query="").geturl())
    assert spelled
    assert all(len(links) == 1 for links in spelled.values()), [links for links in spelled.values() if len(links) > 1]


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("benchmarks/*.py")) + sorted(ROOT.glob("tools/*.py")), ids=lambda p: p.name
)
def test_a_program_uses_what_there_is_of_the_package(path):
    """Few of them are run by tests."""
    tree, modules = ast.parse(path.read_text()), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visionfm_jax"):
            for name in node.names:
                module = importlib.import_module(node.module)
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
                found = getattr(module, name.name)
                if inspect.ismodule(found):
                    modules[name.asname or name.name] = found
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), f"line {node.lineno}: {node.value.id}.{node.attr}"


def test_files_and_their_functions_that_documents_name_are_there():
    named = [found for page in PAGES for found in re.findall(r"`([a-z_/0-9]+)\.py: (\w+)[\w.]*`", page.read_text())]
    assert named
    for module, name in named:
        assert hasattr(importlib.import_module(f"visionfm_jax.{module.replace('/', '.')}"), name), (module, name)


def test_the_workflow_runs_what_ci_runs_on_the_least_python():
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    test, site = workflow["jobs"]["test"], workflow["jobs"]["site"]
    assert any(".ci/run" in step.get("run", "") for step in test["steps"])
    least = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"].removeprefix(">=")
    assert test["strategy"]["matrix"]["python"][0] == least
    assert any(step.get("run") == "python -m sphinx -W -c docs . site" for step in site["steps"])


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


def test_the_architecture_lists_every_module_and_package():
    text = (ROOT / "docs/architecture.md").read_text().partition("## A sample")[0]
    modules = {path.name for path in (ROOT / "visionfm_jax").glob("*.py")} - {"__init__.py"}
    packages = {path.parent.name for path in (ROOT / "visionfm_jax").glob("*/__init__.py")}
    for name in modules | packages:
        assert re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text), f"{name} is missing in docs/architecture.md"
