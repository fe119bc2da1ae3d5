"""Settings of XLA, CUDA and NCCL for the training step on one's own cluster: each change timed beside the base.

    python benchmarks/flag_sweep.py --config=vit_huge --config.train.batch_size=128
    python benchmarks/flag_sweep.py --try=--xla_gpu_enable_pipelined_reduce_scatter=true --try=NCCL_NVLS_ENABLE=0 \\
        --launch='srun' --config=swinv2_g_clip

The base is what `launch/env.sh` sets. A change is what --try names: flags of XLA and variables of the environment
(NAME=VALUE), separated by spaces; without --try, each of those below. Each round times the base and all changes once,
by `visionfm bench`, forwards in one round and backwards in the next. A change that fails, or that XLA does not know, is
reported as such; of a round in which the base fails nothing counts. Prints a table: images per second over the base's
of the same round, median, least and greatest; the last line is JSON. Fields (--config.FIELD=VALUE) are those of
`visionfm bench`.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import shlex
import statistics
import sys
from typing import Any

from halves import HalfFailed, busy, end_by_signals, machine, run, say, time_limit, versions

from visionfm_jax.parallel.targets import XLA_FLAGS, pipelined

CHANGES = (  # with who sets it
    pipelined("reduce_scatter", importlib.metadata.version("jax")),  # MaxText
    "--xla_gpu_enable_while_loop_double_buffering=true",  # MaxText
    "--xla_gpu_enable_triton_gemm=false",  # MaxText
    "--xla_disable_hlo_passes=rematerialization",  # MaxText
    "--xla_gpu_enable_nccl_user_buffers=true NCCL_NVLS_ENABLE=1",  # JAX-Toolbox, where NVLink has SHARP (Hopper)
    "CUDA_DEVICE_MAX_CONNECTIONS=1",  # JAX-Toolbox before Blackwell, for which it advises against it
    *(f"--xla_gpu_{kind}_combine_threshold_bytes=67108864" for kind in ("all_gather", "reduce_scatter")),
)
VARIABLE = re.compile(r"[A-Za-z_]\w*=.*")


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Flags, and the words that are for `visionfm bench`."""
    p = argparse.ArgumentParser(
        description=__doc__,
        epilog="without --try:\n  " + "\n  ".join(CHANGES),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("--try", dest="changes", action="append", help="one change: flags of XLA, and NAME=VALUE; repeated")
    p.add_argument("--rounds", type=int, default=3, help="rounds (%(default)s)")
    p.add_argument("--launch", default="", help="command that starts the processes of a run, such as 'srun'")
    p.add_argument("--timeout", type=time_limit, default=1800.0, help="seconds per run (%(default)s)")
    p.add_argument("--config", required=True, help="configuration, as of `visionfm bench`")
    p.add_argument("--steps", type=int, default=20, help="steps to time in each run (%(default)s)")
    args, fields = p.parse_known_args(argv)
    args.peer, args.threads = "", 0  # `halves.run`: no cores of its own
    if strange := [word for word in fields if not re.match(r"--config\.[^=]+=", word)]:
        p.error(f"unknown flags {' '.join(strange)}: write fields as --config.FIELD=VALUE")
    args.changes = list(dict.fromkeys(args.changes or CHANGES))
    if args.rounds < 1:
        p.error(f"--rounds={args.rounds}: must be at least 1; raise it")
    for change in args.changes:
        try:
            words = shlex.split(change)
        except ValueError as error:
            p.error(f"--try={change}: {error}; close it")
        if not words:
            p.error(f"--try={change}: names no change; write flags of XLA (--xla…), or NAME=VALUE")
        if wrong := [w for w in words if not (w.startswith("--xla") or VARIABLE.fullmatch(w))]:
            p.error(f"--try={change}: {wrong[0]!r} is neither a flag of XLA (--xla…) nor NAME=VALUE; write it as one")
    return args, [f"--config={args.config}", f"--steps={args.steps}", *fields]


def command(change: str, launch: str, bench: list[str]) -> list[str]:
    """`visionfm bench` with the base's settings and those of `change`, of which XLA takes the last."""
    words = shlex.split(change)
    flags = [*XLA_FLAGS, *shlex.split(os.environ.get("XLA_FLAGS", "")), *(w for w in words if w.startswith("--"))]
    settings = [f"XLA_FLAGS={' '.join(flags)}", *(w for w in words if not w.startswith("--"))]
    return ["env", *settings, *shlex.split(launch), sys.executable, "-m", "visionfm_jax.bench", *bench]


def main(argv: list[str]) -> None:
    """Rounds, table, JSON."""
    args, bench = parse(argv)
    end_by_signals()
    names = ["base", *args.changes]
    commands = {name: command("" if name == "base" else name, args.launch, bench) for name in names}
    rounds: list[dict[str, dict[str, Any]]] = []
    failed: dict[str, str] = {}
    for i in range(args.rounds):
        rounds.append({})
        for name in names if i % 2 == 0 else names[::-1]:  # a drifting clock favours none
            if name in failed:
                continue
            try:
                result = rounds[i][name] = run(commands[name], args)
                remark = "" if args.launch else busy(result)  # a launcher's processes need not be its children
                say(f"round {i + 1}  {result['images_per_s']:10.2f} images/s  {name}{remark}")
            except HalfFailed as e:
                if name != "base":
                    failed[name] = str(e).splitlines()[-1]
                elif i == 0:
                    sys.exit(f"the base does not run:\n{e}")
                say(f"round {i + 1}  failed: {str(e).splitlines()[-1]}  {name}")
    complete = [r for r in rounds if "base" in r]
    base = [r["base"]["images_per_s"] for r in complete]
    print(f"base: {statistics.median(base):.2f} images/s ({min(base):.2f} to {max(base):.2f})")
    ratios: dict[str, list[float]] = {}
    for name in args.changes:
        if name in failed:
            print(f"failed                  {name}: {failed[name]}")
            continue
        own = ratios[name] = [r[name]["images_per_s"] / r["base"]["images_per_s"] for r in complete]
        print(f"{statistics.median(own):.3f} ({min(own):.3f} to {max(own):.3f})  {name}")
    summary = {
        "benchmark": "flag_sweep", "ratios": ratios, "failed": failed, "rounds": rounds, "base": list(XLA_FLAGS),
        "versions": versions(sys.executable), "machine": machine(), "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", "benchmarks/flag_sweep.py", *argv]),
    }  # fmt: skip
    print(json.dumps(summary))


if __name__ == "__main__":
    main(sys.argv[1:])
