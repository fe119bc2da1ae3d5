"""Compare forms of SwinV2's window attention by compiled memory and time, at the stages of SwinV2-G.

    python benchmarks/window_attention.py --batch=2 --repeats=5        # a laptop
    python benchmarks/window_attention.py --batch=64 --dtype=float16 --forms=folded,cudnn,plain,naive     # a GPU
    python benchmarks/window_attention.py --batch=64 --dtype=float16 --target=h100     # its memory, without the GPU

folded is ours: windows folded into heads, with one bias of position and mask shared by the batch. cudnn is the same
through cuDNN's kernel. plain has the windows in the batch dimension, as the reference implementations do, and a mask if
they are shifted. naive gives every window of every image its own copy of the bias, with an explicit softmax over fp32
logits. Each runs forward and backward from queries, keys and values in its own layout, after a check that all give the
same result. Prints temporary memory (the compiler's figure, without inputs and outputs), milliseconds (medians of
interleaved repetitions), their ratios to `folded`, and one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from visionfm_jax.errors import entry_point
from visionfm_jax.models.attention import attention
from visionfm_jax.models.backbones import swin_v2
from visionfm_jax.models.backbones.swin_v2 import Windows
from visionfm_jax.models.layers import l2_normalize
from visionfm_jax.parallel.targets import XLA_FLAGS, find_cluster
from visionfm_jax.planning.compiled import ASSEMBLER, COMPILE_ONLY_FLAGS, describe_devices

SIZE = swin_v2.SIZES["G"]
PATCH = 4
Arrays = list[jax.Array]


def folded(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, bias: jax.Array, mask: Any) -> jax.Array:
    """Ours, (B, T, windows, D)."""
    return swin_v2.folded_attention(q, k, v, scale, bias, mask, "xla")


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, bias: jax.Array, mask: Any) -> jax.Array:
    """Ours through cuDNN."""
    return swin_v2.folded_attention(q, k, v, scale, bias, mask, "cudnn")


def _heads(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array) -> Arrays:
    """(B * windows, T, D) to (B * windows, T, N, K), queries and keys as cosines."""
    N = len(scale)
    q, k, v = (rearrange(a, "b t (n k) -> b t n k", n=N) for a in (q, k, v))
    scale = jnp.exp(jnp.minimum(scale, swin_v2.MAX_SCALE))[:, None]
    return [(l2_normalize(q) * scale).astype(q.dtype), l2_normalize(k).astype(k.dtype), v]


def plain(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, bias: jax.Array, mask: Any) -> jax.Array:
    """Windows in the batch, (B * windows, T, D)."""
    q4, k4, v4 = _heads(q, k, v, scale)
    if mask is None:
        return attention(q4, k4, v4, "xla", bias=bias[None], scale=1.0).reshape(q.shape)
    masked = jnp.tile(mask[:, None] == 0, (len(q) // len(mask), 1, 1, 1))
    return jax.nn.dot_product_attention(q4, k4, v4, bias[None], masked, scale=1.0).reshape(q.shape)


def naive(q: jax.Array, k: jax.Array, v: jax.Array, scale: jax.Array, bias: jax.Array, mask: Any) -> jax.Array:
    """Windows in the batch, and the bias with them."""
    q4, k4, v4 = _heads(q, k, v, scale)
    whole = bias[None] if mask is None else jnp.tile(bias + mask[:, None], (len(q) // len(mask), 1, 1, 1))
    whole = jax.lax.optimization_barrier(jnp.broadcast_to(whole, (len(q), *bias.shape)))
    logits = jnp.einsum("bqnk,btnk->bnqt", q4, k4, preferred_element_type=jnp.float32) + whole
    weights = jax.nn.softmax(logits, -1).astype(v4.dtype)
    return jnp.einsum("bnqt,btnk->bqnk", weights, v4).reshape(q.shape)


FORMS: dict[str, Callable[..., jax.Array]] = {"folded": folded, "cudnn": cudnn, "plain": plain, "naive": naive}


def windows_in_batch(x: jax.Array) -> jax.Array:
    """(B, T, windows, D) to (B * windows, T, D)."""
    return rearrange(x, "b t w d -> (b w) t d")


def inputs(windows: Windows, stage: int, batch: int, dtype: str) -> Arrays:
    """Queries, keys, values and the result's cotangent (B, T, windows, D), scale (N,), bias (N, T, T)."""
    D, N, T = SIZE.width * 2**stage, SIZE.heads[stage], windows.tokens
    keys = jax.random.split(jax.random.key(stage), 5)
    maps = [jax.random.normal(key, (batch, T, windows.count, D)).astype(dtype) for key in keys[:4]]
    return [*maps, jnp.full(N, np.log(10.0)), 16 * jax.nn.sigmoid(jax.random.normal(keys[4], (N, T, T)))]


def both_ways(name: str, mask: Any) -> Callable[..., Any]:
    """One form's result and gradients; (q, k, v, cotangent, scale, bias)."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, scale: jax.Array, bias: jax.Array) -> Any:
        y, backward = jax.vjp(lambda *a: FORMS[name](*a, mask), q, k, v, scale, bias)
        return y, backward(g)

    return both


def laid_out(name: str, given: Arrays) -> Arrays:
    """The inputs as a form takes them."""
    return [*map(windows_in_batch, given[:4]), *given[4:]] if name in ("plain", "naive") else given


def compiled(name: str, shapes: Arrays, mask: Any, target: str) -> Any:
    """One form's program, for the device at hand or for the GPU `target`."""
    shapes = jax.eval_shape(lambda given: laid_out(name, given), shapes)
    if not target:
        return jax.jit(both_ways(name, mask)).lower(*shapes).compile()
    at = jax.sharding.SingleDeviceSharding(describe_devices(find_cluster(target))[0])
    shapes = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=at) for s in shapes]
    return jax.jit(both_ways(name, mask)).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[None]:
    """As `python -m visionfm_jax.plan` compiles: with its settings, and nothing that is ever run."""
    with tempfile.TemporaryDirectory() as folder:
        if target:
            Path(folder, "ptxas").write_text(ASSEMBLER)
            Path(folder, "ptxas").chmod(0o755)
            os.environ["XLA_FLAGS"] = " ".join([*XLA_FLAGS, *COMPILE_ONLY_FLAGS])
            jax.config.update("jax_platforms", "cpu")
            os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
        yield


def check(outputs: dict[str, Any], dtype: str) -> None:
    """All forms agree, in their results and in the gradients of queries, keys, values, scale and bias.

    Raises:
      SystemExit: they do not.
    """
    first = next(iter(outputs))
    for name, out in outputs.items():
        for a, b in zip(jax.tree.leaves(outputs[first]), jax.tree.leaves(out), strict=True):
            in_batch = name in ("plain", "naive") and first not in ("plain", "naive") and a.ndim == 4
            a = windows_in_batch(a) if in_batch else a
            error = float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max() / jnp.abs(a).max())
            if not error < (1e-4 if dtype == "float32" else 0.05):
                raise SystemExit(f"{name} differs from {first} by {error:.1e} of its largest value")


def measure(windows: Windows, stage: int, args: argparse.Namespace) -> dict[str, dict[str, float | None]]:
    """Per form: MiB of temporary memory, and milliseconds."""
    mask = swin_v2.shifted_window_mask(windows)
    shapes = jax.eval_shape(lambda: inputs(windows, stage, args.batch, args.dtype))
    programs = {name: compiled(name, shapes, mask, args.target) for name in args.forms}
    found = {n: {"mib": p.memory_analysis().temp_size_in_bytes / 2**20, "ms": None} for n, p in programs.items()}
    if not args.repeats or args.target:
        return found
    given = inputs(windows, stage, args.batch, args.dtype)
    check({name: program(*laid_out(name, given)) for name, program in programs.items()}, args.dtype)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(args.repeats):
        for name, program in programs.items():
            arrays = jax.block_until_ready(laid_out(name, given))
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        found[name]["ms"] = 1e3 * statistics.median(times)
    return found


def measure_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case, printed as it is known."""
    rows, first = [], args.forms[0]
    print(f"{'':24s}" + "".join(f"{name + ' MiB':>12s}{'ms':>9s}{'ratios':>14s}" for name in args.forms))
    for case in args.cases:
        pixels, window = map(int, case.split(":"))
        for stage in map(int, args.stages):
            side = pixels // PATCH // 2**stage
            for shifted in (False, True) if side > window else (False,):
                windows = swin_v2.windows_of((side, side), window, (0, 0), shifted)
                found = measure(windows, stage, args)
                rows.append({"pixels": pixels, "window": window, "stage": stage, "shifted": shifted, "forms": found})
                line = f"{pixels}/{window} stage {stage}{' shifted' if shifted else '':8s}"
                print(f"{line:24s}" + "".join(_cells(f, found[first]) for f in found.values()), flush=True)
    return rows


def words(text: str) -> list[str]:
    """A list of an argument, separated by commas."""
    return text.split(",")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2, help="batch size, images (%(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=5, help="timed repetitions per form; 0: memory only (%(default)s)"
    )
    kinds = ("float32", "bfloat16", "float16")
    parser.add_argument(
        "--dtype", choices=kinds, default="float32", help="dtype of queries, keys and values (%(default)s)"
    )
    forms = "folded,plain,naive"
    parser.add_argument(
        "--forms", type=words, default=forms, help="forms to compare, also cudnn; ratios are to the first (%(default)s)"
    )
    parser.add_argument("--cases", type=words, default="224:14,640:20", help="pixels:window (%(default)s)")
    needs = "compile for this GPU (h100, a100-80gb, …) without it; needs visionfm_jax[plan]"
    parser.add_argument("--target", default="", help=needs)
    parser.add_argument("--stages", type=words, default="0,1,2,3", help="stages, from 0 (%(default)s)")
    args = parser.parse_args()
    if unknown := set(args.forms) - set(FORMS):
        parser.error(f"--forms: no {', '.join(sorted(unknown))}; there is {', '.join(FORMS)}")
    with compiling_for(args.target):
        rows = measure_all(args)
    names = ("batch", "repeats", "dtype", "forms", "cases", "stages")
    summary: dict[str, Any] = {"benchmark": "window_attention", "rows": rows}
    summary |= {"settings": {name: getattr(args, name) for name in names}}
    summary |= {"compiled_for": args.target} if args.target else {"device": jax.devices()[0].device_kind}
    summary["versions"] = {"python": platform.python_version(), "jax": jax.__version__, "jaxlib": version("jaxlib")}
    print(json.dumps(summary | {"machine": platform.platform(), "date": datetime.date.today().isoformat()}))


def _cells(form: dict[str, Any], first: dict[str, Any]) -> str:
    ratios = f"{form['mib'] / first['mib']:.2f}x"
    if form["ms"] is None:
        return f"{form['mib']:12.1f}{'':9s}{ratios:>14s}"
    ratios += f" {form['ms'] / first['ms']:.2f}x"
    return f"{form['mib']:12.1f}{form['ms']:9.1f}{ratios:>14s}"


if __name__ == "__main__":
    sys.exit(entry_point(main)())
