"""What the documents show: commands, Python, and the rest; and which of the commands are not executed, and why."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [path for folder in (".", "docs", "docs/cards", "benchmarks") for path in sorted((ROOT / folder).glob("*.md"))]
# The runs that commands name, and of which configuration they are.
RUNS = {
    "quickstart": "quickstart", "vit_huge": "vit_huge:tiny", "vit_huge_longer": "vit_huge:tiny",
    "vit_huge_tiny": "vit_huge:tiny",
    "swinv2_g_clip": "swinv2_g_clip:tiny", "swinv2_g_clip_tiny": "swinv2_g_clip:tiny", "clip": "swinv2_g_clip:tiny",
    "aurora_xl_tiny": "aurora_xl:tiny", "vit_huge_coco_tiny": "vit_huge_coco:tiny",
    "vit_huge_ade20k_tiny": "vit_huge_ade20k:tiny", "vit_huge_dino_tiny": "vit_huge_dino:tiny",
}  # fmt: skip
OWN_RUNS = {"mine", "pets", "my_clip"}  # those of configurations that the pages show
OURS = re.compile(r"(\.venv/bin/)?(visionfm|python -m visionfm_jax\.main)\s")
OTHERS = re.compile(r"(\./launch/|\.ci/|(\S+/)?(pip|python3?)\s|hf |git |cd |sbatch |source |kubectl |docker |srun )")
# Commands that test_documents_run.py does not execute, and what checks them in its place.
NOT_RUN = {
    r"git clone|cd |(\S+/)?pip install|(\S+/)?python3? -m venv|source \S+/activate": (
        "installs, or needs the network: .ci/run does it from a clone; tests/unit/test_console.py, from the wheel"
    ),
    r"hf download": "needs the network: the tests write folders of the same form in its place",
    r"\./launch/quickstart\.sh|\./launch/test\.sh|\.ci/run": "is what .ci/run runs, or .ci/run itself",
    r"source launch/env\.sh": "changes the shell: tests/unit/test_launch.py",
    r"sbatch ": "submits a job: tests/unit/test_launch.py, with programs in place of SLURM's",
    r"python -m visionfm_jax\.main --config=configs/vit_huge\.py": "visionfm train --config=vit_huge, another spelling",
    r"(\S+/)?python (benchmarks|tools/attack)/": "takes long: tests/unit/test_documents.py parses its arguments",
    r"python tools/make_crawl\.py": "makes thousands of pictures: tests/unit/tools/test_make_crawl.py, fewer of them",
    r"visionfm bench .* --steps=": "needs a GPU: tests/unit/test_documents.py parses its arguments",
    r"visionfm replay ": "compiles two steps with all their layers: tests/e2e/test_faults.py",
    r"visionfm plan ": "compiles for GPUs: tests/e2e/test_plan.py, with the tiny variant",
    r"visionfm train --config=swinv2_g_clip_640:tiny": "tests/e2e/test_pairs_runs.py trains it",
    r".* --to=onnx": "needs packages that exclude ours: .ci/run, by tests/parity/check_onnx.py",
}
# Blocks that are neither commands nor Python: page and beginning.
SHOWN = {
    "BUILD.md": ["step 3 again"],
    "docs/architecture.md": ["configs/        one file"],
    "docs/fine_tune.md": ["starts from "],
    "docs/own_images.md": ["pets/train/cat/"],
    "docs/plan.md": ["[h100-slow-network]", '{"device": "NVIDIA H100'],  # tests/unit/parallel/test_targets.py
    "docs/use.md": ["timm.create_model("],  # tests/parity/check_exports.py, where timm is
}


def blocks(page: Path) -> Iterator[str]:
    """The indented blocks of a page, without their indentation."""
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
    for block in re.findall(r"(?m)\n\n((?: {4}.*\n|\n+(?= {4}))+)", f"\n{text}\n"):
        yield textwrap.dedent(block).rstrip("\n") + "\n"


def commands_of(block: str) -> list[str]:
    """The commands of a block, if it is one of commands."""
    lines = [line for line in block.replace("\\\n", " ").split("\n") if line.strip()]
    if not (OURS.match(lines[0]) or OTHERS.match(lines[0])):
        return []
    return [part.strip() for line in lines for part in re.split(r"\s&&\s", line)]


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every block of commands."""
    for page in PAGES:
        for block in blocks(page):
            for command in commands_of(block):
                yield page.relative_to(ROOT).as_posix(), command


def is_run(command: str) -> bool:
    """Whether it is executed, and not one of `NOT_RUN`."""
    return not any(re.match(pattern, command) for pattern in NOT_RUN)


def python_of(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return [block for block in blocks(ROOT / page) if kind_of(page, block) == "python"]


def kind_of(page: str, block: str) -> str:
    """What a block is: commands, shown, python; or "" if nothing says how it is checked."""
    if commands_of(block):
        return "commands"
    if block.lstrip().startswith(tuple(SHOWN.get(page, ()))):
        return "shown"
    return "python" if _is_python(block) else ""


def files_of(page: str) -> dict[str, str]:
    """The files that blocks of Python say they are, in a comment on their first line."""
    return {name[1]: code for code in python_of(page) if (name := re.match(r"# (\w+\.py)\n", code))}


def _is_python(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def run_python(code: str, names: dict[str, Any]) -> int:
    """Execute a block; what a line's comment says of the type and shape of its value is true. How many say it."""
    checked, lines = 0, code.split("\n")
    for node in ast.parse(code).body:
        first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", ()))])
        part = "\n".join(lines[first - 1 : node.end_lineno])
        if not isinstance(node, ast.Expr):
            exec(part, names)
            continue
        value = eval(part.partition("  # ")[0], names)
        if said := re.search(r"  # (u?int\d+|float32) (\([\d, ]*\))", part):
            assert (str(value.dtype), str(value.shape)) == said.groups(), part
            checked += 1
        elif said := re.search(r"  # (\([\d, ]*\))$", part):
            assert str(value) == said[1], part
            checked += 1
    return checked
