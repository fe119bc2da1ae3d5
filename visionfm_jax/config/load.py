"""A configuration from a file and the command line.

`--config=FILE.py[:VARIANT]` names a file that defines `get_config(variant)`, or one that comes with the package;
`--config=RUN` takes the settings that a run's folder has saved;
`--config.a.b=value` sets a field; the last of several counts. A run's length is `train.steps` or `train.epochs`: a flag
for one overrides the other. `--config.data.train[0].kind=folder` makes a source one of another kind
(`data.sources.kinds`).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any

from visionfm_jax.config.limits import types_of
from visionfm_jax.config.saved import of_run
from visionfm_jax.config.schema import Choice, Config, ModelConfig
from visionfm_jax.errors import ConfigError

MODULE = "visionfm_jax_config_file"  # by which a configuration file is imported
_PLAIN = (int, float, str, bool)  # all other types of fields are groups of fields
_OVERRIDE = re.compile(r"--config\.([^=]*)(?:=(.*))?", re.DOTALL)


def shipped() -> dict[str, Path]:
    """The configurations that come with the package, by name: in an installed package, or a clone of the repository."""
    package = Path(__file__).parents[1]
    found = next(folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir())
    return {path.stem: path for path in sorted(found.glob("*.py"))}


def load_file(spec: str) -> Config:
    """The configuration of "FILE.py" or "FILE.py:VARIANT", or of the folder of a run.

    Where there is no such file, "vit_huge", "vit_huge.py" and "configs/vit_huge.py" are that of `shipped`.

    Raises:
      ConfigError: no such file, it does not run, it has no such variant, or it gives something else.
    """
    path, _, variant = spec.partition(":")
    try:
        if Path(spec).is_dir():
            return of_run(Path(spec))
        there = Path(path).is_file()
        if not there and (own := _shipped_as(path)):
            path, there = str(own), True
        known = [] if there else [*map(str, Path(path).parent.glob("*.py")), *shipped()]
        near = difflib.get_close_matches(path, known, cutoff=0.5)
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"--config={_beginning(path)}: cannot be read ({cause}); name a Python file") from error
    if not there:
        hint = f"did you mean {near[0]}?" if near else f"name a Python file, or one of {', '.join(shipped())}"
        raise ConfigError(f"--config={_beginning(path)}: no such file; {hint}")
    if not path.endswith(".py"):
        raise ConfigError(f"--config={path}: is not a Python file; name one of configs/*.py")
    module_spec = importlib.util.spec_from_file_location(MODULE, path)
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # where a dataclass that the file defines looks for its types
    try:
        module_spec.loader.exec_module(module)
        if not callable(getattr(module, "get_config", None)):
            raise ConfigError("defines no get_config(variant); define it to return a visionfm_jax.config.Config")
        if not inspect.signature(module.get_config).parameters:
            raise ConfigError('get_config takes no argument; define it as get_config(variant: str = "")')
        config = module.get_config(variant)
        if type(config) is not Config:
            what = "a subclass of Config" if isinstance(config, Config) else f"{type(config).__name__}"
            raise ConfigError(f"get_config returned {what}; return a visionfm_jax.config.Config")
        _check_groups(config)
    except ConfigError as error:
        raise ConfigError(f"--config={spec}: {_text(error)}") from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # whatever the file does wrong is the user's to see in one line
        raise ConfigError(
            f"--config={spec}: {_line(error, module_spec.origin)}{type(error).__name__}: {_text(error)}; fix the file"
        ) from error
    return config


def _shipped_as(path: str) -> Path | None:
    """The file of `shipped` that `path` names, if it does."""
    name = re.fullmatch(r"(?:configs/)?([^/]+?)(?:\.py)?", path)
    return shipped().get(name[1]) if name else None


def _check_groups(holder: Any, prefix: str = "") -> None:
    """Refuse a configuration whose fields cannot be named, as one was deleted or a group of them is something else.

    A group that stands in two places becomes two, so that a flag sets the one field that it names. A class of the
    user's must set what its base declares and leaves open, such as `EvalConfig.measures`.
    """
    own_fields = {field.name for field in dataclasses.fields(holder)}
    for base in (base for base in type(holder).__mro__ if base is not ModelConfig):  # networks of texts have no images
        for leaf in inspect.get_annotations(base).keys() - own_fields:
            if not hasattr(type(holder), leaf) and leaf not in vars(holder):
                where, name = f"config.{prefix}".rstrip("."), type(holder).__name__
                raise ConfigError(
                    f"{where}: {name} sets no {leaf}, which {base.__name__} declares; set it in the class"
                )
    for field in dataclasses.fields(holder):
        name = f"config.{prefix}{field.name}"
        if not hasattr(holder, field.name):
            raise ConfigError(f"{name}: was deleted; give it a value")
        value = getattr(holder, field.name)
        kind = types_of(type(holder))[field.name]
        group = next((k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and k not in _PLAIN), None)
        several = isinstance(value, tuple) and typing.get_origin(kind) is tuple
        own = [copy.copy(item) for item in ((value if several else (value,)) if group else ())]
        for i, item in enumerate(own):
            if not (isinstance(item, group) and dataclasses.is_dataclass(item)):
                raise ConfigError(
                    f"{name}{f'[{i}]' * several}: is of type {type(item).__name__}; set one of type {group.__name__}"
                )
            _check_groups(item, f"{prefix}{field.name}{f'[{i}]' * several}.")
        if group:
            setattr(holder, field.name, tuple(own) if several else own[0])


def _line(error: BaseException, path: str) -> str:
    """Where in the file at `path` an error came up, for people; empty: nowhere in it."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    if isinstance(error, SyntaxError) and error.filename == path:
        lines.append(error.lineno)
    return f"line {lines[-1]}: " if lines else ""


def _text(error: BaseException) -> str:
    """What an error says, in one line."""
    try:
        return " ".join(str(error).split())[:500] or "no reason given"
    except BaseException as other:
        return f"its text cannot be had ({type(other).__name__})"


def variant_of(allowed: Sequence[str], variant: str) -> str:
    """For config files: `variant` if it is allowed (the empty one always is).

    Raises:
      ConfigError: it is not; with the choices.
    """
    if variant and variant not in allowed:
        raise ConfigError(f"no variant {variant!r}; there is {', '.join(allowed) or 'none'}")
    return variant


def from_arguments(
    arguments: Sequence[str], change: Callable[[Config], object] = lambda config: None
) -> tuple[Config, list[str]]:
    """The configuration that `arguments` name, checked, and the arguments that are not about it.

    Args:
      arguments: of the command line.
      change: what is done to the configuration before the fields that `arguments` name are set.

    Raises:
      ConfigError: as `load_file`; an unknown field, a value of another type, a broken rule.
    """
    specs, overrides, rest = sort_arguments(arguments)
    config = overridden(specs, overrides, change)
    config.validate()
    return config, rest


Override = tuple[str, str | None]  # the name of a field, and its value, if one is given


def sort_arguments(arguments: Sequence[str]) -> tuple[list[str], list[Override], list[str]]:
    """Configuration files, fields to set, and the arguments that are not about the configuration."""
    specs, overrides, rest = [], [], []
    words = iter(arguments)
    for word in words:
        if word == "--config":
            specs.append(next(words, ""))
        elif word.startswith("--config="):
            specs.append(word.removeprefix("--config="))
        elif match := _OVERRIDE.fullmatch(word):
            overrides.append((match[1], match[2]))
        else:
            rest.append(word)
    return specs, overrides, rest


def overridden(
    specs: Sequence[str],
    overrides: Sequence[Override],
    change: Callable[[Config], object] = lambda config: None,
) -> Config:
    """The configuration of the one file that `specs` name, with fields set; not checked.

    Raises:
      ConfigError: as `from_arguments`, save for broken rules.
    """
    if len(specs) != 1 or not specs[0] or specs[0].startswith("-"):
        what = f"--config is given {len(specs)} times" if len(specs) > 1 else "--config is missing, or has no value"
        raise ConfigError(f"{what}; give one --config=FILE.py[:VARIANT], e.g. --config=configs/quickstart.py")
    config = load_file(specs[0])
    change(config)
    return with_fields(config, overrides)


def with_fields(config: Config, overrides: Sequence[Override]) -> Config:
    """`config` with fields set, in place; not checked.

    Raises:
      ConfigError: an unknown field, a value of another type, both lengths of the run.
    """
    # What a source has before its kind is changed, the kinds, and what it has then: whatever order they are given in.
    known = set(fields(config))
    for name, text in sorted(overrides, key=lambda o: 2 if o[0] not in known else o[0].endswith(".kind")):
        _set(config, name, text)
    lengths = {name.rpartition(".")[2] for name, _ in overrides if name in ("train.steps", "train.epochs")}
    set_here = [leaf for leaf in sorted(lengths) if getattr(config.train, leaf)]
    if len(set_here) > 1:
        raise ConfigError("--config.train.epochs and --config.train.steps both set the length of the run; give one")
    if set_here == ["steps"]:
        config.train.epochs = 0.0
    if set_here == ["epochs"]:
        config.train.steps = 0
    return config


def fields(config: Any, prefix: str = "") -> Iterator[str]:
    """Every name that an override can set, such as optim.lr or data.train[0].path."""
    if isinstance(config, Choice) and config.kinds:
        yield f"{prefix}kind"
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


def _set(config: Config, name: str, text: str | None) -> None:
    known = list(fields(config))
    if name not in known:
        near = _likest(name, known)
        hint = "; did you mean " + " or ".join(near) + "?" if near else f"; there are {', '.join(known[:8])}, …"
        raise ConfigError(f"--config.{_beginning(name)}: no such field{hint}")
    *parents, leaf = re.sub(r"\[(\d+)\]", r".\1", name).split(".")
    holder = _at(config, parents)
    if leaf == "kind" and isinstance(holder, Choice) and holder.kinds:
        _put(config, parents, _of_kind(holder, name, text or ""))
        return
    kind, now = types_of(type(holder))[leaf], getattr(holder, leaf)
    if text is None and kind is not bool:
        raise ConfigError(f"--config.{name}: has no value; write --config.{name}=VALUE")
    if Ellipsis in typing.get_args(kind) and dataclasses.is_dataclass(typing.get_args(kind)[0]):
        if text.replace(" ", "") != "()":
            raise ConfigError(
                f"--config.{name}={_beginning(text)}: a flag can only set it to (); set other values in the file"
            )
        now = ()
    try:
        setattr(holder, leaf, _parse("true" if text is None else text, kind))
    except ValueError as error:
        what = kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
        raise ConfigError(f"--config.{name}={_beginning(text)}: is not of type {what}; e.g. {now!r}") from error


def _at(config: Config, parts: Sequence[str]) -> Any:
    """The group of fields, or the tuple of groups, that lies at `parts`."""
    holder: Any = config
    for part in parts:
        holder = holder[int(part)] if part.isdigit() else getattr(holder, part)
    return holder


def _put(config: Config, parts: Sequence[str], value: Any) -> None:
    """Replace the group of fields at `parts`."""
    *parents, last = parts
    if not last.isdigit():
        setattr(_at(config, parents), last, value)
        return
    groups = list(_at(config, parents))
    groups[int(last)] = value
    _put(config, parents, tuple(groups))


def _of_kind(group: Choice, name: str, kind: str) -> Choice:
    """`group` as one of another kind, with what has been set of it.

    Raises:
      ConfigError: there is no such kind, or it has no field for something that has been set.
    """
    if kind == group.kind:
        return group
    if kind not in group.kinds:
        near = difflib.get_close_matches(kind, group.kinds, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there is {', '.join(group.kinds)}"
        raise ConfigError(f"--config.{name}={_beginning(kind)}: no such kind; {hint}")
    cls = group.kinds[kind]
    values = {f.name: getattr(group, f.name) for f in dataclasses.fields(group) if getattr(group, f.name) != f.default}
    if lost := [field for field in dataclasses.fields(group) if field.name in values.keys() - types_of(cls).keys()]:
        was = ", ".join(f"{field.name}, which is {values[field.name]!r}" for field in lost)
        flags = " ".join(f"--config.{name.removesuffix('kind')}{field.name}={field.default}" for field in lost)
        raise ConfigError(
            f"--config.{name}={kind}: a {cls.__name__} has no {was}; to drop this, set the defaults: {flags}"
        )
    return cls(**values)


def _likest(name: str, known: Sequence[str]) -> list[str]:
    """At most three of the `known` fields, the likest first: by letters, or as short for long, lr for learning_rate."""
    group, _, leaf = name.rpartition(".")
    words = re.findall("[a-z0-9]+", leaf.lower())
    likeness = {}
    for other in known:
        own_group, _, own = other.rpartition(".")
        short = own in ("".join(w[0] for w in words), leaf.lower()) or leaf == "".join(w[0] for w in own.split("_"))
        likeness[other] = max(
            difflib.SequenceMatcher(None, name, other).ratio(),
            0.8 * difflib.SequenceMatcher(None, leaf, own).ratio() + 0.15 * (group == own_group),
            0.9 * short + 0.1 * (group == own_group),
        )
    return [k for k in sorted(known, key=lambda k: -likeness[k])[:3] if likeness[k] >= 0.6]


def _beginning(text: str) -> str:
    """`text` for people: short, control characters escaped."""
    text = text if text.isprintable() else repr(text)[1:-1]
    return text if len(text) <= 60 else f"{text[:60]}… ({len(text):,} characters)"


def _parse(text: str, kind: Any) -> Any:
    """`text` as a value of `kind`; a tuple of numbers or names in any brackets or none, names in any quotes or none."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError(text)
        return text.lower() == "true"
    if kind in (int, float, str):
        return kind(text)
    if isinstance(kind, UnionType):  # one number, or a pair of them
        number, pair = typing.get_args(kind)
        return _parse(text, pair if re.search(r"[,()\[\]]", text) else number)
    inside = re.fullmatch(r"\((.*)\)|\[(.*)\]|([^()\[\]]*)", text.strip())
    if not inside:
        raise ValueError(text)
    items = (inside[1] or inside[2] or inside[3] or "").split(",")
    if not items[-1].strip():  # of (1,) and ()
        items.pop()
    kinds = typing.get_args(kind)
    if Ellipsis in kinds:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        raise ValueError(text)
    return tuple(
        _parse(item.strip().strip("\"'") if k is str else item, k) for item, k in zip(items, kinds, strict=True)
    )


def describe(config: Config) -> str:
    """The derived quantities, a line each, for people."""
    return "\n".join(
        f"  {k:16} {v:,.6g}" if isinstance(v, float) else f"  {k:16} {v:,}"
        for k, v in config.derived().items()
        if v or k != "steps_per_epoch"  # the size of the data is not given
    )
