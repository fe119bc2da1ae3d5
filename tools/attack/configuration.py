"""Test configurations with extreme values in every field, set in Python and by flags, and with malformed command lines.

    python tools/attack/configuration.py --values=10000 --commands=100

A value must either be refused by a ConfigError of short lines that name the field, or be usable: of the declared type,
finite, preserved by JSON, with a length that fits the counters, numbers that survive float32, a run folder below
runs/, and a network that can be built in bounded time and memory. A command must end by itself with exit code 2 and
one line for each broken rule. Violations are listed. Exit codes: 0 none · 1 some.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import copy
import dataclasses
import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from visionfm_jax.config import Config, load, schema  # noqa: E402
from visionfm_jax.config.limits import types_of  # noqa: E402
from visionfm_jax.data.sources.kinds import TfdsConfig  # noqa: E402
from visionfm_jax.errors import ConfigError, UserError  # noqa: E402
from visionfm_jax.evals.kinds import AccuracyConfig  # noqa: E402
from visionfm_jax.models.aurora import AuroraConfig  # noqa: E402
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config  # noqa: E402
from visionfm_jax.models.backbones.vit import ViTConfig  # noqa: E402
from visionfm_jax.models.clip import ClipConfig  # noqa: E402
from visionfm_jax.tasks.contrastive import ContrastiveConfig  # noqa: E402
from visionfm_jax.tasks.multimodal import MultimodalConfig  # noqa: E402

CONFIGS = (
    "quickstart.py", "vit_huge.py", "vit_huge.py:tiny", "swinv2_g_clip.py", "swinv2_g_clip.py:tiny",
    "swinv2_g_clip_640.py", "swinv2_g_clip_640.py:tiny", "aurora_xl.py", "aurora_xl.py:tiny",
)  # fmt: skip
INT32 = 2**31 - 1
LONGEST = 1000  # characters of a line for people
SECONDS, MEMORY = 60, 4 << 30  # for the shapes of a network

NUMBERS = (
    0, 1, -1, 2, 3, 7, 64, 255, 1000, 4096, 65536, 65537, INT32, INT32 + 1, 2**32, 2**53 + 1, 2**63, 10**20, 10**400,
    -(10**20), 0.0, -0.0, 0.5, 1.0, 1.9, 2.5, 1e-5, 1e-12, 1e-45, 5e-324, 1e20, 1e38, 3.5e38, 1e308, -1e308, math.inf,
    -math.inf, math.nan, 1 - 1e-9, 1 - 1e-16, 0.1 + 0.2, True, False, np.int64(3), np.float32(0.5), np.float64(0.5),
    np.float64("nan"), 1 + 2j,
)  # fmt: skip
WORDS = (
    "", " ", "a", "fp32", "cudnn", "cls", "H", "h", "G", "P", "sigmoid", "nan", "inf", "1", "None", "..", ".", "/",
    "a/../../b", "../x", "/etc/passwd", "a b", "a\0b", "\0", "a\nb", "\ud800", "é", "👍", "x" * 300, "x" * 100_000,
    "%s%n",
    "{}", "${HOME}", "~", "~root", "-x", "--config.seed=1", "val", "val/top1", "runs", "tfds", "bundled", "digits",
    "clip",
    "emoji", "\x1b[31m", "CON", "a\\b",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (
    None, b"x", [], [1, 2], (), (1,), (1, 2), (0.5, 1.0), (1.9, 9.0), (1, 9.0), (0.5,) * 3, (0.5,) * 4, (math.inf,) * 3,
    (math.nan,) * 3, (math.inf, 1), (1e308,) * 3, ("a", "b"), "ab", {1, 2}, {0.5, 1.0}, {"a": 1}, {0: 1, 1: 2},
    range(2),
    np.ones(3), np.ones(2, int), ((1, 2), (3, 4)), (10**20, 1), (1, 10**20), (True, False), (-1, -1), (0.0,) * 3,
    (1e-45,) * 3, (1.0, 0.5), int, object(), lambda: 1, ..., frozenset({1}), bytearray(b"1"), ViTConfig(),
    TfdsConfig(), (TfdsConfig(),), (TfdsConfig(path="x"),) * 3,
    (AccuracyConfig(source=TfdsConfig(path="x")),), schema.OptimConfig(), ContrastiveConfig(),
    MultimodalConfig(tokenizer="clip"), ClipConfig(), AuroraConfig(), SwinV2Config(),
)  # fmt: skip
TEXTS = (
    "", "1e400", "-1e400", "(1e400, 1)", "(1e400,1e400,1e400)", "(nan, 0.5, 0.5)", "(1.9, 9)", "(1,", "1,)", "((1, 2))",
    "[1 2]", "{1, 2}", "{'a': 1}", "'ab'", "(" * 10_000, "[" * 10_000 + "]" * 10_000, "9" * 5000, "1_000", "0x10",
    "1e3",
    "١", " 1 ", "+1", "--1", "1;2", "__import__('os')", "true", "True", "FALSE", "yes", "None", "(,)", ",",
    "(0.5, 1.0)", "0.1,0.9", "(0, 9)", "(0.4, 0.4, 0.4, 0.1)", "1.0", "2", "16", "128",
)  # fmt: skip


class Finding(typing.NamedTuple):
    """Something that went wrong."""

    kind: str
    where: str
    detail: str


def shipped() -> dict[str, Config]:
    """The shipped configurations by name."""
    return {name: load.load_file(f"{ROOT}/configs/{name}") for name in CONFIGS}


def places(holder: Any, name: str = "") -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Every field below `holder`, groups too: its name, and what sets it."""
    for field in dataclasses.fields(holder):
        value, here = getattr(holder, field.name), f"{name}{field.name}"
        yield here, lambda new, holder=holder, leaf=field.name: setattr(holder, leaf, new)
        if dataclasses.is_dataclass(value):
            yield from places(value, f"{here}.")
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    yield from places(item, f"{here}[{i}].")


def wild(chance: random.Random) -> Any:
    """A value of no type in particular."""
    kind = chance.random()
    if kind < 0.45:
        return chance.choice(NUMBERS)
    if kind < 0.6:
        return chance.choice((-1, 1)) * chance.choice((int, float))(10 ** chance.uniform(-3, 13))
    if kind < 0.75:
        return chance.choice(WORDS)
    return chance.choice(OTHERS)


def text(chance: random.Random) -> str:
    """A value as it stands on a command line."""
    if chance.random() < 0.5:
        return chance.choice(TEXTS)
    value = wild(chance)
    return "9" * 401 if isinstance(value, int) and abs(value) > 10**300 else str(value)


def attack_values(count: int, seed: int, shapes: int) -> tuple[collections.Counter, list[Finding]]:
    """`count` configurations, each with one to three wild fields; the networks of `shapes` accepted ones are built."""
    chance, configs = random.Random(seed), shipped()
    outcomes: collections.Counter = collections.Counter()
    findings: list[Finding] = []
    networks: dict[str, Config] = {}
    for _ in range(count):
        name = chance.choice(CONFIGS)
        config = copy.deepcopy(configs[name])
        by_flag = chance.random() < 0.4
        set_here = []
        began = time.perf_counter()
        try:
            for _ in range(chance.choice((1, 1, 1, 2, 3))):
                if by_flag:
                    field = chance.choice(list(load.fields(config)))
                    value: Any = text(chance)
                    set_here.append((field, value))
                    config = load.with_fields(config, [(field, value)])
                else:
                    field, put = chance.choice(list(places(config)))
                    value = wild(chance)
                    set_here.append((field, value))
                    put(value)
            config.validate()
        except ConfigError as error:
            outcomes["refused"] += 1
            wrong = check_message(str(error), [field for field, _ in set_here])
        except BaseException as error:
            wrong = f"{type(error).__name__}: {str(error)[:200]}"
        else:
            outcomes["accepted"] += 1
            wrong = check_accepted(config)
            if not wrong:
                key = json.dumps([str(config.model), str(config.task), config.train.precision])
                networks.setdefault(key, config)
        if not wrong and time.perf_counter() - began > 2:
            wrong = f"took {time.perf_counter() - began:.1f} s"
        if wrong:
            said = ", ".join(f"{field} = {repr_of(value)}" for field, value in set_here)
            findings.append(Finding("flag" if by_flag else "Python", f"{name}: {said}", wrong))
    for key in chance.sample(sorted(networks), min(shapes, len(networks))):
        outcomes["networks"] += 1
        if wrong := check_network(networks[key]):
            findings.append(Finding("network", key[:600], wrong))
    return outcomes, findings


def repr_of(value: object) -> str:
    """Its beginning."""
    try:
        return repr(value)[:120]
    except ValueError:
        return "an int of many digits"


def check_message(message: str, fields: list[str]) -> str:
    """What is wrong with a refusal; empty: nothing."""
    for line in message.splitlines():
        if len(line) > LONGEST:
            return f"a line of {len(line)} characters: {line[:80]}"
        if not line.startswith(("config.", "--config.")):
            return f"names no field: {line[:200]}"
        if not line.isprintable():
            return f"control characters: {line[:200]!r}"
    first = {part for field in fields for part in (field.partition(".")[0].partition("[")[0],)}
    named = {line.split("config.", 1)[1].split(" ")[0] for line in message.splitlines()}
    if not any(name.startswith(tuple(first)) for name in named) and not any(part in message for part in first):
        return f"names another field: {message[:200]}"
    return ""


def check_accepted(config: Config) -> str:
    """What a run could not work with in an accepted configuration; empty: nothing."""
    if wrong := next(check_types(config, "config"), ""):
        return wrong
    plain = schema.to_dict(config)
    if json.loads(json.dumps(plain, allow_nan=False)) != json.loads(json.dumps(lists(plain))):
        return "JSON does not keep it"
    if not 1 <= config.total_steps <= INT32 - 1:
        return f"total_steps = {config.total_steps}"
    if config.total_steps * config.train.batch_size >= 2**63:
        return "more samples than 63 bits count"
    if not all(math.isfinite(v) for v in config.derived().values()):
        return "derived quantities"
    optim, augment = config.optim, config.data.augment
    for name, value in {"lr": optim.lr, "eps": optim.eps, "1 - b1": np.float32(1) - np.float32(optim.b1),
                        "1 - b2": np.float32(1) - np.float32(optim.b2), "std": min(augment.std)}.items():  # fmt: skip
        if not np.float32(value) > 0:
            return f"{name} is {np.float32(value)} in float32"
    white = (1 - np.float32(augment.mean)) / np.float32(augment.std)
    if not (np.isfinite(white).all() and (1 / np.float32(augment.std) > 1e-3).all()):
        return "images are blank or not finite"
    if not config.workdir and (os.path.normpath(config.folder) != f"runs/{config.name}" or "/" in config.name):
        return f"leaves runs/: {config.folder}"
    if any("/" in e.name or e.name in ("", ".", "..") for e in config.evals):
        return "an eval's name is no file name"
    if config.data.prefetch * config.data.threads > 2**16 or config.data.workers > 2**10:
        return "more threads, processes or batches than a machine has"
    return ""


def lists(value: Any) -> Any:
    """Tuples as JSON has them."""
    if isinstance(value, dict):
        return {k: lists(v) for k, v in value.items()}
    return [lists(v) for v in value] if isinstance(value, (tuple, list)) else value


def check_types(holder: Any, name: str) -> Iterator[str]:
    """Fields that are not of their declared type, or numbers that are not finite."""
    hints = types_of(type(holder))
    if vars(holder).keys() - hints.keys():
        yield f"{name} has more fields than are declared"
    for leaf, kind in hints.items():
        yield from check_type(getattr(holder, leaf), kind, f"{name}.{leaf}")


def check_type(value: Any, kind: Any, name: str) -> Iterator[str]:
    """As `check_types`, of one value."""
    if isinstance(kind, types.UnionType):  # one number, or a pair
        number, pair = typing.get_args(kind)
        kind = pair if isinstance(value, tuple) else number
    if typing.get_origin(kind) is tuple:
        kinds = typing.get_args(kind)
        if Ellipsis in kinds and type(value) is tuple:
            kinds = kinds[:1] * len(value)
        if type(value) is not tuple or len(value) != len(kinds):
            yield f"{name} is no {kind}"
        else:
            for i, (item, own) in enumerate(zip(value, kinds, strict=True)):
                yield from check_type(item, own, f"{name}[{i}]")
        return
    plain = {int: (int,), float: (int, float), bool: (bool,), str: (str,)}
    if not (type(value) in plain[kind] if kind in plain else isinstance(value, kind)):
        yield f"{name} is a {type(value).__name__}"
    elif dataclasses.is_dataclass(value):
        yield from check_types(value, name)
    elif isinstance(value, (int, float)) and not abs(value) <= 2**40:  # NaN too
        yield f"{name} = {value}"
    elif isinstance(value, str) and ("\0" in value or len(value) > 10_000):
        yield f"{name} is no text for a file name"


def check_network(config: Config) -> str:
    """Whether the shapes of the whole state follow, the learning rate is finite, and nothing grows without bound."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # shapes need no other
    import jax

    from visionfm_jax.optim.adamw import make_optimizer, schedule
    from visionfm_jax.parallel.zero import gather_params
    from visionfm_jax.tasks.task import make_task
    from visionfm_jax.train.state import init_state

    began, memory = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        total = config.total_steps
        rates = [float(schedule(config.optim, total)(s)) for s in (0, config.optim.warmup_steps, total // 2, total)]
        if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
            return f"learning rates {rates}"
        tx = make_optimizer(config.optim, total)
        state = jax.eval_shape(lambda: init_state(make_task(config, gather_params), tx, config))
        if not sum(p.size for p in jax.tree.leaves(state.params)) > 0:
            return "no parameters"
    except UserError as error:
        return check_message(str(error), ["model", "task"])
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    seconds, grown = time.perf_counter() - began, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) << 10
    if seconds > SECONDS or grown > MEMORY:
        return f"its shapes took {seconds:.0f} s and {grown / 2**30:.1f} GiB"
    return ""


QUICK = "--config=configs/quickstart.py"
STOP = "--config.parallel.replicas=7"  # refused once everything before was accepted: no run starts
ODD = (
    "--config", "--config=", "--config=/", "--config=/dev/null", "--config=nope.py", "--config=README.md",
    "--config=configs/vit_huge.py:nope", "--config=" + "x" * 5000, "--config=\udcff.py", "--config.",
    "--config.=1",
    "--config.=", "-config.x=1", "-config.seed=1", "--confg.seed=1", "--config.seed", "--config.seed=",
    "--config.seed=1e20",
    "--config.seed=-1", "--config.seed=" + "9" * 4400, "--config.optim", "--config.optim=1", "--config.optim.lr=inf",
    "--config.optim.lr=1e400", "--config.optim.lr=nan", "--config.optim.lr=-0.0", "--config.optim..lr=1",
    "--config.optim.lr.x=1", "--config.data.train[9].path=x", "--config.data.train[-1].path=x",
    "--config.data.train[].path=x", "--config.data.train[0]=x", "--config.data.train=x", "--config.evals=" + "(" * 3000,
    "--config.evals=" + "x" * 100_000, "--config.evals[0].name=../x", "--config.name=a/../../b", "--config.name=",
    "--config.name=é", "--config.workdir=a\nb", "--config.workdir=\udcff", "--config.workdir=" + "x" * 5000,
    "--config.data.augment.std=(inf,inf,inf)", "--config.data.augment.std=(1e400,1,1)",
    "--config.data.transforms[0].size=(1.9,9)", "--config.data.transforms[0].scale='ab'",
    "--config.data.augment.mean={0.1,0.2,0.3}", "--config.data.prefetch=1000000", "--config.data.threads=1000000",
    "--config.train.epochs=1e308", "--config.train.steps=4294967296", "--config.train.batch_size=0",
    "--config.model.attention=cudnn", "--config.task.num_classes=100000000000000000000", "--config.__class__=1",
    "--config.total_steps=1", "--config.model.__dict__=1", "--mode", "--mode=", "--mode=nope", "--mode=train=1",
    "--moed=train",
    "--processes=1e20", "--processes=-1", "--processes=" + "9" * 400, "--process=0", "--coordinator=",
    "--coordinator=::::",
    "--flagfile=/etc/passwd", "--undefok=x", "--wat", "-x", "--", "---", "train", "", " ", "=", "--=", "%s", "\udcff",
    "👍",
)  # fmt: skip
OTHER = (
    ("bench", [QUICK, STOP]), ("plan", [QUICK, STOP, "--cluster=h100:1x8"]),
    ("data.tokenizer", ["train", "--config=configs/aurora_xl.py"]),
    ("data.select", ["--path=/nope", "--where=a > 1", "--out=/nope/x"]),
)  # fmt: skip
OWN = {
    "bench": ("--steps=0", "--steps=1e9", "--steps=", "--warmup=-1", "--stpes=3", "--mode=train", "x", "-5"),
    "plan": ("--cluster=", "--cluster=x:1x1", "--cluster=h100:0x0", "--cluster=h100:9999999999x9",
    "--cluster=h100:-1x8",
             "--targets=/nope", "--targets=/dev/null", "--json=/nope/x", "--claster=h100:1x8", "--search=1"),
    "data.tokenizer": ("--sentences=0", "--sentences=1e9", "--vocab_size=x", "--out=/nope/x.model", "--out=x", "more"),
    "data.select": ("--jobs=0", "--jobs=1000000", "--jobs=x", "--where=", "--where=a b", "--where=__import__('os')",
                    "--where=" + "(" * 1000, "--path=", "--nope", "more"),
}  # fmt: skip


def command_lines(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Programs with their words, each at least once wrong."""
    chance = random.Random(seed)
    lines = [("main", [STOP, word] if word.startswith("--config=") else [QUICK, STOP, word]) for word in ODD]
    lines += [("main", []), ("main", [QUICK, QUICK])]
    lines += [(program, [*words, own]) for program, words in OTHER for own in OWN[program]]
    chance.shuffle(lines)
    while len(lines) < count:
        lines.append(("main", [QUICK, STOP, *chance.sample(ODD, 3)]))
    return lines[:count]


def check_command(program: str, words: list[str]) -> tuple[str, str]:
    """Its one line, and what is wrong with how it ended; empty: nothing."""
    command = [sys.executable, "-m", f"visionfm_jax.{program}", *(w.encode("utf-8", "surrogateescape") for w in words)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as folder:  # what a run that starts would leave
        os.symlink(ROOT / "configs", Path(folder, "configs"))
        os.symlink(ROOT / "README.md", Path(folder, "README.md"))
        try:
            done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, timeout=180, check=False)
        except subprocess.TimeoutExpired:
            return "", "did not end in 180 s"
        left = sorted({path.name for path in Path(folder).iterdir()} - {"configs", "README.md"})
    err = done.stderr.decode("utf-8", "replace")
    line = err.strip().rpartition("\n")[2]
    if "Traceback" in err:
        return line, "a traceback"
    if done.returncode != 2:
        return line, f"exit code {done.returncode}"
    wrong_lines = [
        x for x in err.splitlines() if not x.startswith(("visionfm_jax: error: ", "config."))
    ]  # a rule a line
    if wrong_lines or len(err) > LONGEST or not line.isprintable() or done.stdout:
        return line, f"{len(err.splitlines())} lines, {len(err)} characters"
    if left:
        return line, f"left {left}"
    return line, ""


def attack_commands(count: int, seed: int, jobs: int) -> tuple[list[str], list[Finding]]:
    """`count` command lines, `jobs` at a time."""
    lines = command_lines(count, seed)
    shown, findings = [], []
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        ends = pool.map(lambda line: check_command(*line), lines)
        for (program, words), (line, wrong) in zip(lines, ends, strict=True):
            where = f"{program} {' '.join(w if len(w) < 60 else w[:40] + '…' for w in words if w not in (QUICK, STOP))}"
            shown.append(f"{where}\n    {wrong and f'WRONG, {wrong}: '}{line[:200]}")
            print(shown[-1].encode("ascii", "backslashreplace").decode(), file=sys.stderr, flush=True)
            if wrong:
                findings.append(Finding("command", where, f"{wrong}: {line[:300]}"))
    return shown, findings


def main() -> int:
    """Parse, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--values", type=int, default=10_000, help="number of configurations to try (%(default)s)")
    parser.add_argument(
        "--networks", type=int, default=200, help="networks of accepted configurations to build (%(default)s)"
    )
    parser.add_argument("--commands", type=int, default=100, help="number of command lines to try (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="command lines to run in parallel (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (%(default)s)")
    arguments = parser.parse_args()
    began = time.perf_counter()
    outcomes, findings = attack_values(arguments.values, arguments.seed, arguments.networks)
    shown, more = attack_commands(arguments.commands, arguments.seed, arguments.jobs)
    findings += more
    print("| attacked | number | refused | accepted | findings |\n|---|---:|---:|---:|---:|")
    kinds = collections.Counter(f.kind for f in findings)
    print(f"| configurations | {arguments.values:,} | {outcomes['refused']:,} | {outcomes['accepted']:,} "
          f"| {kinds['flag'] + kinds['Python']} |")  # fmt: skip
    print(f"| networks of accepted ones | {outcomes['networks']} | | | {kinds['network']} |")
    print(f"| command lines | {len(shown)} | {len(shown) - kinds['command']} | | {kinds['command']} |")
    print(f"seed {arguments.seed}, {time.perf_counter() - began:.0f} s")
    for finding in findings:
        print("\n".join(finding).encode("ascii", "backslashreplace").decode() + "\n")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
