"""Rules between the fields of a configuration; those of a field by itself are in `limits`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from visionfm_jax.config.limits import STEPS, Problem, field_problems
from visionfm_jax.errors import ConfigError, count

if TYPE_CHECKING:  # which checks itself by these rules
    from visionfm_jax.config.schema import Config


def check(found: Sequence[Problem]) -> None:
    """Nothing if nothing was found.

    Raises:
      ConfigError: all that was found, one a line: field, value, rule, remedy.
    """
    if found:
        raise ConfigError(
            "\n".join(f"config.{name} = {shown(value)}: {rule}; {how}" for name, value, rule, how in found)
        )


def shown(value: object) -> str:
    """`value` as Python writes it, its beginning if that is long."""
    try:
        text = repr(value)
    except Exception as error:  # an int of thousands of digits, or a class of the user's
        return f"({type(value).__name__}, which cannot be written: {type(error).__name__})"
    return text if len(text) <= 120 else f"{text[:60]} … ({len(text):,} characters)"


def problems(c: Config) -> list[Problem]:
    """All broken rules of a configuration. Rules between fields of which one is broken by itself are left out."""
    out = list(field_problems(c))
    broken = [name for name, *_ in out]
    for rule, *reads in BETWEEN:
        if not any(a.startswith(b) or b.startswith(a) for a in broken for b in reads):
            out += rule(c)
    return out


def _optim_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if c.optim.final_lr > c.optim.lr:
        out.append(("optim.final_lr", c.optim.final_lr, f"must not exceed optim.lr = {c.optim.lr:g}", "lower it"))
    return out


def _accumulate_problems(c: Config) -> list[Problem]:
    if not c.train.batch_size % c.train.accumulate:
        return []
    near = max(1, round(c.train.batch_size / c.train.accumulate)) * c.train.accumulate
    rule = f"must be a multiple of train.accumulate = {c.train.accumulate}"
    return [("train.batch_size", c.train.batch_size, rule, f"the nearest is {near}")]


def _profile_problems(c: Config) -> list[Problem]:
    first, last = steps = c.telemetry.profile_steps
    rule = "needs first <= last, and few steps: a trace has every operation of each"
    return [] if first <= last < first + 1000 else [("telemetry.profile_steps", steps, rule, f"set {first, first + 4}")]


def _checkpoint_problems(c: Config) -> list[Problem]:
    out: list[Problem] = []
    if c.checkpoint.resume and c.checkpoint.weights:
        rule = "excludes checkpoint.weights"
        out.append(("checkpoint.resume", c.checkpoint.resume, rule, "empty one: resume continues a whole run"))
    of_weights = ("weights_config", "weights_from", "weights_into", "skip")
    if not c.checkpoint.weights:
        for leaf in of_weights:
            if value := getattr(c.checkpoint, leaf):
                remedy = f"name the weights, or set it to {type(value)()!r} to start without"
                out.append((f"checkpoint.{leaf}", value, "has no effect without checkpoint.weights", remedy))
    if c.checkpoint.keep_best and not c.checkpoint.best_metric:
        out.append(("checkpoint.best_metric", "", "is needed by checkpoint.keep_best", 'set e.g. "val/top1"'))
    return out


def _model_problems(c: Config) -> list[Problem]:
    """Of the model, the task, and whether they fit."""
    if not isinstance(c.model, c.task.model_class):
        rule, fits = f"cannot be trained by task = {type(c.task).__name__}", c.task.model_class.__name__
        return [("model", type(c.model).__name__, rule, f"set model to a {fits}")]
    out = c.model.problems("model")
    for name, network in c.model.networks().items():
        if network.attention == "cudnn" and c.train.precision == "fp32":
            rule = "needs train.precision = bf16 or fp16, as cuDNN has no attention in fp32"
            out.append((f"{name}.attention", "cudnn", rule, "set it to xla, or train.precision to bf16"))
        policy, _, blocks = network.remat.partition(":")
        if blocks and int(blocks) > network.blocks > 0:
            rule = f"must have at most as many blocks as the network, {network.blocks}"
            out.append((f"{name}.remat", network.remat, rule, f"set it to {policy} for all of them"))
        if network.mlp_matmuls == "fp8" and c.train.precision == "fp32":
            rule = "needs train.precision = bf16 or fp16, whose products it makes with 8-bit operands"
            out.append((f"{name}.mlp_matmuls", "fp8", rule, "set it to compute, or train.precision to bf16"))
    return out + c.task.problems(c)


def _transform_problems(c: Config) -> list[Problem]:
    named = {f"data.transforms[{i}]": t for i, t in enumerate(c.data.transforms)}
    named |= {f"evals[{i}].preprocess": e.preprocess for i, e in enumerate(c.evals)}
    return [problem for name, transform in named.items() for problem in transform.problems(name)]


def _length_problems(c: Config) -> list[Problem]:
    if bool(c.train.steps) == bool(c.train.epochs):
        rule = "exactly one of train.steps and train.epochs is set"
        return [("train.steps", c.train.steps, rule, "set the other to 0")]
    if c.train.epochs and c.data.num_examples < 1:
        rule = f"is needed by train.epochs = {c.train.epochs:g}"
        remedy = "set the number of training images, or train.steps"
        return [("data.num_examples", c.data.num_examples, rule, remedy)]
    if c.total_steps < 1:
        rule = f"gives less than one step of train.batch_size = {c.train.batch_size}, as data.num_examples = "
        return [("train.epochs", c.train.epochs, f"{rule}{c.data.num_examples}", "raise it, or set train.steps")]
    if c.total_steps > STEPS.high:
        rule = f"gives {c.total_steps} steps, more than {STEPS.high} ({STEPS.why})"
        return [("train.epochs", c.train.epochs, rule, "lower it, or raise train.batch_size")]
    if c.optim.warmup_steps >= c.total_steps:
        length = "train.steps" if c.train.steps else "train.epochs x data.num_examples / train.batch_size"
        rule = f"must be below the run's {count(c.total_steps, 'step')} ({length})"
        return [("optim.warmup_steps", c.optim.warmup_steps, rule, f"set {c.total_steps // 20}")]
    return []


def _source_problems(c: Config) -> list[Problem]:
    return [] if c.data.train else [("data.train", (), "needs at least one source", "add one of data.sources.kinds")]


def _eval_problems(c: Config) -> list[Problem]:
    names = [e.name for e in c.evals]
    twice = sorted({n for n in names if names.count(n) > 1})
    out: list[Problem] = [("evals[].name", name, "must be unique", "rename one") for name in twice]
    there = ", ".join(sorted(c.task.predictions))
    for i, e in enumerate(c.evals):
        if e.measures not in c.task.predictions:
            rule = f"measures the {e.measures} of a task, and {type(c.task).__name__} predicts {there}"
            out.append((f"evals[{i}]", e.kind, rule, "set another eval, or remove it"))
        if e.image_size:
            field = f"evals[{i}].image_size"
            out += c.model.size_problems(field, e.image_size)
            out += c.task.size_problems(c, field, e.image_size) if isinstance(c.model, c.task.model_class) else []
    return out


# A rule between fields, and the beginnings of the names of those that it reads.
BETWEEN: tuple[tuple[Any, ...], ...] = (
    (_model_problems, "model", "task", "train.precision"),
    (_accumulate_problems, "train.batch_size", "train.accumulate"),
    (_length_problems, "train.steps", "train.epochs", "train.batch_size", "data.num_examples", "optim.warmup_steps"),
    (_optim_problems, "optim.lr", "optim.final_lr"),
    (_profile_problems, "telemetry.profile_steps"),
    (_transform_problems, "data.transforms", "evals"),
    (_source_problems, "data.train"),
    (_checkpoint_problems, "checkpoint"),
    (_eval_problems, "evals", "task", "model"),
)


def card_problems(c: Config, kind: str, capability: str) -> list[Problem]:
    """Rules of training on one kind of card, of a CUDA compute capability such as "9.0"; "": it has none."""
    networks = c.model.networks().items()
    major, _, minor = capability.partition(".")
    if not major.isdigit():
        rule = f"needs a GPU of NVIDIA, and the step runs on {kind}"
        cudnn = [name for name, network in networks if network.attention == "cudnn"]
        return [(f"{name}.attention", "cudnn", rule, "set it to auto or xla") for name in cudnn]
    if (int(major), int(minor)) >= (8, 9):
        return []
    rule = f"needs a card with FP8 units, of compute capability 8.9 or later, and {kind} has {capability}"
    fp8 = [name for name, network in networks if network.mlp_matmuls == "fp8"]
    return [(f"{name}.mlp_matmuls", "fp8", rule, "set it to compute") for name in fp8]


def device_problems(c: Config, devices: int, hosts: int) -> list[Problem]:
    """Rules that tie the batch and the mesh to `devices`, all hosts', and `hosts`."""
    out: list[Problem] = []
    if devices % c.parallel.replicas:
        fits = [r for r in range(1, devices + 1) if devices % r == 0]
        near = min(fits, key=lambda r: abs(r - c.parallel.replicas))
        out.append(
            ("parallel.replicas", c.parallel.replicas, f"must divide the {devices} devices", f"the nearest is {near}")
        )
    if c.parallel.stage and c.parallel.replicas == devices > 1:
        rule = f"leaves one device per replica, so that parallel.stage = {c.parallel.stage} cannot shard"
        out.append(("parallel.replicas", c.parallel.replicas, rule, "set parallel.stage to 0, or fewer replicas"))
    batches = [
        (
            "train.batch_size",
            c.train.batch_size,
            devices * c.train.accumulate,
            f"{devices} devices x {c.train.accumulate} micro-batches",
        )
    ]
    batches += [
        (f"evals[{i}].batch_size", e.batch_size or c.train.batch_size, devices, f"{devices} devices")
        for i, e in enumerate(c.evals)
    ]
    rows, why = c.task.rows
    name, size, unit, what = batches[0]
    batches[0] = (name, size, unit * rows, what + why)
    for name, size, unit, what in batches:
        if size % unit:
            near = max(1, round(size / unit)) * unit
            out.append((name, size, f"must be a multiple of {unit} ({what})", f"the nearest is {near}"))
    if devices % hosts:
        out.append(
            (
                "parallel",
                c.parallel,
                f"{devices} devices must spread evenly over {hosts} hosts",
                "start the same number on every host",
            )
        )
    return out
