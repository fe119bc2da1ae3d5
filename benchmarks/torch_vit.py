"""Our ViT training step beside timm's in PyTorch, in one run, as a ratio. See README.md.

    python benchmarks/torch_vit.py --peer=cpu --torch_python=peers/bin/python
    python benchmarks/torch_vit.py --peer=gpu --batches=32,64,96,128

Both halves do the same work on synthetic data that is already on the device: forward, softmax cross-entropy,
backward, clipping by the global norm, AdamW with decay on matrices. Each half runs in its own process, so the two
libraries may live in different environments; halves alternate, round by round, and never run at once. Further
flags that begin with `--config.` go to our half, e.g. `--config.model.attention=cudnn`.

The last line printed is JSON. This file imports nothing but the standard library until it is the torch half.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"tiny": "Ti", "small": "S", "base": "B", "large": "L", "huge": "H", "giant": "g"}  # timm's words, ours
PACKAGES = ("torch", "timm", "triton", "jax", "jaxlib", "flax", "optax", "numpy", "visionfm_jax")

# What --peer stands for; every entry can be set by its own flag.
PEERS: dict[str, dict[str, Any]] = {
    "cpu": {
        "model": "vit_small_patch16_224", "classes": 1000, "batches": "16", "steps": 6, "threads": 2, "device": "cpu",
        "precision": "fp32", "compile": False,
    },
    "gpu": {
        "model": "vit_huge_patch14_224", "classes": 21841, "batches": "32,64,96,128", "steps": 20, "threads": 0,
        "device": "cuda", "precision": "bf16", "compile": True,
    },
}  # fmt: skip


class HalfFailed(Exception):
    """A half ended without a result; the text is the end of what it printed."""


def parse(argv: list[str]) -> argparse.Namespace:
    """Flags, with the peer's defaults filled in; `ours` holds those for our half."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter, allow_abbrev=False)
    p.add_argument("--peer", choices=PEERS, required=True, help="which defaults: a laptop's or one accelerator's")
    p.add_argument("--model", help="timm name, vit_SIZE_patchP_PIXELS")
    p.add_argument(
        "--pool", choices=("gap", "cls"), default="gap", help="of both halves: tokens' mean or a class token"
    )
    p.add_argument("--classes", type=int)
    p.add_argument("--batches", help="images per step, separated by commas; each half is then timed at its own best")
    p.add_argument("--steps", type=int, help="timed steps per round, after the warm-up")
    p.add_argument("--rounds", type=int, default=3, help="alternations of the two halves at their best batch")
    p.add_argument("--threads", type=int, help="cores for either half; 0: all")
    p.add_argument("--device", choices=("cpu", "cuda"), help="of the torch half; ours takes what JAX finds")
    p.add_argument("--precision", choices=("fp32", "bf16"), help="fp32 throughout, or bf16 compute with fp32 weights")
    p.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile in the torch half")
    p.add_argument("--clip_norm", type=float, default=1.0, help="of both halves; 0: no clipping")
    p.add_argument("--only", choices=("ours", "torch"), help="time one half alone, without a ratio")
    p.add_argument("--config", default="configs/vit_huge.py", help="the run whose step ours is, before the flags above")
    p.add_argument("--torch_python", default=sys.executable, help="interpreter that has torch and timm")
    p.add_argument("--jax_python", default=sys.executable, help="interpreter that has jax and flax")
    p.add_argument("--timeout", type=float, default=1800.0, help="seconds for one process")
    p.add_argument("--torch_half", action="store_true", help=argparse.SUPPRESS)  # this process is the torch half
    args, args.ours = p.parse_known_args(argv)
    for key, value in PEERS[args.peer].items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if strange := [a for a in args.ours if not re.match(r"--config\.[\w.]+=", a)]:
        p.error(f"unknown flags {' '.join(strange)}: write ours as --config.FIELD=VALUE")
    if not re.fullmatch(rf"vit_({'|'.join(SIZES)})_patch\d+_\d+", args.model):
        p.error(f"--model={args.model}: must be vit_SIZE_patchP_PIXELS with a size of {', '.join(SIZES)}")
    try:
        args.batches = [int(b) for b in str(args.batches).split(",")]
    except ValueError:
        p.error(f"--batches={args.batches}: must be whole numbers, separated by commas")
    if min(*args.batches, args.steps, args.rounds, args.classes - 1) < 1 or args.threads < 0:
        p.error("--batches, --steps and --rounds must be at least 1, --classes at least 2, --threads at least 0")
    return args


# The torch half.


def torch_model(args: argparse.Namespace, device: Any) -> Any:
    """timm's model of the chosen form, in training mode on `device`."""
    import timm
    import torch

    form = {"class_token": False, "global_pool": "avg"} if args.pool == "gap" else {}
    model = timm.create_model(args.model, num_classes=args.classes, **form).to(device).train()
    return model.to(memory_format=torch.channels_last) if device.type == "cuda" else model


def torch_steps(args: argparse.Namespace, batch: int) -> dict[str, Any]:
    """Seconds of each timed step at one batch size, and what it took."""
    import torch

    device, bf16 = torch.device(args.device), args.precision == "bf16"
    cuda = device.type == "cuda"
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high" if bf16 else "highest")
    model = torch_model(args, device)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2 or p.ndim == 4], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    parameters = list(model.parameters())
    kind = {"fused": True} if cuda else {"foreach": True}  # the fastest of each
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), **kind)
    forward = torch.compile(model, dynamic=False) if args.compile else model
    pixels = int(args.model.rsplit("_", 1)[1])
    images = torch.randn(batch, 3, pixels, pixels, device=device)
    images = images.to(memory_format=torch.channels_last) if cuda else images
    labels = torch.randint(0, args.classes, (batch,), device=device)

    def step() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            logits = forward(images)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
        loss.backward()
        if args.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, args.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

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
        "first_step_s": first[1], "loss": [first[0], last], "parameters": sum(p.numel() for p in parameters),
        "peak_gib_measured": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }  # fmt: skip


def torch_half(args: argparse.Namespace) -> None:
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
    timm.layers.set_fused_attn(True)  # SDPA
    print(json.dumps(torch_steps(args, args.batches[0])))


# The driver.


def our_command(args: argparse.Namespace, batch: int) -> list[str]:
    """The bench door with the peer's model, batch and precision."""
    word, patch, pixels = re.fullmatch(r"vit_(\w+)_patch(\d+)_(\d+)", args.model).groups()
    fields = {
        "model.size": SIZES[word], "model.patch_size": patch, "model.image_size": pixels, "model.pool": args.pool,
        "task.num_classes": args.classes, "task.loss": "softmax", "task.label_smoothing": 0.0,
        "data.augment.flip": False, "data.augment.jitter": "(0.0,0.0,0.0,0.0)", "optim.clip_norm": args.clip_norm,
        "train.batch_size": batch, "train.accumulate": 1, "train.precision": args.precision,
        "parallel.stage": 0, "parallel.replicas": 1,
    }  # fmt: skip
    if args.peer == "cpu":
        fields |= {"model.remat": "none", "model.attention": "xla"}
    flags = [f"--config.{k}={v}" for k, v in fields.items()]
    door = [args.jax_python, "-m", "visionfm_jax.bench", f"--config={args.config}", f"--steps={args.steps}"]
    return [*door, *flags, *args.ours]


def torch_command(args: argparse.Namespace, batch: int) -> list[str]:
    """This file again, as the torch half."""
    names = ("peer", "model", "pool", "classes", "steps", "threads", "device", "precision", "clip_norm")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    flags += [f"--batches={batch}", "--compile" if args.compile else "--no-compile", "--torch_half"]
    return [args.torch_python, str(Path(__file__).resolve()), *flags]


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
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}  # as much memory as torch may take
    if args.peer == "cpu":
        env["JAX_PLATFORMS"] = "cpu"
    prefix = []
    if args.threads and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))[: args.threads]
        # XLA takes its number of threads from the cores that it may run on.
        code = f"import os,sys; os.sched_setaffinity(0, {cores}); os.execvp(sys.argv[1], sys.argv[1:])"
        prefix = [sys.executable, "-c", code]
    start, before = time.monotonic(), busy_seconds()
    try:
        done = subprocess.run(
            prefix + command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=args.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        raise HalfFailed(f"no result within --timeout={args.timeout:g} s") from None
    lines = done.stdout.strip().splitlines()
    try:
        if done.returncode == 0:
            result = json.loads(lines[-1])
            everybody, ours = (b - a for a, b in zip(before, busy_seconds(), strict=True))
            seconds = (time.monotonic() - start) * (os.cpu_count() or 1)
            return {**result, "others_cpu": round(max(0.0, everybody - ours) / seconds, 3)}
    except (IndexError, ValueError):
        pass
    said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-12:]
    raise HalfFailed("\n".join(said) or f"exit code {done.returncode} without a word")


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
            say(f"sweep  {half:5s}  batch {batch:4d}  {rates[batch]:9.2f} images/s")
        except HalfFailed as e:
            error = e
            say(f"sweep  {half:5s}  batch {batch:4d}  failed: {str(e).splitlines()[-1]}")
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


def main(argv: list[str]) -> None:
    """Sweep, alternate, print."""
    args = parse(argv)
    if args.torch_half:
        return torch_half(args)
    makers = {"ours": our_command, "torch": torch_command}
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
            busy = f"  other programs used {result['others_cpu']:.0%} of the processors"
            rate = f"{result['images_per_s']:9.2f} images/s{busy if result['others_cpu'] > 0.04 else ''}"
            say(f"round {i + 1}  {half:5s}  batch {best[half]:4d}  {rate}")
    rates = {h: [r["images_per_s"] for r in rounds[h]] for h in halves}
    summary: dict[str, Any] = {"benchmark": "torch_vit", "peer": args.peer, "batch": best}
    summary["images_per_s"] = {h: statistics.median(rates[h]) for h in halves}
    if not args.only:
        ratios = [a / b for a, b in zip(rates["ours"], rates["torch"], strict=True)]
        summary |= {"ratio": statistics.median(ratios), "ratios": ratios}
        print(
            f"ours / torch, images per second: {summary['ratio']:.3f} (rounds {min(ratios):.3f} to {max(ratios):.3f})"
        )
    pythons = {"ours": args.jax_python, "torch": args.torch_python}
    summary |= {
        "rounds": rounds,
        "settings": {k: v for k, v in vars(args).items() if k not in ("torch_half", "torch_python", "jax_python")},
        "versions": {h: versions(pythons[h]) for h in halves},
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/torch_vit.py", *argv]),
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
