"""Limits of a field by itself: bounds of numbers, and closed sets of words.

A configuration class names them in its `limits`. Bounds are generous: they refuse slips of the hand and what a counter
or an index cannot hold, not unusual runs. Every number is finite.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from types import UnionType
from typing import Any

Problem = tuple[str, object, str, str]  # field, value, rule, remedy
HeightWidth = tuple[int, int]  # in pixels, patches or tokens
ImageSize = int | HeightWidth  # of a field: both sides of a square, or height and width

_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")  # and halves of surrogate pairs, which no file name can hold
_LONGEST = 4096  # characters of a text; Linux' longest path
_ACCEPTED = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
_ARTICLES = {int: "an int", float: "a number", bool: "True or False", str: "a text"}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; the ends belong to it, save those that `above` and `below` leave out."""

    low: float
    high: float
    why: str = ""  # the reason, where it is not plain
    above: bool = False  # greater than `low`
    below: bool = False  # less than `high`
    off: bool = False  # or 0, which turns something off

    def __str__(self) -> str:
        ends = ", ".join(str(end) if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return ("0 or " if self.off else "") + ("(" if self.above else "[") + ends + (")" if self.below else "]")

    def problem(self, value: float) -> tuple[str, str] | None:
        """Rule and remedy if `value` lies outside."""
        if self.off and value == 0:
            return None
        small = value <= self.low if self.above else value < self.low
        large = value >= self.high if self.below else value > self.high
        if not (small or large):
            return None
        closed = not (self.above if small else self.below)
        remedy = f"the nearest is {self.low if small else self.high}" if closed else "set a value in that range"
        return f"must lie in {self}" + (f" ({self.why})" if self.why else ""), remedy


@dataclass(frozen=True)
class OneOf:
    """A closed set."""

    values: tuple[str | int, ...]

    def __str__(self) -> str:
        return " | ".join(map(str, self.values))

    def problem(self, value: object) -> tuple[str, str] | None:
        """Rule and remedy if `value` is another."""
        if value in self.values:
            return None
        names = {str(known).lower(): known for known in self.values}
        near = difflib.get_close_matches(str(value).lower(), names, n=1, cutoff=0.3)
        remedy = f"set it to {names[near[0]] if near else self.values[0]}"
        return f"must be one of {', '.join(map(str, self.values))}", remedy


@dataclass(frozen=True)
class FileName:
    """The name of a file or folder, and a part of metrics' names."""

    def __str__(self) -> str:
        return "letters, digits and ._-"

    def problem(self, value: str) -> tuple[str, str] | None:
        """Rule and remedy if `value` is no such name."""
        if re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", value):
            return None
        return "must be 1 to 100 letters, digits and ._- and not begin with . or -", 'set e.g. "vit_2"'


@dataclass(frozen=True)
class Filled:
    """A text that is not empty."""

    rule: str
    remedy: str

    def __str__(self) -> str:
        return "not empty"

    def problem(self, value: str) -> tuple[str, str] | None:
        """Rule and remedy if `value` is empty."""
        return None if value else (self.rule, self.remedy)


@dataclass(frozen=True)
class Remat:
    """What a backward pass recomputes, by name, or a name and a number of blocks: "full:18"."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{' | '.join(self.names)}, or one of the last {len(self.names) - 1} and a number of blocks: full:18"

    def problem(self, value: str) -> tuple[str, str] | None:
        """Rule and remedy if `value` is neither."""
        name, colon, blocks = value.partition(":")
        if found := OneOf(self.names).problem(name):
            rule, remedy = found
            return f"{rule}, or one of the last {len(self.names) - 1} and a number of blocks such as full:18", remedy
        if colon and name == self.names[0]:
            return f"must be without a number of blocks where it is {name}", f"set it to {name}"
        if colon and not re.fullmatch(r"[1-9]\d{0,3}", blocks):
            rule = "must have a number of blocks from 1 to 9999 behind the colon"
            return rule, f"set it to {name}:18, or to {name} for all blocks"
        return None


Limit = Range | OneOf | FileName | Filled | Remat
Limits = dict[str, Limit | tuple[Limit, ...]]  # a tuple has one limit for all its numbers, or one for each

SHARE = Range(0, 1, below=True)
CHANCE = Range(0, 1)
DECAY = Range(0, 0.999999, "1 - decay is rounded in fp32")
STEPS = Range(0, 2**30, "steps are counted in int32")
LOSS_WEIGHT = Range(0, 1e6)
IDS = Range(0, 2**24)
SIDE = Range(1, 4096)  # pixels
ATTENTION = OneOf(("auto", "xla", "cudnn"))
REMAT = Remat(("none", "attention", "dots", "branches", "full"))
MLP_MATMULS = OneOf(("compute", "fp8"))


def height_width(size: ImageSize) -> HeightWidth:
    """(H, W) of a field that is one number for both sides, or a pair."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def shortest(size: HeightWidth) -> ImageSize:
    """As a person writes it: one number where both sides are the same."""
    return size[0] if size[0] == size[1] else size


@functools.cache
def types_of(cls: type) -> dict[str, Any]:
    """The types of a dataclass's fields, also where its module has them as strings."""
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def limits_of(cls: type) -> Limits:
    """The limits that a class of a configuration and its bases name."""
    return {k: v for base in reversed(cls.__mro__) for k, v in vars(base).get("limits", {}).items()}


def field_problems(holder: Any, prefix: str = "") -> Iterator[Problem]:
    """What is wrong with the fields of `holder`, a dataclass named `prefix`, each by itself."""
    types, limits = types_of(type(holder)), limits_of(type(holder))
    known = [f.name for f in dataclasses.fields(holder)]
    for name in vars(holder).keys() - set(known):
        near = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
        yield f"{prefix}{name}", getattr(holder, name), "no such field", f"did you mean {prefix}{near}?"
    for name in known:
        yield from _value_problems(f"{prefix}{name}", getattr(holder, name), types[name], limits.get(name))


def _value_problems(name: str, value: Any, kind: Any, limit: Any) -> Iterator[Problem]:
    if isinstance(kind, UnionType):
        number, pair = typing.get_args(kind)
        if not isinstance(value, (int, tuple)) or isinstance(value, bool):
            rule = f"must be one number or (height, width), not {type(value).__name__}"
            yield name, value, rule, "set e.g. 224 or (224, 448)"
            return
        kind = pair if isinstance(value, tuple) else number
        if kind is pair and isinstance(limit, Range):
            limit = dataclasses.replace(limit, off=False)  # one 0 turns it off
    if typing.get_origin(kind) is tuple:
        yield from _tuple_problems(name, value, typing.get_args(kind), limit)
        return
    # A group of fields may be of a subclass; 2 for 2.0 is fine, but True for 1 is not.
    fits = type(value) in _ACCEPTED[kind] if kind in _ACCEPTED else isinstance(value, kind)
    if not fits:
        what = _ARTICLES.get(kind, f"a {kind.__name__}")
        yield name, value, f"must be {what}, not {type(value).__name__}", "set one"
    elif dataclasses.is_dataclass(value):
        yield from field_problems(value, f"{name}.")
    elif isinstance(value, str) and (_CONTROL.search(value) or len(value) > _LONGEST):
        rule = f"must be at most {_LONGEST} characters, none of them a control character"
        yield name, value, rule, "write it anew"
    elif isinstance(value, float) and not math.isfinite(value):
        yield name, value, "must be finite", f"set a value in {limit}"
    elif limit and (found := limit.problem(value)):
        yield name, value, *found


def _tuple_problems(name: str, value: Any, kinds: tuple, limit: Any) -> Iterator[Problem]:
    if type(value) is not tuple:
        yield name, value, f"must be a tuple, not {type(value).__name__}", "write (…,)"
        return
    if Ellipsis in kinds:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        yield name, value, f"must be a tuple of {len(kinds)} numbers", "write as many"
        return
    limits = limit if type(limit) is tuple else (limit,) * len(value)
    for i, (item, kind, own) in enumerate(zip(value, kinds, limits, strict=True)):
        yield from _value_problems(f"{name}[{i}]", item, kind, own)


def multiple_of(field: str, size: ImageSize, unit: int, what: str) -> list[Problem]:
    """The rule that the sides of `size`, the value of `field`, are multiples of `unit`, which is `what`; [] if so."""
    sides = height_width(size)
    if not any(side % unit for side in sides):
        return []
    near = shortest(tuple(max(1, round(side / unit)) * unit for side in sides))
    return [(field, size, f"must be a multiple of {what}", f"the nearest is {near}")]
