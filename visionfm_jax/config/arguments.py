"""Command lines: a program's own arguments, and those of its configuration beside them."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import os
import re
import sys
import textwrap
import tokenize
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from visionfm_jax.config import load
from visionfm_jax.config.limits import OneOf, limits_of, types_of
from visionfm_jax.config.rules import shown
from visionfm_jax.config.schema import Choice, Config
from visionfm_jax.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """argparse, whose errors are one line and exit code 2 by `errors.entry_point`, and which knows `--config`.

    Args:
      program: as it was called, such as "visionfm train" or "python -m visionfm_jax.main".
      text: what it does; the module's docstring.
    """

    def __init__(self, program: str, text: str):
        super().__init__(
            prog=program,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse_args(self, arguments: Sequence[str]) -> argparse.Namespace:  # type: ignore[override]
        """The values of the program's own arguments.

        Raises:
          ConfigError: one is unknown, lacks its value or has a wrong one.
        """
        known, unknown = self.parse_known_args(arguments)
        if unknown:
            self.error(self._unknown(unknown[0]))
        return known

    def parse_with_config(
        self,
        arguments: Sequence[str],
        change: Callable[[Config, argparse.Namespace], object] = lambda config, values: None,
    ) -> tuple[Config, argparse.Namespace]:
        """The configuration, checked, and the values of the program's own arguments.

        With --help: print it, with the fields of the configuration if one is named, and exit.

        Args:
          arguments: of the command line.
          change: what the program's own arguments change of the configuration, before its fields are set.

        Raises:
          ConfigError: as `parse_args` and `load.from_arguments`.
        """
        self.add_argument(
            "--config",
            metavar="FILE.py[:VARIANT]",
            help="configuration file, the name of a shipped one, or the folder of a run; "
            "--config.FIELD=VALUE sets a field; "
            "--config=FILE.py --help lists the fields",
        )
        specs, overrides, own = load.sort_arguments(arguments)
        if "--help" in own or "-h" in own:
            more = field_help(load.overridden(specs, overrides)) if specs else _configurations(self.prog)
            show_help(f"{self.format_help()}\n{more}")
            self.exit()
        values = self.parse_args(own)
        return load.from_arguments(arguments, lambda config: change(config, values))[0], values

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with `message`, and how to see what there is."""
        raise ConfigError(f"{message}; see {self.prog} --help")

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unexpected argument {shown(word)}: arguments have the form --NAME=VALUE"
        name = word.partition("=")[0]
        options = [o for o in self._option_string_actions if o.startswith("--")]
        near = difflib.get_close_matches(f"--{name.lstrip('-')}", options, n=1, cutoff=0.6)
        if re.match(r"-+config\.", word):
            near = [f"--{name.lstrip('-')}"]
        return f"no argument {shown(name)}" + (f"; did you mean {near[0]}?" if near else "")


def file_name(text: str) -> str:
    """The `type` of an argument that names a file: an empty variable of a script is no file."""
    if not text:
        raise argparse.ArgumentTypeError("names no file")
    return text


def show_help(text: str) -> None:
    """Print, though it may be read only in part."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `| head` has read enough; Python shall not complain when it flushes at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _configurations(program: str) -> str:
    return (
        f"To list the fields of a configuration: {program} --config=FILE.py --help\n"
        f"Shipped configurations: {', '.join(load.shipped())}"
    )


def field_help(config: Config) -> str:
    """Every field of `config` as a flag takes it, a class a paragraph: name, value, meaning, type and bounds, and the
    default where the value is another.
    """
    lines = ["Fields (set by --config.FIELD=VALUE) and their values in this configuration:"]
    for prefix, holder in _holders(config):
        about = (type(holder).__doc__ or "").partition("\n")[0]
        lines += ["", f"{prefix.rstrip('.') or 'config'} ({type(holder).__name__}): {about}"]
        if isinstance(holder, Choice) and holder.kinds:
            lines.append(f"  {prefix + 'kind':32} {holder.kind!r:24} one of {' | '.join(holder.kinds)}")
        for field in dataclasses.fields(holder):
            value = getattr(holder, field.name)
            if dataclasses.is_dataclass(value):
                continue
            if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
                kinds = [type(item).__name__ for item in value]
                value = ", ".join(kinds) if len(set(kinds)) > 1 else f"{len(kinds)} x {kinds[0]}"
            else:
                value = repr(value)
            what, kind = meaning_of(type(holder), field), kind_of(type(holder), field)
            default = "" if value == repr(field.default) or not kind else default_of(field)
            about = "; ".join(filter(None, (what, kind, default and f"default {default}")))
            lines.append(f"  {prefix + field.name:32} {value:24} {about}".rstrip())
    return "\n".join(lines)


def meaning_of(cls: type, field: dataclasses.Field) -> str:
    """What the comment beside a field of `cls`, or of a class that it is derived from, says."""
    return next((text for base in cls.__mro__ if (text := comments(base).get(field.name))), "")


def default_of(field: dataclasses.Field) -> str:
    """As Python writes it; empty: there is none."""
    return "" if field.default is dataclasses.MISSING else repr(field.default)


def _holders(holder: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`holder` and the dataclasses inside, with the beginnings of their fields' names."""
    yield prefix, holder
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if dataclasses.is_dataclass(value):
            yield from _holders(value, f"{prefix}{field.name}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from _holders(item, f"{prefix}{field.name}[{i}].")


def kind_of(cls: type, field: dataclasses.Field) -> str:
    """Type and bounds of a field of `cls`, but for the choices that its comment names."""
    kind, limit, comment = types_of(cls)[field.name], limits_of(cls).get(field.name), meaning_of(cls, field)
    name = kind.__name__ if isinstance(kind, type) else str(kind).removeprefix("tuple")
    if "visionfm_jax" in name:  # a tuple of sources or evals
        return ""
    if isinstance(limit, OneOf) and all(str(value) in comment for value in limit.values):
        return name
    limits = " ".join(map(str, limit)) if type(limit) is tuple else str(limit or "")
    return f"{name} {limits}".strip()


@functools.cache
def comments(cls: type) -> dict[str, str]:
    """What stands behind the fields of a dataclass in its source; {} where there is no source."""
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):  # of a built-in class
        return {}
    source = textwrap.dedent(source)
    [definition] = ast.parse(source).body
    lines = {
        line: node.target.id
        for node in definition.body
        if isinstance(node, ast.AnnAssign)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    found = [(lines.get(t.start[0]), t.string.lstrip("# ")) for t in tokens if t.type == tokenize.COMMENT]
    return {name: text for name, text in found if name}
