"""What a run folder says of its run; whatever is missing or damaged is left out, and named."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import glob
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from visionfm_jax.config.saved import of_run
from visionfm_jax.config.schema import to_dict
from visionfm_jax.errors import ConfigError, UserError, one_line, printable
from visionfm_jax.parallel.targets import design_power
from visionfm_jax.storage import read_bytes, unseal
from visionfm_jax.telemetry.writers import EVALUATIONS, FILE, read_metrics
from visionfm_jax.train.checkpoint import SCORES, SUBFOLDER
from visionfm_jax.train.folder import WEIGHTS, refuse_links
from visionfm_jax.train.initialise import is_of_others
from visionfm_jax.train.provenance import DATA, SETTINGS, former_settings, leaf_changes
from visionfm_jax.train.sessions import read_sessions
from visionfm_jax.train.spikes import OVERFLOW, SPIKE
from visionfm_jax.train.spikes import SUBFOLDER as SPIKES

PLAN = "plan.json"  # what `visionfm plan --json=RUN/plan.json` has written
CORE = "CPU core"  # whose hours are counted where there are no GPUs
LARGEST = 2**24  # bytes of a file that is read, metrics and checkpoints apart
DAMAGED = re.compile(r"damaged(\.process-\d{1,9})?\.jsonl")
_SPIKE = re.compile(r"(step|overflow)-(\d{1,15})\.jsonl")
_T = TypeVar("_T")


@dataclasses.dataclass
class Setting:
    """A field of the configuration; `default` is None where it has none."""

    name: str
    value: str
    default: str | None

    @property
    def chosen(self) -> bool:
        """Whether it differs from the default."""
        return self.value != self.default


@dataclasses.dataclass
class Measured:
    """What an eval has found in one measurement."""

    step: int
    protocol: str  # by which it measured; empty: not kept
    metrics: dict[str, float]  # by name, "digits/top1"


@dataclasses.dataclass
class Spike:
    """A step, counted from 0, of which the run has kept a file."""

    step: int
    kind: str  # of `train.spikes`
    path: Path
    head: dict[str, Any]  # its first line

    @property
    def norm(self) -> float:
        """Of the gradient."""
        return _float(self.head.get("grad_norm"))

    @property
    def usual(self) -> float:
        """The norm that was usual then; NaN: not kept."""
        return _float(self.head.get("usual_grad_norm"))

    @property
    def tensor(self) -> str:
        """The first whose gradient is not finite, else that with the largest."""
        norms = {str(k): _float(v) for k, v in _dict(self.head.get("gradient_norms")).items()}
        return max(norms, key=lambda k: math.inf if not math.isfinite(norms[k]) else norms[k], default="")


class Facts:
    """Of the run in `folder`; each fact is read when it is asked for.

    Attributes:
      folder: the run's.
      damaged: what could not be read, for people.

    Raises:
      ConfigError: no run is there.
      UserError: something in the folder is a link, or no file.
    """

    def __init__(self, folder: Path):
        if not is_run(folder):
            there = f"it has no {SETTINGS} and no {FILE}" if folder.is_dir() else "there is no such folder"
            raise ConfigError(f"{printable(str(folder))}: {there}; name the folder of a run, such as runs/quickstart")
        refuse_links(folder)
        self.folder, self.damaged = folder, []

    @functools.cached_property
    def rows(self) -> list[dict[str, float]]:
        """The lines of metrics, by step."""
        rows = self._try(FILE, lambda: read_metrics(self.folder), [])
        rows = [{k: _float(v) for k, v in row.items()} for row in rows if 0 <= row["step"] < 10**15]
        return sorted(rows, key=lambda row: row["step"])

    @functools.cached_property
    def settings(self) -> dict[str, Any]:
        """`config.json`: the configuration, derived quantities, the version of jax."""
        return self._json(self.folder / SETTINGS)

    @property
    def config(self) -> dict[str, Any]:
        """The configuration as it was kept."""
        return _dict(self.settings.get("config"))

    @functools.cached_property
    def name(self) -> str:
        """The run's, else that of its folder."""
        return str(self.config.get("name") or self.folder.absolute().name)

    @functools.cached_property
    def chosen(self) -> list[Setting]:
        """Every field of the configuration, with its default where its class is known to this version."""
        try:
            defaults = dict(_defaults(of_run(self.folder)))
        except (UserError, OSError, RecursionError):  # of another version, or of classes that are not there
            defaults = None
        shown = flat(self.config)
        return [Setting(k, shown[k], None if defaults is None else defaults.get(k)) for k in shown]

    @functools.cached_property
    def changed(self) -> list[tuple[int, str]]:
        """What was changed on the way: the step, and "field: old -> new"."""
        former = self._try("config-until-N.json", lambda: former_settings(self.folder), {})
        stages = [(step, _dict(self._json(path).get("config"))) for step, path in former.items()]
        stages.append((0, self.config))
        return [
            (step, change)
            for (step, old), (_, new) in itertools.pairwise(stages)
            if old and new
            for change in leaf_changes(old, new)
        ]

    @functools.cached_property
    def steps(self) -> int:
        """Steps done, by metrics and checkpoints."""
        return int(max([row["step"] for row in self.rows if "loss" in row] + self.checkpoints[:1], default=0))

    @functools.cached_property
    def total(self) -> int:
        """Steps of the whole run; 0: not known."""
        return _whole(_dict(self.settings.get("derived")).get("total_steps"))

    @functools.cached_property
    def sessions(self) -> list[dict[str, Any]]:
        """As `read_sessions`."""
        return self._try("sessions.jsonl", lambda: read_sessions(self.folder), [])

    @property
    def state(self) -> str:
        """How far the run is, in words."""
        of = f"step {self.steps:,}" + (f" of {self.total:,}" if self.total else "")
        state = self.sessions[-1]["state"] if self.sessions else None
        if state == "finished" or (state is None and self.total and self.steps >= self.total):
            return f"finished, {of}"
        if state is None:
            return f"not finished: {of}"
        if not state:
            seen = self.sessions[-1]["seen"]
            return f"running, or killed: {of}" + (f"; last seen {utc(seen)} UTC" if seen else "")
        return f"stopped at {of}" + ("" if state == "stopped" else f": {state}")

    @functools.cached_property
    def checkpoints(self) -> list[int]:
        """The steps of what looks like complete checkpoints, newest first."""
        folder = self.folder / SUBFOLDER
        names = self._try(SUBFOLDER, lambda: [p.name for p in folder.iterdir()] if folder.is_dir() else [], [])
        return sorted((int(name) for name in names if re.fullmatch(r"\d{1,15}", name)), reverse=True)

    @functools.cached_property
    def samples(self) -> tuple[int, int, int] | None:
        """The step of the newest checkpoint, samples seen until then, and how many of them were damaged."""
        for step in self.checkpoints[:1]:
            kept = self._json(self.folder / SUBFOLDER / str(step) / "_CHECKPOINT_METADATA")
            try:
                counts = json.loads(kept["custom_metadata"]["record"])["samples"]
                return step, sum(_whole(seen) for seen, _ in counts), sum(_whole(damaged) for _, damaged in counts)
            except (KeyError, TypeError, ValueError, RecursionError):
                return None
        return None

    @functools.cached_property
    def damaged_records(self) -> dict[str, list[str]]:
        """The names of the damaged records that the run has met, by source."""
        found: dict[str, dict[str, None]] = {}
        for path in sorted(path for path in self.folder.iterdir() if DAMAGED.fullmatch(path.name)):
            for row in map(_dict, map(_parsed, self._text(path).splitlines())):
                if "source" in row:
                    found.setdefault(str(row["source"]), {})[_shown(row.get("key"))] = None
        return {source: list(keys) for source, keys in found.items()}

    @functools.cached_property
    def captions(self) -> tuple[int, int]:
        """Captions that the first process has read, and those of them that were cut, in sessions that have ended."""
        return tuple(sum(_whole(s.get(key)) for s in self.sessions) for key in ("captions", "truncated"))

    @functools.cached_property
    def evals(self) -> dict[str, dict[str, Any]]:
        """The details of each eval, newest protocol, by name; {} of one that leaves none."""
        names = {key.partition("/")[0]: {} for row in self.rows if "loss" not in row for key in row if "/" in key}
        found = {p.stem.removeprefix("eval_"): p for p in sorted(self.folder.glob("eval_*.json"))}
        kept = {name: self._json(path) for name, path in found.items() if "." not in name}
        return {name: kept.get(name, {}) for name in {**names, **kept}}

    @functools.cached_property
    def measured(self) -> dict[str, Measured]:
        """The newest measurement of each eval; that of training, where another was made after the same step."""
        found = {}
        for name, details in self.evals.items():
            trained, apart = self._in_training(name), _measured(name, details)
            newest = [m for m in (apart, trained) if m.metrics]
            found[name] = max(reversed(newest), key=lambda m: m.step, default=Measured(0, "", {}))
        return found

    def _in_training(self, name: str) -> Measured:
        """The newest one; without metrics where there is none."""
        prefix = f"{name}/"
        for row in reversed(self.rows):
            metrics = {k: v for k, v in row.items() if k.startswith(prefix)}
            if "loss" in row or not metrics:
                continue
            step = int(row["step"])
            scores = self._json(self.folder / SUBFOLDER / str(step) / SCORES)
            protocol = str(_dict(scores.get("protocols")).get(name) or "")
            if not protocol:  # its checkpoint is gone, but perhaps not its details
                paths = self.folder.glob(f"eval_{glob.escape(name)}.*json")  # also eval_NAME.PROTOCOL.json
                kept = (_measured(name, self._json(path)) for path in sorted(paths))
                same = (m for m in kept if m.step == step and repr(m.metrics) == repr(metrics))
                protocol = next((m.protocol for m in same), "")
            return Measured(step, protocol, metrics)
        return Measured(0, "", {})

    @functools.cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """What evaluations apart from training have found, oldest first."""
        found = []
        for line in self._text(self.folder / EVALUATIONS).splitlines():
            try:
                found.append(unseal(line))
            except ValueError:
                self.damaged.append(f"{EVALUATIONS}: a line")
        return found

    @functools.cached_property
    def spikes(self) -> list[Spike]:
        """The steps of which the run has kept a file, in order."""
        folder = self.folder / SPIKES
        names = self._try(SPIKES, lambda: [p.name for p in folder.iterdir()] if folder.is_dir() else [], [])
        found = []
        for match in filter(None, map(_SPIKE.fullmatch, names)):
            head = _dict(_parsed(self._text(folder / match[0]).partition("\n")[0]))
            kind = OVERFLOW if match[1] == "overflow" else str(head.get("kind") or SPIKE)
            found.append(Spike(int(match[2]), kind, folder / match[0], head))
        return sorted(found, key=lambda spike: spike.step)

    def samples_of(self, spike: Spike) -> list[str]:
        """Those of a kept step that are not finite, else the three with the largest losses."""
        files = sorted(spike.path.parent.glob(f"{spike.path.stem}*.jsonl"))  # one of each process
        lines = (line for path in files for line in self._text(path).splitlines()[1:])
        rows = [{**row, "loss": _float(row.get("loss"))} for row in map(_dict, map(_parsed, lines)) if "sample" in row]
        bad = [row for row in rows if not math.isfinite(row["loss"])]
        worst = bad or sorted(rows, key=lambda row: -row["loss"])[:3]
        return [f"{row['sample']} = {_shown(row.get('key'))}" for row in worst]

    def skips(self) -> list[tuple[int, int]]:
        """Steps without an update of which no file tells: until which step they were, and how many."""
        kept = [spike.step + 1 for spike in self.spikes if spike.kind != SPIKE]
        lines = [(row["step"], row["skipped_steps"]) for row in self.rows if "skipped_steps" in row]
        found = [
            (int(now), int(after - before) - sum(then < step <= now for step in kept))
            for (then, before), (now, after) in itertools.pairwise([(0, 0), *lines])
            if math.isfinite(after - before)
        ]
        return [(step, left) for step, left in found if left > 0]

    @functools.cached_property
    def weights(self) -> dict[str, Any]:
        """Where the weights came from that the run began with."""
        return self._json(self.folder / WEIGHTS)

    @functools.cached_property
    def data(self) -> dict[str, Any]:
        """What the training data are made of."""
        return self._json(self.folder / DATA)

    @functools.cached_property
    def plan(self) -> dict[str, Any]:
        """The plan that somebody has put there."""
        return self._json(self.folder / PLAN)

    @functools.cached_property
    def hours(self) -> float:
        """Of training steps alone, by their throughput; without evaluation, compilation but for the first step's.

        Steps of another folder, from which the run was continued in this one, do not count.
        """
        firsts = [_float(s.get("first")) for s in self.sessions]
        before = [first for first in firsts if self.rows and first < self.rows[0]["step"]]
        return self._hours_of_steps(max(before, default=0), math.inf)

    def session_hours(self) -> list[float]:
        """Of each session by the clock; of one without an end until its last sign of life, or by its steps' speed."""
        firsts = [_float(s.get("first")) for s in self.sessions]
        ends = [*firsts[1:], math.inf][: len(firsts)]
        hours = []
        for session, first, end in zip(self.sessions, firsts, ends, strict=True):
            last = session["ended"] or session["seen"]
            by_steps = 0.0 if session["ended"] else self._hours_of_steps(first, end)
            hours.append(max((last - session["began"]) / 3600 if last else 0.0, by_steps))
        return hours

    @property
    def unended(self) -> int:
        """Sessions of which no end is kept: their hours are those that are known of, and may be more."""
        return sum(s["ended"] is None for s in self.sessions)

    def _hours_of_steps(self, first: float, end: float) -> float:
        batch, hours, before = _float(_dict(self.config.get("train")).get("batch_size")), 0.0, first
        for row in self.rows:
            speed = row.get("images_per_s", math.nan)
            if first < row["step"] <= end and speed > 0 and batch > 0:
                hours += (row["step"] - before) * batch / speed / 3600
                before = row["step"]
        return hours

    def device_hours(self) -> tuple[float, str] | None:
        """Of all sessions, and of what: a kind of device, or CPU cores; None: not known."""
        kinds = {str(s.get("device")) for s in self.sessions}
        if len(kinds) != 1:
            return None
        on_cpu = self.sessions[0].get("platform") == "cpu"
        if on_cpu and any(s.get("processes") != 1 for s in self.sessions):
            return None  # how many of them share a machine is not known
        counts = [_whole(s.get("cores" if on_cpu else "devices")) for s in self.sessions]
        hours = sum(n * h for n, h in zip(counts, self.session_hours(), strict=True))
        return hours, CORE if on_cpu else kinds.pop()

    def energy(self) -> tuple[float, float] | None:
        """Kilowatt-hours of the devices at their design power, and that in watts; None: it is not known."""
        found = self.device_hours()
        watts = found and design_power(found[1])
        return (found[0] * watts / 1000, watts) if watts else None

    def pictures(self) -> list[Path]:
        """The pictures in the folder, but for the learning curves, which are drawn anew."""
        return [path for path in sorted(self.folder.glob("*.png")) if path.stem != "learning_curves"]

    def read(self, path: Path) -> bytes:
        """A file of the folder; empty where it is missing, too large or cannot be read."""
        try:
            if path.is_file() and path.stat().st_size > LARGEST:
                raise ValueError(f"larger than {LARGEST >> 20} MiB")
            return read_bytes(path) or b""
        except (UserError, OSError, ValueError) as error:
            self.damaged.append(f"{path.name}: {one_line(error)}")
            return b""

    def _text(self, path: Path) -> str:
        return self.read(path).decode("utf-8", errors="replace")

    def _json(self, path: Path) -> dict[str, Any]:
        content = self._text(path)
        value = _parsed(content)
        if content and not isinstance(value, dict):
            self.damaged.append(f"{path.name}: it is no whole JSON object")
        return _dict(value)

    def _try(self, name: str, act: Callable[[], _T], otherwise: _T) -> _T:
        try:
            return act()
        except (UserError, OSError) as error:
            self.damaged.append(f"{name}: {one_line(error)}")
            return otherwise


def is_run(folder: Path) -> bool:
    """Whether a run has been there."""
    return (
        folder.is_dir() and any((folder / n).exists() for n in (SETTINGS, FILE, SUBFOLDER)) and not is_of_others(folder)
    )


def utc(seconds: float) -> str:
    """Since 1970, as a date and a time."""
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M}"


def flat(value: Any, name: str = "") -> dict[str, str]:
    """The leaves of nested JSON by their full names, as text."""
    if isinstance(value, dict) and value:
        return {k: v for key, each in value.items() for k, v in flat(each, f"{name}.{key}" if name else key).items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return {k: v for i, each in enumerate(value) for k, v in flat(each, f"{name}[{i}]").items()}
    return {name: _shown(value)}


def _measured(name: str, details: Mapping[str, Any]) -> Measured:
    """What the details of the eval say."""
    metrics = {f"{name}/{k}": _float(v) for k, v in _dict(details.get("metrics")).items()}
    return Measured(_whole(details.get("step")), str(details.get("protocol") or ""), metrics)


def _defaults(holder: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """The names and defaults of the fields of `holder`, and of the dataclasses in it, that have one."""
    for field in dataclasses.fields(holder):
        name, value, default = prefix + field.name, getattr(holder, field.name), field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if dataclasses.is_dataclass(value):
            same = type(default) is type(value)  # else a class was chosen, which is worth saying
            yield f"{name}.kind", _shown(getattr(default, "kind", None)) if same else ""
            yield from _defaults(value, f"{name}.")
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for i, item in enumerate(value):
                yield from _defaults(item, f"{name}[{i}].")
        elif default is not dataclasses.MISSING:
            yield name, _shown(json.loads(json.dumps(to_dict(default))))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def _parsed(text: str) -> Any:
    try:
        return _shallow(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _shallow(value: Any, depth: int = 20) -> Any:
    """`value`, unless it is nested deeper than anything that a run writes: ValueError."""
    if depth == 0:
        raise ValueError("nested too deep")
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _shallow(each, depth - 1)
    return value


def _dict(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _float(value: Any) -> float:
    """NaN for what is no number, or too large for one."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _whole(value: Any) -> int:
    """0 for what is no whole number."""
    return value if type(value) is int and abs(value) < 10**15 else 0
