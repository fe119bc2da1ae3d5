"""Other settings of the same run: which would be faster, and which would fit.

The global batch stays. What recomputes less needs more memory, and may be slower all the same, as what is kept must be
written and read: all that fit are compared. Smaller micro-batches are tried only where larger ones do not fit.
"""

from __future__ import annotations

import concurrent.futures
import copy
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from visionfm_jax.config import Config
from visionfm_jax.errors import ConfigError
from visionfm_jax.models.layers import LIGHTER, POLICIES
from visionfm_jax.parallel.targets import Cluster
from visionfm_jax.planning.calibration import Calibration
from visionfm_jax.planning.compiled import GPU, CompileError, compile_step, missing_packages
from visionfm_jax.planning.estimate import Estimate, estimate, usable_bytes

REMAT = tuple(POLICIES)  # from most memory to most arithmetic
UNROLLED = 5  # settings of a search that are compiled once more without loops over layers
COMPILE_BYTES = 3e9  # host memory of one compile, of a large model


class Setting(NamedTuple):
    """The settings that may change without changing what is learnt. A search changes all networks at once."""

    stage: int
    replicas: int
    accumulate: int
    remat: tuple[str, ...]  # of each network
    attention: tuple[str, ...]  # of each network; "auto" counts as what a plan makes of it
    scan_layers: tuple[bool, ...]  # of each network
    networks: tuple[str, ...]  # their fields in the configuration

    @property
    def fields(self) -> dict[str, int | str]:
        """The configuration's fields and their values."""
        of_networks = {
            f"{network}.{name}": value
            for name in ("remat", "attention", "scan_layers")
            for network, value in zip(self.networks, getattr(self, name), strict=True)
        }
        run = {"parallel.stage": self.stage, "parallel.replicas": self.replicas, "train.accumulate": self.accumulate}
        return run | of_networks

    def flags(self, other: Setting) -> str:
        """The flags of the command line that lead from `other` to this."""
        before = other.fields
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items() if value != before[name])

    def with_remat(self, limit: Callable[..., int], policy: str) -> Setting:
        """The same with `policy` for each network, where it is the `limit` (max: the heavier) of it and its own."""
        return self._replace(remat=tuple(limit(r, policy, key=heaviness) for r in self.remat))

    def with_attention(self, kind: str) -> Setting:
        """The same with this kernel for all networks."""
        return self._replace(attention=(kind,) * len(self.networks))

    @property
    def recomputed(self) -> float:
        """How much is recomputed, as steps through `REMAT`."""
        return sum(map(heaviness, self.remat))


def heaviness(remat: str) -> float:
    """Where a value stands in `REMAT`; one that only some blocks follow, such as "full:8", just before its policy."""
    policy, partly, _ = remat.partition(":")
    return REMAT.index(policy) - 0.5 * bool(partly)


def setting_of(config: Config) -> Setting:
    """The setting of a configuration."""
    networks, auto = config.model.networks(), "xla" if config.train.precision == "fp32" else "cudnn"
    return Setting(
        config.parallel.stage, config.parallel.replicas, config.train.accumulate,
        tuple(n.remat for n in networks.values()),
        tuple(auto if n.attention == "auto" else n.attention for n in networks.values()),
        tuple(n.scan_layers for n in networks.values()), tuple(networks),
    )  # fmt: skip


def with_setting(config: Config, setting: Setting) -> Config:
    """The same run with another setting."""
    config = copy.deepcopy(config)
    config.parallel.stage, config.parallel.replicas = setting.stage, setting.replicas
    config.train.accumulate = setting.accumulate
    networks, of_each = config.model.networks(), (setting.remat, setting.attention, setting.scan_layers)
    for network, *values in zip(networks.values(), *of_each, strict=True):
        network.remat, network.attention, network.scan_layers = values
    return config


def is_allowed(config: Config, setting: Setting, cluster: Cluster) -> bool:
    """Whether the rules of configurations and the packages at hand allow it."""
    changed = with_setting(config, setting)
    if config.task.loss_scope == "micro_batch" and setting.accumulate != config.train.accumulate:  # another loss
        return False
    if "cudnn" in setting.attention and missing_packages():
        return False
    try:
        changed.validate()
        changed.validate_devices(cluster.devices, cluster.hosts)
    except ConfigError:
        return False
    return True


class Planner:
    """Estimates settings of one configuration on one cluster, several at a time.

    Args:
      config: the run.
      cluster: where.
      calibration: as of `estimate`.
      on_progress: called with the number of settings known so far, and of those asked for.
    """

    def __init__(
        self, config: Config, cluster: Cluster, calibration: Calibration | None, on_progress: Callable[[int, int], None]
    ):
        self.config, self.cluster, self.calibration, self._on_progress = config, cluster, calibration, on_progress
        self._pool = concurrent.futures.ThreadPoolExecutor(jobs())
        self._asked: dict[Setting, concurrent.futures.Future[Estimate | None]] = {}
        self._lock = threading.Lock()  # families are walked in threads
        self.compiled = 0  # settings

    def __enter__(self) -> Planner:
        return self

    def __exit__(self, *exception: object) -> None:
        self._pool.shutdown(wait=exception[0] is None, cancel_futures=True)

    def know(self, setting: Setting, found: Estimate) -> None:
        """Give it an estimate that is there already."""
        self._asked[setting] = concurrent.futures.Future()
        self._asked[setting].set_result(found)
        self.compiled += 1

    def ask(self, setting: Setting) -> concurrent.futures.Future[Estimate | None]:
        """The estimate, later; None where the compiler refuses the setting."""
        with self._lock:
            if setting not in self._asked:
                self._asked[setting] = self._pool.submit(self._estimate, setting)
                self._on_progress(self.compiled, len(self._asked))
            return self._asked[setting]

    def _estimate(self, setting: Setting) -> Estimate | None:
        try:
            step = compile_step(with_setting(self.config, setting), self.cluster, GPU)
            found = estimate(step, self.cluster, self.calibration)
        except CompileError:
            found = None
        with self._lock:
            self.compiled += 1
            self._on_progress(self.compiled, len(self._asked))
        return found


def jobs() -> int:
    """Compiles that run side by side here."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(os.cpu_count() or 1, int(memory / COMPILE_BYTES)))


def advice(planner: Planner, base: Setting, now: Estimate, count: int = 3) -> list[tuple[Setting, Estimate]]:
    """The `count` changes that would save the most time, of those that fit, best first."""

    def allowed(settings: Iterable[Setting]) -> list[Setting]:
        return [s for s in settings if is_allowed(planner.config, s, planner.cluster)]

    known = [(s, planner.ask(s)) for s in allowed(neighbours(base, planner.cluster))]
    for family in (lighter(base), *larger_micro_batches(base)):
        fitting, most = base, now
        for setting in allowed(family):
            if (setting.stage, setting.remat) == (base.stage, base.remat) and not _may_fit(setting, base, now):
                continue
            known.append((setting, planner.ask(setting)))
            found = known[-1][1].result()
            if found and found.fits:
                fitting, most = setting, found
            elif found and (partly := _partly(planner.config, fitting, most, setting, found)):
                known.append((partly, planner.ask(partly)))
            if bool(found and found.fits) == (setting.accumulate != base.accumulate):
                break  # what recomputes less needs more memory yet; smaller micro-batches are no faster
    better = [(s, f.result()) for s, f in known if f.result() and f.result().fits]
    return _ranked([(s, e) for s, e in better if e.seconds < 0.99 * now.seconds], base)[:count]


def _ranked(found: list[tuple[Setting, Estimate]], base: Setting) -> list[tuple[Setting, Estimate]]:
    """Fastest first, and each program once, by the setting that changes least: on one GPU all stages are the same."""
    found = sorted(found, key=lambda f: (f[1].seconds, sum(a != b for a, b in zip(f[0], base, strict=True))))
    programs: dict[tuple[float, int], tuple[Setting, Estimate]] = {}
    for setting, e in found:
        programs.setdefault((e.seconds, e.compiled.peak), (setting, e))
    return list(programs.values())


def _may_fit(setting: Setting, base: Setting, now: Estimate) -> bool:
    """Whether larger micro-batches may fit: at the least, their activations grow."""
    growth = now.memory.get("activations", 0) * (base.accumulate / setting.accumulate - 1)
    return now.compiled.peak + growth <= now.usable


def _partly(config: Config, base: Setting, now: Estimate, lighter: Setting, too_large: Estimate) -> Setting | None:
    """Between a setting and the next that recomputes less, which does not fit: as many blocks recompute less as fit.

    That a block keeps as much as another is an approximation: those of the last stages, which keep less, come last.
    """
    share = (now.usable - now.compiled.peak) / max(too_large.compiled.peak - now.compiled.peak, 1)
    remat = []
    for network, before, after in zip(config.model.networks().values(), base.remat, lighter.remat, strict=True):
        policy, _, blocks = before.partition(":")
        recomputing = math.ceil(int(blocks or network.blocks) * (1 - 0.95 * share))
        mixed = LIGHTER.get(policy) == after and 0 < recomputing < network.blocks
        remat.append(f"{policy}:{recomputing}" if mixed else before)
    found = base._replace(remat=tuple(remat))
    return found if found != base and lighter.accumulate == base.accumulate else None


def lighter(base: Setting) -> Iterator[Setting]:
    """Less and less recomputed."""
    fewer = dict.fromkeys(base.with_remat(min, policy) for policy in reversed(REMAT))
    yield from (s for s in fewer if s != base)


def larger_micro_batches(base: Setting) -> Iterator[list[Setting]]:
    """From one micro-batch to half as many as now: as it is, with more recomputation, and in stages that hold less."""
    fewer = [n for n in range(1, base.accumulate) if base.accumulate % n == 0]
    for stage in range(base.stage, 4):
        for setting in dict.fromkeys([base, base.with_remat(max, "branches")]):
            yield [setting._replace(accumulate=n, stage=stage) for n in fewer]


def neighbours(base: Setting, cluster: Cluster) -> Iterator[Setting]:
    """Other single changes that may save time: less exchanged, more recomputed and less kept, another kernel."""
    yield base.with_attention("xla" if "cudnn" in base.attention else "cudnn")
    if any(base.scan_layers):
        yield base._replace(scan_layers=(False,) * len(base.networks))
    yield from (s for s in dict.fromkeys(base.with_remat(max, policy) for policy in REMAT) if s != base)
    yield from (base._replace(stage=stage) for stage in range(base.stage - 1, 0, -1))
    for replicas in {1, cluster.hosts} - {base.replicas}:
        yield base._replace(replicas=replicas)


def nearest_that_fits(planner: Planner, base: Setting) -> tuple[Setting, Estimate] | None:
    """The setting with the fewest and cheapest changes whose step fits; None if there is none."""
    heavier = dict.fromkeys(base.with_remat(max, r) for r in REMAT)
    most = planner.config.train.batch_size // planner.cluster.devices
    accumulations = [base.accumulate * 2**i for i in range(17) if base.accumulate * 2**i <= most]
    stages = [s for s in (base.stage, 1, 2, 3) if s >= base.stage]
    attentions = dict.fromkeys([base.attention, base.with_attention("cudnn").attention])
    found = itertools.product(attentions, dict.fromkeys(stages), accumulations, heavier)
    candidates = [s._replace(attention=kind, stage=stage, accumulate=n) for kind, stage, n, s in found]
    candidates += [c._replace(replicas=1) for c in candidates if c.replicas > 1]

    def cost(setting: Setting) -> tuple[int, float]:
        """Changed fields, then how far each goes; a kernel costs nothing, a stage traffic, the others arithmetic."""
        steps = (setting.accumulate // base.accumulate).bit_length() - 1
        steps += setting.recomputed - base.recomputed + 2 * (setting.stage - base.stage)
        return sum(a != b for a, b in zip(setting, base, strict=True)), steps

    candidates = [c for c in dict.fromkeys(candidates) if c != base and is_allowed(planner.config, c, planner.cluster)]
    tried, now, left = base, planner.ask(base).result(), sorted(candidates, key=cost)
    while True:
        left = [c for c in left if now is None or _could_fit(c, tried, now)]
        for ahead in left[: jobs()]:
            planner.ask(ahead)
        if not left:
            return None
        tried, *left = left
        now = planner.ask(tried).result()
        if now and now.fits:
            return tried, now


def _could_fit(setting: Setting, tried: Setting, now: Estimate) -> bool:
    """False where one that was tried, and does not fit, shows that this cannot either."""
    if (setting.stage, setting.replicas) != (tried.stage, tried.replicas) or setting.accumulate == 1 < tried.accumulate:
        return True  # one micro-batch holds no sum of gradients
    alike = setting._replace(accumulate=tried.accumulate) == tried
    return _least(now, tried.accumulate, setting.accumulate if alike else math.inf) <= now.usable


def _least(known: Estimate, accumulate: int, more: float) -> float:
    """Bytes at the least with `more` micro-batches, of a step known with `accumulate`: what is not held shrinks."""
    held = sum(size for kind, size in known.memory.items() if kind not in ("activations", "temporary"))
    return held + (known.compiled.peak - held) * accumulate / more


def search(planner: Planner) -> list[tuple[Setting, Estimate]]:
    """All settings worth knowing that fit, fastest first.

    Each family (stage, replicas, attention kernel) is walked from the largest micro-batch to the smallest, several
    families side by side. Of the fastest it is then tried whether layers are faster where they are no loop.
    """
    base, cluster = setting_of(planner.config), planner.cluster
    replicated = {1, cluster.hosts, base.replicas} if cluster.hosts > 1 else {1, base.replicas}
    families = [
        base.with_attention(kind)._replace(stage=stage, replicas=replicas)
        for stage in (range(4) if cluster.devices > 1 else [base.stage])
        for replicas in sorted(replicated if stage else {1})
        for kind in ("cudnn", "xla")
    ]
    walkers = concurrent.futures.ThreadPoolExecutor(len(families))
    try:
        walks = [walkers.submit(_walk, planner, family) for family in families]
        found = list(itertools.chain.from_iterable(walk.result() for walk in walks))
    finally:
        walkers.shutdown(wait=False, cancel_futures=True)  # after Ctrl-C nobody waits for them
    fastest = [setting for setting, _ in _ranked(found, base)[:UNROLLED] if any(setting.scan_layers)]
    unrolled = [setting._replace(scan_layers=(False,) * len(setting.networks)) for setting in fastest]
    asked = [(setting, planner.ask(setting)) for setting in unrolled]
    return _ranked(found + [(s, f.result()) for s, f in asked if f.result() and f.result().fits], base)


def _walk(planner: Planner, family: Setting) -> list[tuple[Setting, Estimate]]:
    """Of one family: each rematerialisation that fits, with the largest micro-batch with which it does."""
    found: list[tuple[Setting, Estimate]] = []
    left = list(reversed(REMAT))  # from the least memory
    too_large: dict[str, tuple[Estimate, int]] = {}  # by remat, and with how many micro-batches
    for accumulate in _accumulations(planner, family):
        for remat in tuple(left):
            setting = family._replace(accumulate=accumulate, remat=(remat,) * len(family.networks))
            if remat in too_large and _least(*too_large[remat], accumulate) > usable_bytes(planner.cluster):
                break  # a smaller micro-batch is worth a compile only where it may fit
            known = planner.ask(setting).result() if is_allowed(planner.config, setting, planner.cluster) else None
            if known is None:  # the rules or the compiler refuse the family's kernel
                return found
            if not known.fits:
                if _least(known, accumulate, math.inf) > known.usable:
                    return found
                too_large[remat] = known, accumulate
                break  # nor does what keeps more
            found.append((setting, known))
            left.remove(remat)
        if not left:
            break
    return found


def _accumulations(planner: Planner, family: Setting) -> Iterator[int]:
    """Numbers of micro-batches, doubling, that leave every device at least one sample."""
    accumulate, batch = 1, planner.config.train.batch_size
    while batch % (accumulate * planner.cluster.devices) == 0:
        yield accumulate
        accumulate *= 2
