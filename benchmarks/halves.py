"""What the benchmarks beside PyTorch share: two halves in processes of their own, alternated, and their ratio.

Imports nothing but the standard library, so that either half's environment can load it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "timm", "triton", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "visionfm_jax")
WORDS = ("half", "torch_half", "torch_python", "jax_python")  # no settings of the measurement


class HalfFailed(Exception):
    """A half ended without a result; the text is the end of what it printed."""


def parser(doc: str, peers: Sequence[str], precisions: Sequence[str], config: str) -> argparse.ArgumentParser:
    """The flags that all of these benchmarks have; `config` is ours unless given."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--peer", choices=peers, required=True, help="defaults for a laptop or for one GPU")
    p.add_argument("--model", help="model of both sides")
    p.add_argument("--batches", help="images per step, separated by commas; each side is timed at its fastest")
    p.add_argument("--steps", type=int, help="steps to time per round, after the warm-up")
    p.add_argument("--rounds", type=int, default=3, help="rounds, which alternate between the sides (%(default)s)")
    p.add_argument("--threads", type=int, help="cores for each side; 0: all")
    p.add_argument("--device", choices=("cpu", "cuda"), help="device of the torch side; JAX chooses its own")
    p.add_argument("--precision", choices=precisions, help="fp32 throughout, or 16-bit compute with fp32 weights")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="use torch.compile on the torch side")
    p.add_argument("--clip_norm", type=float, default=1.0, help="maximum gradient norm; 0: no clipping (%(default)s)")
    p.add_argument("--only", choices=("ours", "torch"), help="time one side alone, without a ratio")
    p.add_argument("--config", default=config, help="configuration of our side, before the flags above")
    p.add_argument("--torch_python", default=sys.executable, help="interpreter with torch and timm")
    p.add_argument("--jax_python", default=sys.executable, help="interpreter with jax and flax")
    p.add_argument("--timeout", type=time_limit, default=1800.0, help="seconds per process (%(default)s)")
    p.add_argument("--torch_half", action="store_true", help=argparse.SUPPRESS)  # this process is the torch half
    return p


def parse(p: argparse.ArgumentParser, argv: list[str], defaults: dict[str, dict[str, Any]]) -> argparse.Namespace:
    """Flags, with the peer's defaults filled in; `ours` holds those for our half."""
    args, args.ours = p.parse_known_args(argv)
    for key, value in defaults[args.peer].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if strange := [a for a in args.ours if not re.match(r"--config\.[\w.]+=", a)]:
        p.error(f"unknown flags {' '.join(strange)}: write ours as --config.FIELD=VALUE")
    try:
        args.batches = [int(b) for b in str(args.batches).split(",")]
    except ValueError:
        p.error(f"--batches={args.batches}: must be whole numbers, separated by commas")
    if min(*args.batches, args.steps, args.rounds) < 1 or args.threads < 0:
        p.error("--batches, --steps and --rounds must be at least 1, --threads at least 0")
    return args


def time_limit(text: str) -> float:
    """The value of --timeout."""
    most = 1e6
    with contextlib.suppress(ValueError):
        if 0 < float(text) <= most:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text}: must be a number of seconds above 0, and at most {most:g}")


# The torch half.


def torch_half(args: argparse.Namespace, timed: Callable[[argparse.Namespace, int], dict[str, Any]]) -> None:
    """Time one batch size and print its JSON line."""
    try:
        import timm
        import torch
    except ImportError as e:
        sys.exit(f"{sys.executable} has no {e.name}: name an interpreter that has torch and timm by --torch_python")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: run where there is one, or pass --device=cpu")
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest" if args.precision == "fp32" else "high")
    timm.layers.set_fused_attn(True)  # SDPA
    print(json.dumps(timed(args, args.batches[0])))


def torch_update(args: argparse.Namespace, model: Any, betas: tuple[float, float]) -> Callable[[Any], None]:
    """From a loss: backward, clipping, AdamW with decay on matrices; in fp16 with a dynamic loss scale."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim in (2, 4)], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    parameters = list(model.parameters())
    kind = {"fused": True} if args.device == "cuda" else {"foreach": True}  # the fastest of each
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=betas, **kind)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")

    def update(loss: torch.Tensor) -> None:
        scaler.scale(loss).backward()
        if args.clip_norm:
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm, foreach=True)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return update


def autocast(args: argparse.Namespace) -> Any:
    """16-bit compute over fp32 weights, or nothing."""
    import torch

    dtype = torch.float16 if args.precision == "fp16" else torch.bfloat16
    return torch.autocast(args.device, dtype, enabled=args.precision != "fp32")


def time_torch(args: argparse.Namespace, batch: int, model: Any, step: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of each timed step, and what it took; `step` returns the loss."""
    import torch

    cuda = args.device == "cuda"

    def now() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # the host never waits between steps
        event.record()
        return event

    start = time.perf_counter()
    loss = step()
    first = float(loss), time.perf_counter() - start
    for _ in range(3 if cuda else 1):
        step()
    marks = [now()]
    for _ in range(args.steps):
        loss = step()
        marks.append(now())
    last = float(loss)  # waits for the device
    seconds = [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(marks)]
    return {
        "batch": batch, "images_per_s": batch / statistics.fmean(seconds),
        "step_ms": [round(1e3 * s, 3) for s in seconds],
        "first_step_s": first[1], "loss": [first[0], last], "parameters": sum(p.numel() for p in model.parameters()),
        "peak_gib_measured": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }  # fmt: skip


# The driver.


def our_command(args: argparse.Namespace, fields: dict[str, Any]) -> list[str]:
    """The benchmark command with these fields of a configuration, and those of the command line."""
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    command = [args.jax_python, "-m", "visionfm_jax.bench", f"--config={args.config}", f"--steps={args.steps}"]
    return [*command, *flags, *args.ours]


def torch_command(args: argparse.Namespace, batch: int, program: str, *more: str) -> list[str]:
    """A benchmark's file again, as the torch half; `more` are its own flags to pass on."""
    names = ("peer", "model", "steps", "threads", "device", "precision", "clip_norm", *more)
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    flags += [f"--batches={batch}", "--compile" if args.compile else "--no-compile", "--torch_half"]
    return [args.torch_python, str(Path(program).resolve()), *flags]


def busy_seconds() -> tuple[float, float]:
    """Processor seconds used so far by everybody, where the system tells, and by our halves."""
    ours = os.times().children_user + os.times().children_system
    if not Path("/proc/stat").exists():
        return ours, ours
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK"), ours


def run(command: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Run one half on the cores it may use; its last line of output, read as JSON, and `others_cpu`.

    `others_cpu` is the share of the machine's processors that other programs used meanwhile.

    Raises:
      HalfFailed: it exited with an error (out of memory, mostly), took too long, or printed no JSON.
    """
    env = {
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",  # as much memory as torch may take
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # large pages, as `visionfm` has them; for both sides
        **os.environ,
    }
    if args.peer == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    prefix = []
    if args.threads and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        # XLA takes its number of threads from the cores that it may run on.
        code = f"import os,sys; os.sched_setaffinity(0, {cores}); os.execvp(sys.argv[1], sys.argv[1:])"
        prefix = [sys.executable, "-c", code]
    start, before = time.monotonic(), busy_seconds()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(prefix + command, cwd=ROOT, env=env, start_new_session=True, **pipes) as child:
        try:
            out, err = child.communicate(timeout=args.timeout)
        except subprocess.TimeoutExpired:
            raise HalfFailed(f"no result within --timeout={args.timeout:g} s") from None
        finally:
            end_all(child)
    lines = out.strip().splitlines()
    try:
        if child.returncode == 0:
            result = json.loads(lines[-1])
            everybody, ours = (b - a for a, b in zip(before, busy_seconds(), strict=True))
            seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
            return {**result, "others_cpu": round(max(0.0, everybody - ours) / seconds, 3)}
    except (IndexError, ValueError):
        pass
    said = (err.strip() or out.strip()).splitlines()[-12:]
    raise HalfFailed("\n".join(said) or f"exit code {child.returncode} without a word")


def busy(result: dict[str, Any]) -> str:
    """A remark beside what was measured while other programs ran."""
    share = result["others_cpu"]
    return f"  other programs used {share:.0%} of the processors" if share > 0.04 else ""


def end_all(child: subprocess.Popen) -> None:
    """End a process and what it has started: a launcher has the time to end what runs on other machines."""
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(child.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
        finally:
            os.killpg(child.pid, signal.SIGKILL)


def end_by_signals() -> None:
    """Have signals that end this program end its halves, too, which have process groups of their own."""
    for sign in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, lambda number, _: sys.exit(128 + number))


def best_batch(half: str, commands: dict[int, list[str]], args: argparse.Namespace) -> int:
    """The batch size with the most images per second; sizes that fail (too large) are passed over.

    Raises:
      SystemExit: none worked; with the last one's output.
    """
    if len(commands) == 1:
        return next(iter(commands))
    rates, error = {}, None
    for batch, command in commands.items():
        try:
            rates[batch] = run(command, args)["images_per_s"]
            say(f"sweep  {half:13s}  batch {batch:4d}  {rates[batch]:9.2f} images/s")
        except HalfFailed as e:
            error = e
            say(f"sweep  {half:13s}  batch {batch:4d}  failed: {str(e).splitlines()[-1]}")
    if not rates:
        sys.exit(f"{half}: no batch size of --batches={','.join(map(str, commands))} ran. The last one said:\n{error}")
    return max(rates, key=rates.get)


def versions(python: str) -> dict[str, str]:
    """Of the packages that matter, in another interpreter."""
    code = (
        "import importlib.metadata as m, json, platform\n"
        "out = {'python': platform.python_version()}\n"
        f"for name in {PACKAGES}:\n"
        "    try: out[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(out))"
    )
    return json.loads(subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=True).stdout)


def machine() -> dict[str, Any]:
    """What it ran on."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        cpu = models[0] if models else cpu
    return {"cpu": cpu, "cores": os.cpu_count(), "system": f"{platform.system()} {platform.machine()}"}


def say(text: str) -> None:
    """Progress, beside the result: to standard error."""
    print(text, file=sys.stderr, flush=True)


Maker = Callable[[argparse.Namespace, int], list[str]]  # (flags, batch) -> a half's command


def compare(name: str, args: argparse.Namespace, argv: list[str], makers: dict[str, Maker]) -> None:
    """Sweep, alternate, print. `makers`: of "ours" and its peers; `parameters`, where all say it, are equal."""
    end_by_signals()
    halves = [args.only] if args.only else list(makers)
    best = {h: best_batch(h, {b: makers[h](args, b) for b in args.batches}, args) for h in halves}
    rounds: dict[str, list[dict[str, Any]]] = {h: [] for h in halves}
    for i in range(args.rounds):
        for half in halves if i % 2 == 0 else halves[::-1]:  # a drifting clock favours neither
            try:
                result = run(makers[half](args, best[half]), args)
            except HalfFailed as e:
                sys.exit(f"{half}, batch {best[half]}: {e}")
            rounds[half].append(result)
            rate = f"{result['images_per_s']:9.2f} images/s{busy(result)}"
            say(f"round {i + 1}  {half:13s}  batch {best[half]:4d}  {rate}")
        sizes = {h: rounds[h][0]["parameters"] for h in halves if "parameters" in rounds[h][0]}
        if len(set(sizes.values())) > 1:
            sys.exit(f"the sides are not the same network: their numbers of parameters are {sizes}")
    rates = {h: [r["images_per_s"] for r in rounds[h]] for h in halves}
    summary: dict[str, Any] = {"benchmark": name, "peer": args.peer, "batch": best}
    summary["images_per_s"] = {h: statistics.median(rates[h]) for h in halves}
    if not args.only:
        ratios = {h: [a / b for a, b in zip(rates["ours"], rates[h], strict=True)] for h in halves if h != "ours"}
        summary |= {"ratio": {h: statistics.median(each) for h, each in ratios.items()}, "ratios": ratios}
        for half, each in ratios.items():
            middle = f"{summary['ratio'][half]:.3f} (rounds {min(each):.3f} to {max(each):.3f})"
            print(f"ours / {half}, images per second: {middle}")
    pythons = {h: args.jax_python if h == "ours" else args.torch_python for h in halves}
    summary |= {
        "rounds": rounds,
        "settings": {k: v for k, v in vars(args).items() if k not in WORDS},
        "versions": {h: versions(python) for h, python in pythons.items()},
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{name}.py", *argv]),
    }
    print(json.dumps(summary))
