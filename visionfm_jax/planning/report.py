"""A plan for people, as tables that fit a terminal, and for programs, as JSON."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from rich.console import Console
from rich.table import Table

from visionfm_jax.config import Config
from visionfm_jax.errors import count
from visionfm_jax.parallel.hlo import Collective
from visionfm_jax.parallel.targets import MEMORY_FRACTION, Cluster
from visionfm_jax.planning.calibration import ATTENTION, ELSE, MATMULS
from visionfm_jax.planning.compiled import CompiledStep
from visionfm_jax.planning.estimate import CollectiveTime, Estimate
from visionfm_jax.planning.rates import VERSION, rates_of
from visionfm_jax.planning.settings import Setting, setting_of

GIB = 2**30


def size(n: float) -> str:
    """Bytes, for people."""
    return f"{n / GIB:.2f} GiB" if n >= 0.1 * GIB else f"{n / 2**20:.2f} MiB"


def _table(title: str, *columns: str) -> Table:
    """A column whose name begins with a space holds words, as the first does; the last may be broken into lines."""
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(columns):
        words = i == 0 or column.startswith(" ")
        table.add_column(column.strip(), justify="left" if words else "right", no_wrap=i < len(columns) - 1)
    return table


def print_plan(console: Console, config: Config, found: Estimate) -> None:
    """The whole plan of one setting."""
    console.print(_heading(config, found.compiled, found.cluster), highlight=False)
    exchanged = [_collectives(found)] if found.collectives else []  # none on one GPU
    for table in (_parameters(found.compiled), _memory(found), *exchanged, _times(found)):
        console.print()
        console.print(table)


def print_without_gpus(
    console: Console, config: Config, compiled: CompiledStep, cluster: Cluster, missing: list[str]
) -> None:
    """What a compile for CPUs shows: everything that follows from shapes."""
    console.print(_heading(config, compiled, cluster), highlight=False)
    console.print(
        f"Compiled for CPUs, as {' and '.join(missing)} for GPUs are not installed: "
        "pip install 'visionfm_jax\\[plan]'. This cannot show peak memory, the step's time, or what collectives cost.",
        highlight=False,
    )
    memory = _table("Memory of one GPU, without activations", "", "")
    for kind, held in compiled.held.items():
        memory.add_row(kind, size(held))
    step = _table("One step", "", "")
    step.add_row("model FLOPs of all GPUs", f"{compiled.step_flops:.4g}")
    least = compiled.step_flops / (cluster.devices * cluster.target.peak_flops * rates_of(cluster.target).matmuls)
    step.add_row("time, at the very least", f"{least * 1e3:.1f} ms")
    for table in (_parameters(compiled), memory, step):
        console.print()
        console.print(table)


def _heading(config: Config, compiled: CompiledStep, cluster: Cluster) -> str:
    target, hosts = cluster.target, count(cluster.hosts, "host")
    card = target.description if target.name in target.description else f"{target.description} ({target.name})"
    return (
        f"[bold]{config.name}[/] on {cluster.devices} x {card}, {hosts}: "
        f"{sum(compiled.parameters.values()):,} parameters, global batch {compiled.batch_size}\n"
        + " ".join(f"{name}={value}" for name, value in settings_of(config).items())
    )


def settings_of(config: Config) -> dict[str, int | str]:
    """The fields of a run that change its time and memory, and not its model or task."""
    fp8 = {f"{name}.mlp_matmuls": network.mlp_matmuls for name, network in config.model.networks().items()}
    return {"train.precision": config.train.precision} | setting_of(config).fields | fp8


def _parameters(compiled: CompiledStep) -> Table:
    table = _table("Parameters", "", "millions", "share")
    total = sum(compiled.parameters.values())
    for part, number in compiled.parameters.items():
        table.add_row(part, f"{number / 1e6:,.2f}", f"{number / total:.1%}")
    return table


def _memory(found: Estimate) -> Table:
    table = _table("Memory of one GPU at the peak", "", "", "of the card")
    card = found.cluster.target.memory_bytes
    for kind, held in found.memory.items():
        table.add_row(kind, size(held), f"{held / card:.1%}")
    table.add_section()
    table.add_row("peak", size(found.compiled.peak), f"{found.compiled.peak / card:.1%}")
    table.add_row("usable", size(found.usable), f"{MEMORY_FRACTION:.0%}")
    table.add_row("[green]it fits[/]" if found.fits else "[red]it does not fit[/]")
    table.add_section()
    table.add_row("host memory for a checkpoint", size(found.compiled.checkpoint_host_bytes), "")
    return table


def _collectives(found: Estimate) -> Table:
    table = _table(
        "Collectives of one step (MB and ms each, waits in ms of all)",
        "", " ", " in", " to", "times", "MB", "ms", "waits", " runs beside",
    )  # fmt: skip
    for alike in of_weight(found.collectives):
        e, c = alike[0], alike[0].collective
        times, waits = sum(a.collective.count for a in alike), sum(a.exposed * a.collective.count for a in alike)
        table.add_row(
            c.kind, dtype_of(e), when(c), "hosts" if e.crosses_hosts else "host", str(times), f"{c.nbytes / 1e6:.3g}",
            f"{e.seconds * 1e3:.2f}", f"{waits * 1e3:.2f}", beside(e),
        )  # fmt: skip
    return table


def beside(timed: CollectiveTime) -> str:
    """What runs meanwhile, most of the time."""
    if not timed.collective.is_async:
        return "nothing: synchronous"
    label = timed.beside.most_common(1)[0][0] if timed.beside else ""
    return "/".join(label.split("/")[-2:])


def when(collective: Collective) -> str:
    """In which part of the step a collective happens."""
    source = collective.source.partition(":")[0]  # of several joined, the first
    if "jvp(" not in source:
        return "update"
    backward = "transpose(" in source or "rematted_computation" in source
    return "backward" if backward else "forward"


def of_weight(collectives: list[CollectiveTime]) -> list[list[CollectiveTime]]:
    """Those that matter for people, with at least 1 % of all bytes; what is alike, as of many layers, together."""
    groups: dict[tuple, list[CollectiveTime]] = {}
    for e in collectives:
        c = e.collective
        groups.setdefault((c.kind, dtype_of(e), when(c), c.group, c.nbytes, beside(e)), []).append(e)
    moved = [sum(e.collective.nbytes * e.collective.count for e in alike) for alike in groups.values()]
    return [alike for alike, size in zip(groups.values(), moved, strict=True) if size >= 0.01 * sum(moved)]


def dtype_of(timed: CollectiveTime) -> str:
    """The type of most of its bytes."""
    return max(timed.collective.arrays, key=lambda array: array.nbytes).dtype


def _times(found: Estimate) -> Table:
    compiled, cluster = found.compiled, found.cluster
    table = _table("Estimated step", "", "", " ")
    executed = found.executed_flops * cluster.devices

    def row(what: str, value: str, remark: str = "") -> None:
        table.add_row(what, value, remark)

    for kind in (MATMULS, ATTENTION, ELSE):
        if found.traffic_by_kind[kind]:
            moved = f"{found.traffic_by_kind[kind] / 1e9:,.4g} GB to and from memory"
            row(kind, f"{found.seconds_by_kind[kind] * 1e3:.1f} ms", moved)
    row("exposed communication", f"{found.exposed * 1e3:.1f} ms", f"of {found.network * 1e3:.1f} ms that it is busy")
    table.add_section()
    low, high = found.range
    row("step", f"{found.seconds * 1e3:.1f} ms", f"between {low * 1e3:.4g} and {high * 1e3:.4g} ms")
    row("", "", found.calibration.source)
    row("images/s", f"{found.images_per_s:,.0f}", f"{found.images_per_s / cluster.devices:,.1f} per GPU")
    row("model FLOPs", f"{compiled.step_flops:.4g}", f"executed {executed / compiled.step_flops:.2f} times that")
    row("MFU", f"{found.mfu:.1%}", f"of {cluster.target.peak_flops / 1e12:,.0f} TFLOP/s per GPU")
    table.add_section()
    row("steps", f"{compiled.total_steps:,}", "the whole run")
    for what, expected, digits in (("days", found.days, 1), ("GPU-hours", found.gpu_hours, 0)):
        least, most = (expected * seconds / found.seconds for seconds in found.range)
        row(what, f"{expected:,.{digits}f}", f"between {least:,.{digits}f} and {most:,.{digits}f}")
    return table


def print_settings(console: Console, title: str, base: Setting, found: list[tuple[Setting, Estimate]]) -> None:
    """Settings beside each other, with the words that choose them."""
    table = _table(title, "step ms", "images/s", "MFU", "peak", "waits", " set")
    for setting, e in found:
        table.add_row(
            f"{e.seconds * 1e3:.1f}", f"{e.images_per_s:,.0f}", f"{e.mfu:.1%}", size(e.compiled.peak),
            f"{e.exposed * 1e3:.1f}", setting.flags(base) or "as it is",
        )  # fmt: skip
    console.print()
    console.print(table)


def as_json(config: Config, found: Estimate) -> dict[str, Any]:
    """The plan for programs; the keys are explained in docs/plan.md."""
    compiled, cluster = found.compiled, found.cluster
    return {
        **head(config, compiled, cluster),
        "per_gpu": {
            **{f"{kind.replace(' ', '_')}_bytes": held for kind, held in found.memory.items()},
            "peak_bytes": compiled.peak,
            "usable_bytes": found.usable,
            "card_bytes": cluster.target.memory_bytes,
            "fits": found.fits,
            "checkpoint_host_bytes": compiled.checkpoint_host_bytes,
        },
        "collectives": [
            {
                "kind": e.collective.kind,
                "dtype": dtype_of(e),
                "count": e.collective.count,
                "bytes": e.collective.nbytes,
                "wire_bytes": e.collective.wire_bytes,
                "group_size": len(e.collective.group),
                "crosses_hosts": e.crosses_hosts,
                "async": e.collective.is_async,
                "seconds": e.seconds,
                "exposed_seconds": e.exposed,
                "beside": dict(e.beside.most_common(3)),
                "source": e.collective.source,
            }
            for e in found.collectives
        ],
        "step": {
            "model_flops": compiled.step_flops,
            "executed_flops": found.executed_flops * cluster.devices,
            "memory_traffic_bytes": found.traffic,
            "memory_traffic_bytes_by_kind": found.traffic_by_kind,
            "matmul_seconds": found.seconds_by_kind[MATMULS],
            "attention_seconds": found.seconds_by_kind[ATTENTION],
            "other_seconds": found.seconds_by_kind[ELSE],
            "network_seconds": found.network,
            "exposed_seconds": found.exposed,
            "seconds": found.seconds,
            "seconds_range": found.range,
            "calibration": found.calibration.source,
            "images_per_s": found.images_per_s,
            "mfu": found.mfu,
        },
        "run": {"steps": compiled.total_steps, "days": found.days, "gpu_hours": found.gpu_hours},
    }


def head(config: Config, compiled: CompiledStep, cluster: Cluster) -> dict[str, Any]:
    """What every plan has, whatever it was compiled for."""
    return {
        "config": config.name,
        "cluster": cluster.name,
        "settings": settings_of(config),
        "versions": {"jax": version("jax"), "rates": VERSION},
        "compiled_for": compiled.platform,
        "batch_size": compiled.batch_size,
        "parameters": {**compiled.parameters, "total": sum(compiled.parameters.values())},
    }


def json_without_gpus(config: Config, compiled: CompiledStep, cluster: Cluster) -> dict[str, Any]:
    """As `as_json`, with null for what a compile for CPUs cannot show."""
    sizes = {f"{kind.replace(' ', '_')}_bytes": held for kind, held in compiled.held.items()}
    return {
        **head(config, compiled, cluster),
        "per_gpu": {**sizes, "peak_bytes": None, "card_bytes": cluster.target.memory_bytes, "fits": None},
        "collectives": None,
        "step": {"model_flops": compiled.step_flops, "seconds": None},
        "run": {"steps": compiled.total_steps, "days": None, "gpu_hours": None},
    }


def setting_json(setting: Setting, base: Setting, found: Estimate) -> dict[str, Any]:
    """A row of `print_settings`."""
    return {
        "stage": setting.stage,
        "replicas": setting.replicas,
        "accumulate": setting.accumulate,
        "remat": dict(zip(setting.networks, setting.remat, strict=True)),
        "attention": dict(zip(setting.networks, setting.attention, strict=True)),
        "scan_layers": dict(zip(setting.networks, setting.scan_layers, strict=True)),
        "flags": setting.flags(base),
        "seconds": found.seconds,
        "seconds_range": found.range,
        "images_per_s": found.images_per_s,
        "mfu": found.mfu,
        "peak_bytes": found.compiled.peak,
    }
