"""Sizes of networks: a row of a table by its name, and numbers in place of what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeVar

from visionfm_jax.config.limits import Problem
from visionfm_jax.errors import ConfigError

Row = TypeVar("Row", bound=NamedTuple)


class TransformerSize(NamedTuple):
    """Width D, layers L, heads N, width of the MLP."""

    width: int
    depth: int
    heads: int
    mlp: int


def size_by_name(sizes: Mapping[str, Row], config: Any) -> Row:
    """The row that `config.size` names, with what `config` gives as numbers in its place; 0 gives nothing.

    Raises:
      ConfigError: there is no such row.
    """
    if config.size not in sizes:
        name = type(config).__name__
        raise ConfigError(f"{name}.size = {config.size!r}: must be one of {', '.join(sizes)}; set it to one of them")
    row = sizes[config.size]
    return row._replace(**{name: _either(getattr(config, name, 0), number) for name, number in row._asdict().items()})


def _either(given: Any, named: Any) -> Any:
    if isinstance(given, tuple):
        return tuple(number or other for number, other in zip(given, named, strict=True))
    return given or named


def heads_problems(name: str, width: int, heads: int, unit: int = 1, why: str = "") -> list[Problem]:
    """The rule that the heads of the network that stands as field `name` share its width, `unit` channels at a time."""
    step = heads * unit
    if width % step == 0:
        return []
    near = max(1, round(width / step)) * step
    rule = f"must be a multiple of {step}, for {heads} heads{why}"
    return [(f"{name}.width", width, rule, f"the nearest is {near}; or set {name}.heads")]
