"""The commands and the lines of Python that the documents show."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
# The runs that commands name, and of which configuration they are.
RUNS = {
    "quickstart": "quickstart", "vit_huge": "vit_huge:tiny", "vit_huge_longer": "vit_huge:tiny",
    "vit_huge_tiny": "vit_huge:tiny",
    "swinv2_g_clip": "swinv2_g_clip:tiny", "swinv2_g_clip_tiny": "swinv2_g_clip:tiny", "clip": "swinv2_g_clip:tiny",
    "aurora_xl_tiny": "aurora_xl:tiny", "vit_huge_coco_tiny": "vit_huge_coco:tiny",
    "vit_huge_ade20k_tiny": "vit_huge_ade20k:tiny",
}  # fmt: skip
OURS = re.compile(r"(visionfm|(\.venv/bin/)?python -m visionfm_jax)\b")
OTHERS = re.compile(
    r"(\./launch/|\.ci/|pip |hf |git |python3\.12 -m venv |sbatch |source |python |kubectl |docker |srun )"
)


def commands() -> Iterator[tuple[str, str]]:
    """(page, command) of every block, a line each; what "…" or brackets leave open is a description."""
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for line in re.findall(r"(?m)^ {4,}(\S.*)$", text):
            for part in re.split(r"\s&&\s", line):
                if (OURS.match(part) or OTHERS.match(part)) and not re.search(r"…|\[-|FILE\.py", part):
                    yield page.relative_to(ROOT).as_posix(), part


def python_of(page: str) -> Iterator[str]:
    """The blocks of Python of a page, without those that leave something open."""
    text = f"\n{(ROOT / page).read_text()}"
    for block in re.findall(r"(?m)\n\n((?: {4}.*\n|\n(?= {4}))+)", text):
        code = textwrap.dedent(block)
        if "…" not in code and "$" not in code and _is_python(code):
            yield code


def _is_python(code: str) -> bool:
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return False
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return bool(names & {"vfm", "model"} or any(isinstance(node, ast.FunctionDef) for node in tree.body))


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
