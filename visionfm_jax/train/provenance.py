"""The provenance of a run's samples: kept in its folder, and compared when somebody continues it.

`config.json` has the exact settings, `config-until-N.json` those of the steps before N where they were others,
`data.json` the first samples of the order and what the training data are made of.
Refused are differences that would give a continued run other samples than it was promised: the settings below, another
order, other records, another tokenizer. Every other setting may change on purpose between two stages of a run (image
size, augmentation, learning rate, length, …) and is listed at the start. Paths may change: what is there is compared.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from visionfm_jax.config import CheckpointConfig, Config, EvalConfig, SourceConfig
from visionfm_jax.config.saved import SETTINGS
from visionfm_jax.config.schema import Choice, to_dict
from visionfm_jax.data.loader import run_order
from visionfm_jax.data.sources import Source
from visionfm_jax.data.tokenizer import file_digest
from visionfm_jax.errors import ConfigError, DataError, one_line
from visionfm_jax.storage import read_bytes

DATA = "data.json"
FIXED = ("seed", "train.batch_size", "data.shuffle", "task.pair_ratio")  # and data.train, but for the paths in it
PATHS = (".path", ".selection")
# What a step does not follow from: a replay leaves it as it is given. The devices may be others than the run's.
NOT_OF_A_STEP = (
    "name", "workdir", "evals", "checkpoint", "telemetry", "parallel", "data.workers", "data.threads", "data.prefetch",
    "data.max_damaged", "train.on_nonfinite", "task.tokenizer",
)  # fmt: skip
# Releases without a class for each kind kept these of every source and eval; of some kinds nothing read them.
OF_OTHER_KINDS = frozenset((
    "split", "image_key", "label_key", "caption_key", "selection",
    "classes", "prompts", "gallery", "decoding", "beams", "top_p",
))  # fmt: skip
SAMPLES = (0, 1, 2, 3, 10**2, 10**4, 10**6, 10**9)  # of the order, that are kept


class Provenance(NamedTuple):
    """The provenance of a run, in JSON values."""

    settings: dict[str, Any]  # config, derived, version of jax
    data: dict[str, Any]  # order, grain, tokenizer, sources; releases that shuffled otherwise kept none
    config: Config | None = None  # of which the settings are; not kept


def provenance_of(config: Config, sources: Sequence[Source]) -> Provenance:
    """Of a run that is about to train; `sources` are those of `config.data.train`.

    Raises:
      DataError: the data cannot be read.
    """
    order = run_order(config.data, config.seed, sources, config.task.pair_ratio)
    data = {
        "order": [order[i] for i in SAMPLES],
        "grain": version("grain"),
        "tokenizer": file_digest(config.task.tokenizer) if config.task.reads_captions else "",
        "sources": [{"records": len(s), "classes": s.class_names or (), "parts": s.fingerprint()} for s in sources],
    }
    settings = {"config": to_dict(config), "derived": config.derived(), "jax": version("jax")}
    return Provenance(*json.loads(json.dumps([settings, data])), config)


def read_provenance(folder: Path, settings: Path | None = None) -> Provenance:
    """Of the run in `folder`, which has checkpoints; {} for a file that is not there.

    Args:
      folder: the run's.
      settings: its file with the settings of the steps in question; None: the newest.

    Raises:
      ConfigError: one is damaged.
      DataError, StorageError: one cannot be read.
    """
    compared = "move it away to continue, and make sure that the settings are unchanged"
    settings = _read(settings or folder / SETTINGS, {"config": dict}, compared)
    parts = {"order": list, "grain": str, "tokenizer": str, "sources": list}
    return Provenance(settings, _read(folder / DATA, parts, _anew(folder)))


def classes_of(folder: Path) -> list[str]:
    """Names of the classes that the run in `folder` was trained on; []: not known.

    Raises:
      ConfigError, DataError, StorageError: as `read_provenance`.
    """
    kept = read_provenance(folder).data.get("sources", []) if folder.is_dir() else []
    names = next((source["classes"] for source in kept if isinstance(source, dict) and source.get("classes")), [])
    return list(map(str, names)) if isinstance(names, list) else []


def refuse_other_classes(weights: str, names: Sequence[str], newly_initialised: Mapping[str, Sequence[str]]) -> None:
    """Refuse a head that another run has trained for as many, but other classes.

    Args:
      weights: the folder of that run.
      names: of the classes of the data; empty: not known.
      newly_initialised: arrays that are not from the weights, by the reason.

    Raises:
      ConfigError: it is one.
      DataError, StorageError: as `read_provenance`.
    """
    before, new = classes_of(Path(weights)), {path for paths in newly_initialised.values() for path in paths}
    if len(before) != len(names) or list(names) == before or any(path.split("/")[0] == "head" for path in new):
        return
    label = next(i for i, (was, is_) in enumerate(zip(before, names, strict=True)) if was != is_)
    raise ConfigError(
        f"config.checkpoint.weights = {weights!r}: its head was trained for other classes (label {label} was "
        f"{before[label]!r}, is {names[label]!r}); list head in config.checkpoint.skip to begin a new one, or give the "
        "data the same classes"
    )


def former_settings(folder: Path) -> dict[int, Path]:
    """The files with settings that the run in `folder` had until a step, by that step, in order."""
    found = {path: re.fullmatch(r"config-until-(\d+)\.json", path.name) for path in folder.glob("config-until-*.json")}
    return dict(sorted((int(match[1]), path) for path, match in found.items() if match))


def settings_files(folder: Path, first: int, last: int) -> list[Path]:
    """The files with the settings of the steps `first` to `last` of the run in `folder`, in order."""
    out, begin = [], 0
    for end, path in {**former_settings(folder), math.inf: folder / SETTINGS}.items():
        if first < end and begin <= last:
            out.append(path)
        begin = end
    return out


def with_settings(config: Config, folder: Path, path: Path) -> tuple[Config, list[str]]:
    """`config` with all that a step of the run in `folder` follows from as the settings at `path` have it, checked.

    Paths stay: what is there is compared (`changes`). Where there is no such file, all stays.

    Returns:
      The configuration, and what has changed, "field: old -> new".

    Raises:
      ConfigError: the file is damaged, or of a run with another kind of model or task.
      DataError, StorageError: it cannot be read.
    """
    kept = _read(path, {"config": dict}, "move it away, and give the settings of the step by flags")
    out, changed = copy.deepcopy(config), []
    if kept:
        _take(out, _with_defaults(kept["config"], config), "", path, changed)
    [first] = settings_files(folder, 0, 0)
    begun = read_provenance(folder, first).settings.get("config", {}).get("checkpoint", {})
    if not isinstance(begun, dict):
        raise ConfigError(f"{first} is damaged: its config.checkpoint = {begun!r:.80} holds no fields; move it away")
    if begun:
        for leaf in ("resume", "weights"):  # the path may be another one now, but not be there where none was
            then = begun.get(leaf) and (getattr(out.checkpoint, leaf) or begun[leaf])
            setattr(out.checkpoint, leaf, then)
        for leaf in ("weights_config", "weights_from", "weights_into", "skip"):
            then = begun.get(leaf, getattr(CheckpointConfig, leaf))
            setattr(out.checkpoint, leaf, tuple(then) if isinstance(then, list) else then)
    try:
        out.validate()
    except ConfigError as error:
        raise ConfigError(f"{path} does not fit this release or this command: {error}") from error
    return out, changed


def _take(holder: Any, kept: Any, prefix: str, path: Path, changed: list[str]) -> None:
    """As `with_settings`, of a dataclass within the configuration."""
    known = [field.name for field in dataclasses.fields(holder)]
    if not isinstance(kept, dict) or kept.keys() - known - {"kind"} or not _same_class(kept, holder):
        raise ConfigError(
            f"config.{prefix.rstrip('.') or 'name'}: is a {type(holder).__name__}, and something else in {path}; name "
            "the configuration that the run was started with"
        )
    if "transforms" in kept and len(kept["transforms"]) != len(holder.transforms):
        raise ConfigError(
            f"config.{prefix}transforms: are {len(holder.transforms)}, and {len(kept['transforms'])} in {path}; name "
            "the configuration that the run was started with"
        )
    for leaf in known:
        name = prefix + leaf
        if name in NOT_OF_A_STEP or name.endswith(PATHS) or leaf not in kept:
            continue
        now, then = getattr(holder, leaf), kept[leaf]
        if dataclasses.is_dataclass(now):
            _take(now, then, f"{name}.", path, changed)
        elif isinstance(now, tuple) and now and dataclasses.is_dataclass(now[0]):
            if isinstance(then, list) and len(then) == len(now):  # else `changes` refuses
                for i, (one, other) in enumerate(zip(now, then, strict=True)):
                    _take(one, other, f"{name}[{i}].", path, changed)
        else:
            then = tuple(then) if isinstance(then, list) else then
            if then != now:
                setattr(holder, leaf, then)
                changed.append(f"{name}: {now} -> {then}")


def changes(old: Provenance, new: Provenance, folder: Path) -> list[str]:
    """The settings that differ from those of the run in `folder`, "field: old -> new".

    Raises:
      ConfigError, DataError: the run would get other samples than it was promised.
    """
    if not old.settings:
        differing = [f"{folder / SETTINGS} was not there: the settings were not compared"]
    else:
        differing = leaf_changes(_with_defaults(old.settings["config"], new.config), new.settings["config"])
        for change in differing:
            name = change.partition(":")[0]
            if re.fullmatch(r"(model|task)(\..*)?\.kind", name):
                raise ConfigError(
                    f"config.{change}: the run in {folder} was trained with another; name the configuration that it "
                    "was started with, or start in another config.workdir"
                )
            if name in FIXED or (name.startswith("data.train") and not name.endswith(PATHS)):
                raise ConfigError(
                    f"config.{name} differs from that of the run in {folder}, and with it the order of the samples; "
                    f"set it back, or {_anew(folder)}"
                )
    try:
        _refuse_other_data(old.data, new, folder)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{folder / DATA} is damaged: {error!r}; {_anew(folder)}") from error
    _refuse_other_order(old.data, new, folder)
    if (then := old.settings.get("jax")) and then != (now := new.settings["jax"]):
        differing.append(f"jax: {then} -> {now} (steps agree up to rounding only)")
    return differing


def _refuse_other_data(old: dict[str, Any], new: Provenance, folder: Path) -> None:
    if not old:
        return
    sources = new.settings["config"]["data"]["train"]
    for i, (config, then, now) in enumerate(zip(sources, old["sources"], new.data["sources"], strict=True)):
        if then != now:
            raise DataError(
                f"config.data.train[{i}] = {config['kind']} {config['path']}: not the data that the run in {folder} "
                f"was trained on: {_difference(then, now)}; restore them, or {_anew(folder)}"
            )
    if old["tokenizer"] != new.data["tokenizer"]:
        raise DataError(
            f"config.task.tokenizer = {new.settings['config']['task']['tokenizer']!r}: not the one that the run in "
            f"{folder} was trained with; restore it, or {_anew(folder)}"
        )


def _refuse_other_order(old: dict[str, Any], new: Provenance, folder: Path) -> None:
    if old.get("order") == new.data["order"] or not (old or new.settings["config"]["data"]["shuffle"]):
        return
    cause = f"Grain {old['grain']} shuffled then, {new.data['grain']} does now" if old else "an older release shuffled"
    raise ConfigError(
        f"the samples of the run in {folder} had another order ({cause}); finish it with the versions that it "
        f"was started with, or {_anew(folder)}"
    )


def _difference(then: dict[str, Any], now: dict[str, Any]) -> str:
    """What differs between two states of a dataset, for people."""
    out = []
    if then["records"] != now["records"]:
        out.append(f"{then['records']:,} records were there, {now['records']:,} are")
    old, new = then["classes"], now["classes"]
    if old != new:
        n = next((n for n, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        names = (repr(classes[n]) if n < len(classes) else "none" for classes in (old, new))
        out.append("class {} was {}, is {}".format(n, *names) + f" (of {len(old):,}, now {len(new):,})")
    old, new = then["parts"], now["parts"]
    if parts := [name for name in {**new, **old} if old.get(name) != new.get(name)]:
        more = f" and {len(parts) - 1:,} more differ" if len(parts) > 1 else ""
        was, is_ = (states.get(parts[0], "not there") for states in (old, new))
        out.append(f"{parts[0]} was {was}, is {is_}{more}")
    return "; ".join(out) or "the order of its parts"


def _read(path: Path, parts: dict[str, type], remedy: str) -> dict[str, Any]:
    """A JSON object with these parts; {}: there is no such file.

    Raises:
      ConfigError: it is none.
      DataError, StorageError: it cannot be read.
    """
    if (content := read_bytes(path)) is None:
        return {}
    try:
        kept = json.loads(content)
        if isinstance(kept, dict) and all(isinstance(kept.get(k), kind) for k, kind in parts.items()):
            return kept
        cause = f"it lacks {', '.join(parts)}"
    except (ValueError, RecursionError) as error:
        cause = one_line(error, most=100)
    raise ConfigError(f"{path} is damaged: {cause}; {remedy}")


def _anew(folder: Path) -> str:
    return f"start in another config.workdir, with its weights by config.checkpoint.weights={str(folder)!r}"


def _with_defaults(kept: Any, holder: Any) -> Any:
    """`kept`, the settings that a release wrote, with the defaults of fields that `holder` has and it did not.

    They are what that release did; a field that was not there must not stand in the way of a run.
    """
    if isinstance(kept, list) and isinstance(holder, tuple) and len(kept) == len(holder):
        return [_with_defaults(value, item) for value, item in zip(kept, holder, strict=True)]
    if not isinstance(kept, dict) or not dataclasses.is_dataclass(holder) or not _same_class(kept, holder):
        return kept
    fields = dataclasses.fields(holder)
    out = {"kind": holder.kind} if isinstance(holder, Choice) else {}
    unread = OF_OTHER_KINDS.difference(f.name for f in fields) if isinstance(holder, SourceConfig | EvalConfig) else ()
    out |= {n: _with_defaults(value, getattr(holder, n, None)) for n, value in kept.items() if n not in unread}
    for field in fields:
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name not in kept and default is not dataclasses.MISSING:
            out[field.name] = json.loads(json.dumps(to_dict(default)))
    return out


def _same_class(kept: dict[str, Any], holder: Any) -> bool:
    """Whether kept settings are of the class of `holder`, where their release kept its name."""
    return not isinstance(holder, Choice) or kept.get("kind", holder.kind) == holder.kind


def leaf_changes(old: Any, new: Any, name: str = "") -> list[str]:
    """Differing leaves of two nested JSON values, "name: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*new, *(k for k in old if k not in new)]
        return [c for k in keys for c in leaf_changes(old.get(k), new.get(k), f"{name}.{k}" if name else k)]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and old and isinstance(old[0], dict):
        return [c for i, (a, b) in enumerate(zip(old, new, strict=True)) for c in leaf_changes(a, b, f"{name}[{i}]")]
    return [] if old == new else [f"{name}: {old} -> {new}"]
