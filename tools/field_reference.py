"""Write docs/configuration.md anew from the classes of configurations: `python tools/field_reference.py`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionfm_jax import data, evals, models, tasks
from visionfm_jax.config import Config, ModelConfig, SourceConfig, TaskConfig
from visionfm_jax.config.arguments import default_of, kind_of, meaning_of
from visionfm_jax.config.limits import types_of

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
PACKAGES = (models, tasks, evals, data)  # where classes stand beside what they make
HEAD = """# Fields of a configuration

Written by `python tools/field_reference.py` from the classes themselves. `visionfm train --config=FILE.py --help`
prints the same for one configuration, with its values. A field is set in the file, or by `--config.FIELD=VALUE`, such
as `--config.optim.lr=1e-4` or `--config.data.train[0].path=/data`; what breaks a bound or a rule is refused before any
work starts.
"""


def classes() -> dict[type, list[str]]:
    """Every class that a configuration may be made of, and the fields that may hold it; outermost first."""
    for package in PACKAGES:
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    found: dict[type, list[str]] = {}

    def visit(cls: type, place: str) -> None:
        for kind in _kinds(cls):
            places = found.setdefault(kind, [])
            if place in places:
                continue
            places.append(place)
            for name, (groups, several) in groups_of(kind).items():
                for group in groups:
                    visit(group, f"{place}.{name}{'[i]' * several}")

    visit(Config, "config")
    return found


def groups_of(cls: type) -> dict[str, tuple[list[type], bool]]:
    """The fields of `cls` that hold fields themselves: the classes that each may hold, and whether it holds several."""
    out = {}
    for name, hint in types_of(cls).items():
        several = typing.get_origin(hint) is tuple
        kinds = typing.get_args(hint) if several else (hint,)
        if hint is ModelConfig:  # of all networks, those that a task trains
            kinds = list(dict.fromkeys(task.model_class for task in _kinds(TaskConfig)))
        groups = [kind for kind in kinds if list(_kinds(kind))]
        if groups:
            out[name] = (groups, several)
    return out


def _kinds(cls: Any) -> Iterator[type]:
    """`cls` and what is derived from it in the package, as far as they are dataclasses."""
    if not getattr(cls, "__module__", "").startswith("visionfm_jax."):
        return
    if "__dataclass_fields__" in vars(cls) and not inspect.isabstract(cls):
        yield cls
    for derived in sorted(cls.__subclasses__(), key=lambda kind: kind.__name__):
        yield from _kinds(derived)


def section(cls: type, places: list[str]) -> str:
    """A class's heading, what it is, and its fields."""
    about = " ".join(inspect.cleandoc(cls.__doc__ or "").partition("\n\n")[0].split())
    rows, groups = [], groups_of(cls)
    for field in dataclasses.fields(cls):
        kind, default = kind_of(cls, field), default_of(field)
        if field.name in groups:
            kinds = [kind for group in groups[field.name][0] for kind in _kinds(group)]
            kind = ", ".join(f"[{kind.__name__}](#{kind.__name__.lower()})" for kind in kinds)
        cells = f"`{field.name}`", kind, f"`{default}`" if default else ""
        rows.append(f"| {' | '.join(_escaped(cell) for cell in (*cells, meaning_of(cls, field)))} |")
    flag = f" Its `kind`, as a flag: `{cls.kind}`." if issubclass(cls, SourceConfig) else ""
    where = ", ".join(f"`{place}`" for place in places)
    return "\n".join([
        f"## {cls.__name__}", "", f"{about} In {where}.{flag}", "",
        "| field | type, bounds | default | meaning, unit |", "|---|---|---|---|", *rows,
    ])  # fmt: skip


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def page() -> str:
    """The whole file."""
    return "\n".join([HEAD, *(section(cls, places) + "\n" for cls, places in classes().items())])


def main() -> None:
    """Write."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
