"""Layers: which package may import which, and what must import on a bare GPU image."""

import ast
import os
import subprocess
import sys
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "visionfm_jax"
PACKAGES = [
    "errors",
    "machine",
    "storage",
    "logs",
    "config",
    "models",
    "losses",
    "parallel",
    "optim",
    "data",
    "tasks",
    "interop",
    "train",
    "evals",
    "inference",
    "api",
    "telemetry",
    "curation",
    "planning",
    "cli",
]
ENTRY_POINTS = ["__main__", "main", "bench", "plan", "predict", "export", "report"]


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("visionfm_jax"):
            parts = node.module.split(".")
            names |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            names |= {a.name.split(".")[1] for a in node.names if a.name.startswith("visionfm_jax.")}
    return names - {"__version__"}


def test_every_file_imports_only_from_packages_before_its_own():
    files = [p for p in PACKAGE.rglob("*.py") if p.parent != PACKAGE]
    assert len(files) > 20
    for path in files:
        allowed = set(PACKAGES[: PACKAGES.index(path.relative_to(PACKAGE).parts[0]) + 1])
        assert imports(path) <= allowed, f"{path}: {imports(path) - allowed}"


def test_no_file_imports_an_entry_point():
    for path in PACKAGE.rglob("*.py"):
        assert not imports(path) & set(ENTRY_POINTS), path


def modules_imported_by(path: Path, modules: Collection[str]) -> set[str]:
    """Which of the modules a file imports anywhere, but for the checking of types."""
    tree, names = ast.parse(path.read_text()), set()
    typing = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(node) for branch in typing for node in ast.walk(branch)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            names |= {member if member in modules else node.module for member in members}
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names & set(modules)


def test_no_module_imports_itself_by_way_of_others():
    def name_of(path: Path) -> str:
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    graph = {name: modules_imported_by(path, files) for name, path in files.items()}
    assert sum(map(len, graph.values())) > 300
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


BARE = """
import importlib.abc, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"grain", "tensorflow_datasets", "ml_collections", "orbax", "array_record", "cv2",
                                      "PIL", "simplejpeg", "matplotlib", "tensorboardX", "tqdm", "tensorflow", "torch"}:
            raise ImportError(name + " is not on a bare GPU image")
sys.meta_path.insert(0, Blocked())
"""


def test_bench_runs_without_loader_and_checkpoint_packages():
    program = BARE + (
        "from visionfm_jax import bench\n"
        "sys.exit(bench.main(['--config=configs/quickstart.py', '--config.train.batch_size=8', '--steps=2',"
        " '--config.evals[0].batch_size=8', '--config.evals[1].batch_size=8', '--config.data.num_examples=4000']))"
    )
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # compiling takes nearly all the time
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=PACKAGE.parent, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert '"images_per_s"' in done.stdout
