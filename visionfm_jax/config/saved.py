"""A configuration from what `schema.to_dict` made of it: that of a run folder, whose file runs no code.

A model, a task, a transform, a source and an eval are found by their `kind` among the classes that are there: those of
this package, and one's own, whose modules are imported before.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from visionfm_jax.config.limits import types_of
from visionfm_jax.config.schema import Choice, Config, ModelConfig
from visionfm_jax.errors import ConfigError, printable

SETTINGS = "config.json"  # of a run folder
TOKENIZER = "tokenizer"  # likewise, with the ending of the file that it is a copy of


def of_run(folder: Path) -> Config:
    """The configuration of the run in `folder`, wherever the folder is now, with the tokenizer that is kept there.

    Raises:
      ConfigError: the folder is not one of a run, its settings are damaged, or they name classes that are not there.
      OSError: they cannot be read.
    """
    path = folder / SETTINGS
    if not path.is_file():
        there = f"it has no {SETTINGS}" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"{printable(str(folder))}: {there}; name the folder of a run, such as runs/quickstart")
    _import_classes()
    try:
        kept = json.loads(path.read_bytes())
        if isinstance(kept, dict) and "config" not in kept:
            raise ConfigError(
                "is not of a run, but perhaps of another library: its folder needs weights beside it, and only the "
                "commands that use, export or put a model on a board take it"
            )
        config = from_dict(kept["config"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}; take it from a copy of the run") from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    config.workdir = str(folder)
    name = getattr(config.task, "tokenizer", "")
    if (kept := folder / f"{TOKENIZER}{Path(name).suffix}").is_file():
        config.task.tokenizer = str(kept)
    return config


def _import_classes() -> None:
    """Those of this package that a configuration may name."""
    for name in ("visionfm_jax.tasks", "visionfm_jax.models.backbones"):
        for module in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(module.name)
    for name in ("data.sources.kinds", "data.transforms", "evals.kinds"):
        importlib.import_module(f"visionfm_jax.{name}")


def from_dict(values: Mapping[str, Any]) -> Config:
    """The configuration that `values` are of, checked; fields that they lack, those of an older version, have defaults.

    Raises:
      ConfigError: no such class or field is there, or a broken rule.
    """
    config = _group(Config, values, "config")
    config.validate()
    return config


def model_from_dict(values: Mapping[str, Any]) -> ModelConfig:
    """The model that `values` are of; what they lack has defaults.

    Raises:
      ConfigError: no such class or field is there.
    """
    _import_classes()
    return _group(ModelConfig, values, "config.model")


def _group(cls: type, values: Any, name: str) -> Any:
    """A dataclass, or the one that `kind` names of those below it."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name}: is {values!r:.60}, not a group of fields")
    values = dict(values)
    if issubclass(cls, Choice):
        cls = _class_of(cls, values.pop("kind", None), name)
    types = types_of(cls)
    if unknown := values.keys() - types.keys():
        what = ", ".join(sorted(map(str, unknown)))
        raise ConfigError(f"{name}: {cls.__name__} has no {what}; a newer version of visionfm_jax may have")
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := required - values.keys():
        raise ConfigError(f"{name}: lacks {', '.join(sorted(missing))}")
    return cls(**{leaf: _value(types[leaf], value, f"{name}.{leaf}") for leaf, value in values.items()})


def _value(kind: Any, value: Any, name: str) -> Any:
    """A field's, of type `kind`; that a plain value is of its type, `Config.validate` checks."""
    item = typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else None
    if _is_group(item) and isinstance(value, list | tuple):
        return tuple(_group(item, each, f"{name}[{i}]") for i, each in enumerate(value))
    if _is_group(kind):
        return _group(kind, value, name)
    return tuple(_value(None, each, name) for each in value) if isinstance(value, list) else value


def _is_group(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, Choice) or dataclasses.is_dataclass(kind))


def _class_of(base: type[Choice], kind: Any, name: str) -> type:
    """That of a kind: `base` or one below it."""
    there = {
        cls.kind: cls for cls in (base, *_below(base)) if dataclasses.is_dataclass(cls) and not inspect.isabstract(cls)
    }
    if kind in there:
        return there[kind]
    raise ConfigError(
        f"{name}.kind = {kind!r:.60}: no such class is there, but {', '.join(sorted(there))}; import the module of a "
        "class of your own first"
    )


def _below(cls: type) -> Iterator[type]:
    for below in cls.__subclasses__():
        yield below
        yield from _below(below)
