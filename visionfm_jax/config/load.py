"""A configuration from a file and the command line.

`--config=FILE.py[:VARIANT]` names a file that defines `get_config(variant)`; `--config.a.b=value` sets a field.
`main` parses them with `ml_collections.config_flags` (`define_flag`, `from_flag`); where that is not installed,
as on bare GPU images, `from_arguments` understands the same words with the standard library alone.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import re
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from visionfm_jax.config.schema import Config
from visionfm_jax.errors import ConfigError

_OVERRIDE = re.compile(r"^--config\.([^=]+)(?:=(.*))?$", re.DOTALL)


def load_file(spec: str) -> Config:
    """The configuration of "FILE.py" or "FILE.py:VARIANT".

    Raises:
      ConfigError: no such file, it does not run, it has no such variant, or it gives something else.
    """
    path, _, variant = spec.partition(":")
    if not Path(path).is_file():
        near = difflib.get_close_matches(path, map(str, Path(path).parent.glob("*.py")), cutoff=0.5)
        raise ConfigError(f"--config={path}: no such file" + (f"; did you mean {near[0]}?" if near else ""))
    if not path.endswith(".py"):
        raise ConfigError(f"--config={path}: is no Python file; name one of configs/*.py")
    module_spec = importlib.util.spec_from_file_location("visionfm_jax_config_file", path)
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        config = module.get_config(variant)
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {error}") from error
    except Exception as error:  # whatever the file does wrong is the user's to see in one line
        raise ConfigError(f"--config={spec}: {type(error).__name__} in the file: {error}") from error
    if not isinstance(config, Config):
        raise ConfigError(
            f"--config={spec}: get_config returned {type(config).__name__}; return a visionfm_jax.config.Config"
        )
    return config


def variant_of(allowed: Sequence[str], variant: str) -> str:
    """For config files: `variant` if it is allowed (the empty one always is).

    Raises:
      ConfigError: it is not; with the choices.
    """
    if variant and variant not in allowed:
        raise ConfigError(f"no variant {variant!r}; there is {', '.join(allowed) or 'none'}")
    return variant


def from_arguments(arguments: Sequence[str]) -> tuple[Config, list[str]]:
    """The configuration that `arguments` name, checked, and the arguments that are not about it.

    Raises:
      ConfigError: as `load_file`; an unknown field, a value of another type, a broken rule.
    """
    specs, overrides, rest = [], [], []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            specs.append(next(words, ""))
        elif word.startswith("--config="):
            specs.append(word.removeprefix("--config="))
        elif match := _OVERRIDE.match(word):
            overrides.append((match[1], "true" if match[2] is None else match[2]))
        else:
            rest.append(word)
    if len(specs) != 1:
        raise ConfigError("give one --config=FILE.py[:VARIANT], e.g. --config=configs/quickstart.py")
    config = load_file(specs[0])
    for name, text in overrides:
        _set(config, name, text)
    config.validate()
    return config, rest


def define_flag() -> Any:
    """Define `--config` for an `absl.app` door; its holder goes to `from_flag`."""
    from ml_collections import config_flags

    return config_flags.DEFINE_config_file(
        "config", None, "FILE.py[:VARIANT]; then --config.FIELD=VALUE", lock_config=False
    )


def check_arguments(arguments: Sequence[str]) -> None:
    """Refuse, before `define_flag`'s parser meets them, a missing file and unknown fields, in plain words.

    Raises:
      ConfigError: as `from_arguments`, of which this is everything but the result.
    """
    from_arguments(arguments)


def from_flag(holder: Any) -> Config:
    """The value of the flag, checked.

    Raises:
      ConfigError: a broken rule.
    """
    config = holder.value
    config.validate()
    return config


def fields(config: Any, prefix: str = "") -> Iterator[str]:
    """Every name that an override can set, such as optim.lr or data.train[0].path."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield from _names(value, f"{prefix}{field.name}")


def _names(value: Any, name: str) -> Iterator[str]:
    if dataclasses.is_dataclass(value):
        yield from fields(value, f"{name}.")
    elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        yield name
        for i, item in enumerate(value):
            yield from fields(item, f"{name}[{i}].")
    else:
        yield name


def _set(config: Config, name: str, text: str) -> None:
    known = list(fields(config))
    if name not in known:
        leaf = name.rpartition(".")[2]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
        near += [k for k in known if k.rpartition(".")[2] == leaf and k not in near]
        hint = "; did you mean " + " or ".join(near[:3]) + "?" if near else f"; there are {', '.join(known[:8])}, …"
        raise ConfigError(f"--config.{name}: no such field{hint}")
    holder: Any = config
    *parents, leaf = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    for part in parents:
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    kind = typing.get_type_hints(type(holder))[leaf]
    try:
        setattr(holder, leaf, _parse(text, kind))
    except (ValueError, SyntaxError, TypeError) as error:
        shown = kind.__name__ if isinstance(kind, type) else str(kind)
        raise ConfigError(f"--config.{name}={text}: is no {shown}; such as {getattr(holder, leaf)!r}") from error


def _parse(text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind in (int, float, str):
        return kind(text)
    items, kinds = ast.literal_eval(text), typing.get_args(kind)
    if Ellipsis in kinds:  # a list of sources or evals: a flag can empty it, only a file can fill it
        kinds = ()
    if len(items) != len(kinds):
        raise ValueError(text)
    return tuple(k(v) for k, v in zip(kinds, items, strict=True))


def describe(config: Config) -> str:
    """The derived quantities, a line each, for people."""
    return "\n".join(
        f"  {k:16} {v:,.6g}" if isinstance(v, float) else f"  {k:16} {v:,}" for k, v in config.derived().items()
    )
