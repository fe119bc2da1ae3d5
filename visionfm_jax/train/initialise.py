"""The start of a run: its own folder, another run, weights from elsewhere, or scratch; the first that there is.

Weights are another run's, or a file's in the names of timm, Hugging Face or OpenCLIP. Either way they become arrays by
our paths; each is taken as it is, resampled (positions, patches), or replaced (a head of other classes). All else that
does not fit is refused, unless `config.checkpoint.skip` lists it, and all of it is printed.
"""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from visionfm_jax.config import CheckpointConfig, Config, OptimConfig, TrainConfig
from visionfm_jax.config.limits import HeightWidth
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import CheckpointError, ConfigError, UserError, count, printable
from visionfm_jax.interop import files
from visionfm_jax.interop.described import Described, describe
from visionfm_jax.interop.leaves import OtherSettings, flatten, grouped, is_named, sides_of, some, unflatten
from visionfm_jax.interop.pretrained import AS_MODEL, State, import_weights, timm_architectures
from visionfm_jax.interop.resample import Way, way
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.parallel.agreement import from_first, require_same
from visionfm_jax.parallel.mesh import REPLICATED
from visionfm_jax.storage import read
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.tasks.features import FeaturesConfig
from visionfm_jax.train.checkpoint import SUBFOLDER, Checkpoints, Restored
from visionfm_jax.train.provenance import leaf_changes, read_provenance
from visionfm_jax.train.state import TrainState
from visionfm_jax.train.step import Trainer

Shapes = Mapping[str, tuple[int, ...]]  # by path, "image/embed/kernel"


class Start(NamedTuple):
    """The start of a run."""

    state: TrainState
    record: dict[str, Any]  # what was saved beside it
    origin: str  # for people
    weights: dict[str, Any] | None = (
        None  # where they came from, for the run folder; None: a state of a run, or scratch
    )


class Fit(NamedTuple):
    """The arrays of a source by what becomes of them, by our paths."""

    taken: list[str]
    resampled: dict[str, Way]
    afresh: dict[str, list[str]]  # why -> arrays that are not from the source
    left: dict[str, list[str]]  # why -> what of the source is not taken

    @property
    def loaded(self) -> int:
        """The number of arrays that come from the source, those that are resampled among them."""
        return len(self.taken) + len(self.resampled)


class Found(NamedTuple):
    """Weights that fit the model, by our paths."""

    arrays: dict[str, Any]  # of a file NumPy's, of a run as the devices store them; what is resampled as it was
    name: str  # of the source
    step: int  # of its run, or 0
    fit: Fit
    source: dict[str, Any]  # for the run folder
    notes: list[str]  # for people

    @property
    def about(self) -> dict[str, Any]:
        """For the run folder."""
        resampled = {path: how.what for path, how in self.fit.resampled.items()}
        return {
            **self.source, "loaded": self.fit.loaded, "resampled": resampled, "newly_initialised": self.fit.afresh,
            "not_loaded": self.fit.left,
        }  # fmt: skip

    @property
    def origin(self) -> str:
        """For people."""
        lines = [f"the weights of {self.name}", *self.notes]
        lines.append(f"{count(self.fit.loaded, 'array')} loaded")
        lines += [f"resampled: {_dots(path)}, {how.what}" for path, how in self.fit.resampled.items()]
        lines += [f"newly initialised: {grouped(map(_dots, paths))} ({why})" for why, paths in self.fit.afresh.items()]
        lines += [f"not loaded: {grouped(names)} ({why})" for why, names in self.fit.left.items()]
        return _below([printable(line) for line in lines])


def starting_state(trainer: Trainer, checkpoints: Checkpoints) -> Start:
    """The first that there is: own run folder, `resume`, `weights`, scratch.

    Raises:
      CheckpointError: it is named or there, but cannot be used.
      ConfigError: `resume` has all its steps, or `weights` do not fit.
    """
    config = trainer.config.checkpoint
    if checkpoints.latest() is not None:
        own = checkpoints.restore(trainer.shapes, trainer.shardings)
        return Start(own.what, own.record, origin_of(own, f"step {own.step} of its own folder"))
    if config.resume:
        with other_run(config, config.resume, "checkpoint.resume") as other:
            found = other.restore(trainer.shapes, trainer.shardings)
        if found.step >= (total := trainer.config.total_steps):
            raise ConfigError(
                f"config.checkpoint.resume = {config.resume!r}: is at step {found.step}, and config.train sets "
                f"{count(total, 'step')}; set more, or evaluate it by visionfm evaluate"
            )
        return Start(found.what, found.record, origin_of(found, f"step {found.step} of {config.resume}"))
    if not config.weights:
        return Start(trainer.init(), {}, f"scratch, seed {trainer.config.seed}")
    found = find_weights(trainer)  # before anything is compiled
    state = trainer.init()
    params = placed(trainer, found, state.params)
    ema = None if state.ema is None else {name: jax.tree.map(jax.numpy.copy, params[name]) for name in state.ema}
    return Start(state.replace(params=params, ema=ema), {}, found.origin, found.about)


def origin_of(found: Restored, name: str) -> str:
    """`name` for people, with what they should know of the checkpoint."""
    return _below([name, *found.notes])


def other_run(config: CheckpointConfig, folder: str, field: str) -> Checkpoints:
    """The checkpoints of the run in `folder`, which `config.FIELD` names.

    Raises:
      ConfigError: there is no such folder.
      CheckpointError: there are none.
    """
    if not _there(Path(folder).exists, f"config.{field}"):
        raise ConfigError(f"config.{field} = {folder!r}: there is no such folder; name that of a run")
    if (other := saved_run(config, folder)) is not None:
        return other
    raise CheckpointError(f"config.{field} = {folder!r}: holds no complete checkpoint; name the folder of another run")


def saved_run(config: CheckpointConfig, folder: str) -> Checkpoints | None:
    """The checkpoints in a run folder, to be read; None: it has none. Process 0 looks for all."""
    if from_first(lambda: _there(Path(folder, SUBFOLDER).is_dir, "the run folder")):
        found = Checkpoints(folder, config, read_only=True)
        if found.latest() is not None:
            return found
        found.close()
    return None


def _there(look: Callable[[], bool], name: str) -> bool:
    """Whether something is there; a name that is too long for the file system, say, is an error of `storage.read`."""
    return read(look, lambda: name)


class ToEvaluate(NamedTuple):
    """Weights to be evaluated."""

    params: Any
    name: str  # the run folder or file that they come from
    step: int
    origin: str  # for people


def weights_to_evaluate(trainer: Trainer) -> ToEvaluate:
    """The newest of the run's own folder; where it has none, those that `config.checkpoint.weights` names.

    Raises:
      ConfigError, CheckpointError: as `other_run`; and weights that leave a part of the model as it was initialised.
    """
    config = trainer.config
    shapes, shardings = trainer.shapes.params, trainer.shardings.params
    own = saved_run(config.checkpoint, config.folder)
    if own is None and config.checkpoint.weights:
        found = find_weights(trainer)
        return ToEvaluate(placed(trainer, found, None), config.checkpoint.weights, found.step, found.origin)
    with own or other_run(config.checkpoint, config.folder, "workdir") as stored:
        restored = stored.restore_weights(shapes, shardings)
    origin = origin_of(restored, f"the weights of step {restored.step} of {config.folder}")
    return ToEvaluate(restored.what, config.folder, restored.step, origin)


def find_weights(trainer: Trainer) -> Found:
    """Those that `config.checkpoint.weights` names, for the model of `trainer`.

    Raises:
      ConfigError: they do not fit, or cannot be read.
      CheckpointError: the run's checkpoint is damaged, or there is none.
    """
    where = trainer.config.checkpoint.weights
    if not _there(Path(where).exists, "config.checkpoint.weights"):
        raise ConfigError(
            f"config.checkpoint.weights = {where!r}: there is no such folder or file; name that of a run, or weights "
            "of timm, Hugging Face or OpenCLIP"
        )
    of_file = from_first(lambda: read(lambda: is_of_others(Path(where)), lambda: where))
    return _of_file(trainer) if of_file else _of_run(trainer)


def is_of_others(where: Path) -> bool:
    """Whether it is a file of weights, or a folder with one, and no run."""
    if not where.is_dir():
        return where.is_file()
    return not (where / SUBFOLDER).is_dir() and any(path.name.endswith(files.SUFFIXES) for path in where.iterdir())


def _of_file(trainer: Trainer) -> Found:
    config = trainer.config.checkpoint
    where = Path(config.weights)
    file = Path(from_first(lambda: str(read(lambda: files.file_in(where, "checkpoint.weights"), lambda: str(where)))))
    about = from_first(lambda: _about(config, file))
    weights = files.read_weights(file)
    require_same(weights.digests, "checkpoint.weights")
    below = f"{config.weights_from.rstrip('.')}." if config.weights_from else ""
    state = {name.removeprefix(below): value for name, value in weights.tensors.items() if name.startswith(below)}
    if not state:
        raise ConfigError(
            f"config.checkpoint.weights_from = {config.weights_from!r}: no name in {file} has this prefix; there are "
            f"{some(sorted({name.partition('.')[0] for name in weights.tensors}))}; set one of them"
        )
    needed, found, problems = settled(trainer.config, file, state, about)
    fit = None
    if found is None or any(path.endswith("embed/kernel") for path in found.arrays):  # of pixels
        said = from_first(lambda: files.normalization(file, about))
        problems += _normalization_problems(trainer.config, said, file)
    as_needed = trainer if needed == trainer.config else _trainer(needed, trainer.mesh)
    if found is not None and as_needed is not None:
        left = {**found.left, **_outside(weights.tensors, below)}
        shapes = {path: value.shape for path, value in found.arrays.items()}
        try:
            fit = match(shapes, _shapes(as_needed.shapes.params), needed, left, str(file), found.grids)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    digests = some([f"{name} {digest[:16]}…" for name, digest in weights.digests.items()], 2)
    notes = [f"{found.what}, {count(len(weights.tensors), 'tensor')}, sha256 {digests}"]
    kept = {"source": str(file), "names": found.what, "sha256": weights.digests}
    return Found(found.arrays, str(file), 0, fit, kept, notes)


def settled(config: Config, file: Path, state: State, about: Mapping[str, Any] | str) -> tuple[Config, Any, list[str]]:
    """The configuration that the weights need, what they are under it (None: nothing known), and all that differs."""
    needed, problems = copy.deepcopy(config), []
    while True:
        try:
            where = config.checkpoint
            return needed, import_weights(state, about, _networks(needed), where.weights_into, where.skip), problems
        except UserError as error:
            if type(error) not in (UserError, OtherSettings):
                raise
            problems.append(f"{file}: {with_fields(str(error), config)}")
            if not (isinstance(error, OtherSettings) and _set(needed, error.fields)):
                return needed, None, problems


def described(where: Path) -> tuple[Config, Described]:
    """The configuration of a model of timm, Hugging Face or OpenCLIP for its use, from the folder alone.

    Raises:
      UserError: it holds no weights, or is of a kind that is not known here.
      DataError, StorageError: it cannot be read.
    """
    file = files.file_in(where, "checkpoint.weights")
    state, about = files.read_weights(file).tensors, files.about(file)
    if about is None:
        raise ConfigError(f"{file}: has no config.json next to it, which says what model it is; get the folder again")
    try:
        said = describe(file, state, about)
    except UserError as error:  # which names fields of a run's configuration, and here is none
        what = re.split(r"; (?:if config\.model is that network, )?set config\.", str(error))[0]
        raise UserError(f"{printable(str(where))}: {what}; name the folder of a model that is known here") from error
    config = untrained(where.name or "model", said)
    config.checkpoint.weights = str(where)
    needed, found, problems = settled(config, file, state, about)
    if found is None:
        raise ConfigError(problems[-1])
    needed.validate_model()
    return needed, said


def untrained(name: str, said: Described) -> Config:
    """The configuration of a model that is used, and not trained."""
    task = FeaturesConfig()
    if isinstance(said.model, ClipConfig):
        task = ContrastiveConfig(loss="sigmoid" if said.sigmoid else "softmax", tokenizer=said.tokenizer)
    elif said.names:
        task = ClassificationConfig(num_classes=len(said.names))
    once = {"optim": OptimConfig(warmup_steps=0), "train": TrainConfig(steps=1, precision="fp32")}
    config = Config(name=name, model=said.model, task=task, **once)
    config.data.augment.mean, config.data.augment.std = said.mean, said.std
    return config


def _set(config: Config, fields: Mapping[str, Any]) -> bool:
    """Set fields of networks by names such as "ViTConfig.pool"; whether any had another value."""
    changed = False
    for network in _networks(config).values():
        for name, value in fields.items():
            kind, _, path = name.partition(".")  # without a field: what no configuration has
            *path, field = path.split(".")
            holder = functools.reduce(lambda part, one: getattr(part, one, None), path, network)
            if kind == type(network).__name__ and getattr(holder, field, value) != value:
                setattr(holder, field, value)
                changed = True
    return changed


def _trainer(config: Config, mesh: Mesh) -> Trainer | None:
    """None: the configuration breaks a rule."""
    try:
        config.validate()
    except ConfigError:
        return None
    return Trainer(config, mesh)


def _normalization_problems(config: Config, said: Mapping[str, tuple[float, ...]], file: Path) -> list[str]:
    """Where pixels would have another scale for the weights than they were trained on."""
    ours = {name: getattr(config.data.augment, name) for name in said}
    if all(np.allclose(ours[name], wanted, rtol=0, atol=1e-3) for name, wanted in said.items()):
        return []
    given = ", ".join(f"config.data.augment.{name} = {value}" for name, value in ours.items())
    remedy = " and ".join(f"config.data.augment.{name}={value}" for name, value in said.items())
    return [f"{given}: {file} was trained with {' and '.join(map(str, said.values()))}; set {remedy}"]


def _about(config: CheckpointConfig, file: Path) -> dict[str, Any] | str:
    """What `import_weights` asks for beside the names."""
    given = config.weights_config
    if given == AS_MODEL or given in timm_architectures():
        return given
    if given:
        if not _there(Path(given).is_file, "config.checkpoint.weights_config"):
            raise ConfigError(
                f"config.checkpoint.weights_config = {given!r}: is neither a file nor a timm architecture known here; "
                f'name the config.json of the weights, or set "{AS_MODEL}" if config.model is their network'
            )
        return files.read_json(Path(given))
    if (found := files.about(file)) is not None:
        return found
    raise ConfigError(
        f"{file}: has no config.json next to it, and names do not determine heads, pooling, activation and the epsilon "
        "of norms; set config.checkpoint.weights_config to that file, to the timm architecture, or, if config.model is "
        f'the network that was trained, to "{AS_MODEL}"'
    )


def _of_run(trainer: Trainer) -> Found:
    config = trainer.config.checkpoint
    here, fits = _shapes(trainer.shapes.params), []
    shardings = flatten(trainer.shardings.params)
    whole = NamedSharding(trainer.mesh, REPLICATED)
    below = f"{config.weights_from.strip('./').replace('.', '/')}/" if config.weights_from else ""
    into = f"{config.weights_into}/" if config.weights_into else ""
    settings = from_first(lambda: read_provenance(Path(config.weights)).settings)
    before, now = settings.get("config", {}).get("model"), json.loads(json.dumps(to_dict(trainer.config)["model"]))
    grids = {
        into + path.removeprefix(below): grid for path, grid in table_grids(before).items() if path.startswith(below)
    }

    def choose(step: int, stored: Any) -> Any:
        there = {path: tuple(leaf.shape) for path, leaf in flatten(stored).items()}
        source = {into + path.removeprefix(below): shape for path, shape in there.items() if path.startswith(below)}
        fit = match(source, here, trainer.config, _outside(there, below), f"{config.weights}, step {step}", grids)
        fits.append(fit)
        wanted = {path: whole if path in fit.resampled else shardings[path] for path in (*fit.taken, *fit.resampled)}
        return unflatten(
            {
                below + path.removeprefix(into): jax.ShapeDtypeStruct(source[path], np.float32, sharding=to)
                for path, to in wanted.items()
            }
        )

    with other_run(config, config.weights, "checkpoint.weights") as other:
        found = other.restore_chosen_weights(choose)
    arrays = {into + path.removeprefix(below): value for path, value in flatten(found.what).items()}
    other_there = [f"other there: {change}" for change in leaf_changes(before, now, "model")] if before else []
    kept = {"source": config.weights, "step": found.step}
    return Found(arrays, config.weights, found.step, fits[-1], kept, [*found.notes, *other_there])


def match(
    there: Shapes,
    here: Shapes,
    config: Config,
    left: Mapping[str, list[str]],
    source: str,
    grids: Mapping[str, HeightWidth] = MappingProxyType({}),
) -> Fit:
    """What of a source goes where in the model.

    Args:
      there: the source's arrays, by the paths that they would have here.
      here: the model's.
      config: of the run.
      left: why -> what of the source is not in `there`.
      source: for errors.
      grids: patches (h, w) of the images that its position tables are for, by their paths here, where they are known.

    Raises:
      ConfigError: what does not fit, all of it in one line.
    """
    networks, into, skip = _networks(config), config.checkpoint.weights_into, config.checkpoint.skip
    fit, problems, sizes = Fit([], {}, {}, {why: [*names] for why, names in left.items()}), {}, []
    other_heads = {_holder(path) for path, shape in here.items() if _is_head(path) and there.get(path) != shape}

    def skipped(path: str) -> bool:
        return is_named(path, skip) or is_named(path.removeprefix(f"{into}/"), skip)

    for path, shape in here.items():
        if into and not path.startswith(f"{into}/") and path not in there:
            fit.afresh.setdefault("not of checkpoint.weights_into", []).append(path)
        elif skipped(path):
            fit.afresh.setdefault("listed in checkpoint.skip", []).append(path)
        elif path in there and (how := _way(path, there[path], shape, networks, grids.get(path))):
            fit.resampled[path] = how
        elif _is_head(path) and _holder(path) in other_heads:  # whole or not at all
            classes = f"{there[path][-1]} classes" if path in there else "none"
            same = path in there and there[path][-1] == shape[-1]
            why = "the head there is of other features" if same else f"{classes} there, {shape[-1]} here"
            fit.afresh.setdefault(why, []).append(path)
        elif there.get(path) == shape:
            fit.taken.append(path)
        elif path in there:
            problems.setdefault("other shapes", []).append(_dots(path))
            sizes.append(f"{_dots(path)} {there[path]} there, {shape} here")
        else:
            problems.setdefault("only here", []).append(_dots(path))
    for path in there:
        if skipped(path):
            fit.left.setdefault("listed in checkpoint.skip", []).append(_dots(path))
        elif path not in here and _is_head(path):
            fit.left.setdefault("the model has no head", []).append(_dots(path))
        elif path not in here:
            problems.setdefault("only there", []).append(_dots(path))
    if problems or not (fit.taken or fit.resampled):
        listed = {why: grouped(names) for why, names in problems.items()}
        if sizes:
            few = len(sizes) <= 8
            listed["other shapes"] = ", ".join(sizes) if few else f"{listed['other shapes']}, such as {sizes[0]}"
        what = "; ".join(f"{why}: {names}" for why, names in listed.items()) or "nothing is loaded"
        raise ConfigError(
            f"config.checkpoint.weights = {source}: do not fit the model: {what}; set the fields of config.model or "
            "config.checkpoint.weights_into, or list in config.checkpoint.skip what should not be loaded"
        )
    return fit


def _way(
    path: str,
    there: tuple[int, ...],
    here: tuple[int, ...],
    networks: Mapping[str, Any],
    grid: HeightWidth | None,
) -> Way | None:
    part = max((p for p in networks if not p or path.startswith(f"{p}/")), key=len, default=None)
    return None if part is None else way(path.removeprefix(f"{part}/"), there, here, networks[part], grid)


def table_grids(model: Any, path: str = "") -> dict[str, HeightWidth]:
    """Patches (h, w) that the position tables of a run are for, by their paths, of its kept `config.model`."""
    if not isinstance(model, dict):
        return {}
    out = {k: v for name, part in model.items() for k, v in table_grids(part, f"{path}{name}/").items()}
    sizes, patch = [sides_of(model.get(field)) for field in ("pos_image_size", "image_size")], model.get("patch_size")
    size = next((size for size in sizes if size and all(size)), None)
    if size and isinstance(patch, int) and patch > 0:
        out[f"{path}pos_embed"] = size[0] // patch, size[1] // patch
    return out


def _is_head(path: str) -> bool:
    """Whether an array is of a classifier, a layer: it has a number for each class."""
    return path.rpartition("/")[2] in ("kernel", "bias") and _holder(path).rpartition("/")[2] == "head"


def _holder(path: str) -> str:
    return path.rpartition("/")[0]


def placed(trainer: Trainer, found: Found, fresh: Any | None) -> Any:
    """The parameters, stored as ZeRO has them: each device gets its part, none the whole.

    Args:
      trainer: of the model.
      found: for it.
      fresh: parameters for what `found` does not have; None: it must have all.

    Raises:
      ConfigError: it does not.
    """
    fit = found.fit
    if fresh is None and fit.afresh:
        untrained = [_dots(path) for paths in fit.afresh.values() for path in paths]
        raise ConfigError(
            f"config.checkpoint.weights = {trainer.config.checkpoint.weights!r}: leave {grouped(untrained)} untrained, "
            "which an evaluation would measure; train first"
        )
    params = {} if fresh is None else flatten(fresh)
    shardings = flatten(trainer.shardings.params)
    for path in (*fit.taken, *fit.resampled):
        value = found.arrays[path]
        if path in fit.resampled:
            value = fit.resampled[path].apply(np.asarray(value))
        params[path] = value if isinstance(value, jax.Array) else _sharded(value, shardings[path])
    return unflatten({path: params[path] for path in _shapes(trainer.shapes.params)})


def _sharded(value: np.ndarray, sharding: NamedSharding) -> jax.Array:
    value = np.asarray(value, np.float32)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: np.asarray(value[index]))


def _networks(config: Config) -> dict[str, Any]:
    """The configurations of the model, "", and of its networks, by their paths in its parameters."""
    networks = {"model": config.model, **config.model.networks()}
    return {name.removeprefix("model").lstrip(".").replace(".", "/"): network for name, network in networks.items()}


def with_fields(text: str, config: Config) -> str:
    """An error of an importer, which names "ViTConfig.heads", with the fields of this configuration."""
    for name, network in {"model": config.model, **config.model.networks()}.items():
        text = re.sub(rf"\b{type(network).__name__}\.", f"config.{name}.", text)
    return text


def _outside(names: Mapping[str, Any], below: str) -> dict[str, list[str]]:
    outside = [name for name in names if not name.startswith(below)]
    return {"not of checkpoint.weights_from": outside} if outside else {}


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten(params).items()}


def _dots(path: str) -> str:
    return path.replace("/", ".")


def _below(lines: list[str]) -> str:
    return "\n                   ".join(lines)
