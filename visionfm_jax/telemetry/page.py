"""A run, or several side by side, as one HTML page that needs no other file, no script and no network."""

from __future__ import annotations

import base64
import collections
import datetime
import html
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionfm_jax.errors import complain, count, one_line, printable, shortened
from visionfm_jax.parallel.targets import find_target
from visionfm_jax.storage import write_text
from visionfm_jax.telemetry.curves import Curve, Mark, chart, series
from visionfm_jax.telemetry.facts import CORE, PLAN, Facts, Measured, Spike, flat, utc
from visionfm_jax.telemetry.pictures import KINDS
from visionfm_jax.telemetry.report import PARTS
from visionfm_jax.train.spikes import SPIKE

FILE = "report.html"
MARKS = 60  # of a kind in a panel
ROWS = 14  # evaluations, or spikes, in a table
NAMES = 50  # of damaged records of a source
CLASSES = 200  # in a table
PANELS = 30  # of a section; the others are folded up
PNG = b"\x89PNG\r\n\x1a\n"
# Of what the loop logs, what has a panel of its own or is in a table; the rest is drawn as "other metrics".
SPEED = ("images_per_s", "tflops_per_device", "mfu", "data_wait")
MEMORY = {"device_memory_gib": "in use", "device_memory_peak_gib": "peak"}
KNOWN = {"step", "loss", *PARTS, "lr", "grad_norm", "skipped_steps", *SPEED, *MEMORY}
MARKED = {"restart": "restart", "spike": SPIKE, "skipped": "skipped step", "changed": "change of settings"}  # by style
LOSSES = ("loss", "error", "perplexity")  # in the names of metrics that are no scores

STYLE = """
:root{color-scheme:light dark;--ink:#1f2937;--soft:#5b6472;--line:#d9dde3;--paper:#fff;--card:#f6f7f9;
--c0:#0072b2;--c1:#c77700;--c2:#00795a;--c3:#d55e00;--c4:#b0528c;--c5:#6b7280;--c6:#2a9fd6;--c7:#8a6d00}
@media (prefers-color-scheme:dark){:root{--ink:#e5e7eb;--soft:#a3abb8;--line:#3a4250;--paper:#12161c;--card:#1b212a;
--c0:#56b4e9;--c1:#e69f00;--c2:#2fc79a;--c3:#ff8652;--c4:#e29ac6;--c5:#a3abb8;--c6:#9bd4f5;--c7:#f0e442}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:1320px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;margin:.2em 0}h2{font-size:1.15rem;margin:2em 0 .6em;border-bottom:1px solid var(--line)}
h3{font-size:.95rem;margin:0 0 .3em}small,.soft{color:var(--soft);font-weight:normal;font-size:.85rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:12px}
.tables{display:flex;flex-wrap:wrap;gap:0 28px;align-items:flex-start}.tables>*{max-width:100%}
figure{margin:0}.chart,.fact{background:var(--card);border-radius:8px;padding:10px}
.chart{max-width:560px}.chart svg{display:block;width:100%;height:auto}
svg text{font:11px system-ui,sans-serif;fill:var(--soft)}svg path{fill:none;stroke-width:1.7}
svg .pale{opacity:.35;stroke-width:1}svg .grid{stroke:var(--line)}svg .lost{fill:var(--c3);font-size:14px}
svg .mark{stroke-width:1.4}figcaption{font-size:.82rem;color:var(--soft)}
figcaption span{display:inline-block;margin-right:12px}figcaption b{color:var(--ink);font-weight:600}
i{display:inline-block;width:14px;height:4px;margin-right:5px;vertical-align:middle;border-radius:2px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,170px),1fr));gap:10px;margin:12px 0}
.fact b{display:block;font-size:1.15rem}.fact span{color:var(--soft);font-size:.82rem}
.scroll{overflow-x:auto;margin:.4em 0 1em}table{border-collapse:collapse;font-size:.88rem}
caption{text-align:left;font-weight:600;padding:2px 0}
th,td{text-align:left;padding:3px 12px 3px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{color:var(--soft);font-weight:600}.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
td,th{overflow-wrap:break-word;max-width:34em}.w{min-width:15em}
th:first-child,td:first-child{position:sticky;left:0;background:var(--paper)}
img{max-width:100%;height:auto;background:#fff;border-radius:6px;margin:10px 0 0}
details{margin:.5em 0}summary{cursor:pointer;color:var(--soft)}.warn{border-left:4px solid var(--c3);padding-left:10px}
""" + "".join(
    f".k{i}{{--c:var(--c{i})}}path.k{i}{{stroke:var(--c{i})}}circle.k{i}{{fill:var(--c{i})}}i.k{i}{{background:var(--c{i})}}"
    for i in range(8)
) + "".join(
    f".mark.{kind}{{stroke:var(--c{i});stroke-dasharray:{dash}}}i.{kind}{{background:var(--c{i})}}"
    for kind, i, dash in (("restart", 5, "4 3"), ("spike", 3, "2 2"), ("skipped", 4, "6 2"), ("changed", 7, "8 4"))
)  # fmt: skip


def write_page(folders: Sequence[Path], path: Path) -> Path:
    """Write the page of one run, or of several side by side.

    Raises:
      ConfigError: a folder holds no run.
      UserError: a folder has links in it.
      OSError: `path` cannot be written.
    """
    runs = [Facts(folder) for folder in folders]
    write_text(path, one_run(runs[0]) if len(runs) == 1 else several_runs(runs))
    return path


def leave_page(folder: Path) -> str:
    """Write FOLDER/report.html; where it lies, for people. A failure is one line on stderr, and "" here."""
    try:
        return f"  {write_page([folder], folder / FILE)}"
    except Exception as error:  # whatever it is, it must not cost a run that has just been trained
        complain(f"{folder / FILE} is not written: {type(error).__name__}: {one_line(error)}")
        return ""


def one_run(run: Facts) -> str:
    """The page of a run."""
    body = [
        f"<h1>{_e(run.name)}</h1>",
        f'<p class="soft">{_e(run.state)}{_e(_best(run))}</p>',
        _cards(run),
        section("Newest scores", _scores([run], [""])),
        section("Training", _panels(_training(run)), _left_out(run)),
        section("Spikes and skipped steps", _spikes(run)),
        section("Speed and memory", _panels(_speed(run)), _tables(*_resources(run))),
        section("Planned against measured", _planned(run)),
        section("Data", _tables(*_data(run))),
        *(_evaluation(run, name) for name in run.evals),
        section("Results of visionfm evaluate", _apart(run)),
        section("Other pictures", _details("show", _images(run, _other_pictures(run)))),
        section("Origin", _tables(*_origin(run))),
        section("Configuration", _configuration(run)),
        section("Configuration changes", table(["until step", "setting: old -> new"], _changes(run), "n")),
        section("Software and sessions", _tables(*_software(run))),
    ]
    return _page(run.name, body, [run])


def several_runs(runs: Sequence[Facts]) -> str:
    """The page that compares runs."""
    names = _distinct([run.name for run in runs], [str(run.folder) for run in runs])
    compared = [{**_facts(run), **_happened(run), **_memory(run), **_counts(run)} for run in runs]
    rows = [
        ["", *names],
        ["folder", *(str(run.folder) for run in runs)],
        ["state", *(run.state for run in runs)],
        *([what, *(facts.get(what, "") for facts in compared)] for what in _all(compared)),
    ]
    body = [
        f"<h1>{_e(count(len(runs), 'run'))} side by side</h1>",
        table(rows[0], rows[1:]),
        section("Newest scores", _scores(runs, names)),
        section("Curves", _panels(_overlaid(runs, names))),
        section("Settings in which they differ", _differing(runs, names)),
        section("Versions in which they differ", _differing_versions(runs, names)),
        *(
            section(f"Configuration changes: {name}", table(["until step", "setting: old -> new"], _changes(run), "n"))
            for name, run in zip(names, runs, strict=True)
        ),
        *(section(f"Planned against measured: {n}", _plan(r)) for n, r in zip(names, runs, strict=True) if r.plan),
    ]
    return _page(" · ".join(names), body, runs)


def _page(title: str, body: Iterable[str], runs: Sequence[Facts]) -> str:
    """With what could not be read, as reading is over by now."""
    parts = list(body)
    damaged = [f"{run.folder}: {what}" for run in runs for what in dict.fromkeys(run.damaged)]
    warning = f'<p class="warn">Left out, as it cannot be read: {_e("; ".join(damaged))}</p>' if damaged else ""
    return document(title, [warning, *parts])


def document(title: str, body: Iterable[str]) -> str:
    """A whole page of the parts of `body`, which are HTML."""
    now = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="minutes")
    text = "\n".join(filter(None, body))
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"/>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"/>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>\n'
        f"<title>{_e(title)}</title>\n<style>{STYLE}</style></head>\n<body><main>\n{text}\n"
        f'<p class="soft">Made by visionfm_jax, {_e(now.removesuffix("+00:00"))} UTC.</p>\n</main></body></html>\n'
    )


def _best(run: Facts) -> str:
    checkpoint = run.config.get("checkpoint")
    key = str(checkpoint.get("best_metric")) if _is_dict(checkpoint) else ""
    values = [(row[key], row["step"]) for row in run.rows if math.isfinite(row.get(key, math.nan))]
    if len(values) < 2:
        return ""
    value, step = max(values)
    return f" · best {key} {value:.4g}, after step {step:,.0f}"


def _cards(run: Facts) -> str:
    cards = "".join(f'<div class="fact"><span>{_e(k)}</span><b>{_e(v)}</b></div>' for k, v in _facts(run).items())
    return f'<div class="facts">{cards}</div>'


def _facts(run: Facts) -> dict[str, str]:
    """What the page begins with."""
    out = {"steps": f"{run.steps:,}" + (f" of {run.total:,}" if run.total else "")}
    losses = [row["loss"] for row in run.rows if "loss" in row]
    if losses:
        out["training loss"] = f"{losses[-1]:.4g}"
    if parameters := next((s["parameters"] for s in run.sessions if type(s.get("parameters")) is int), 0):
        out["parameters"] = f"{parameters:,}"
    if run.sessions:
        last = run.sessions[-1]
        out["devices"] = f"{last.get('devices')} x {last.get('device')}"
        if isinstance(kinds := last.get("attention"), dict):
            out["attention"] = ", ".join(sorted({str(kind) for kind in kinds.values()}))
    if speeds := _values(run, "images_per_s"):
        out["images/s, median"] = f"{np.median(speeds):,.4g}"
    if mfu := _values(run, "mfu"):
        out["MFU, median"] = f"{np.median(mfu):.1%}"
    if waits := _values(run, "data_wait"):
        out["waiting for data, mean"] = f"{np.mean(waits):.1%}"
    if run.sessions:
        first = run.sessions[0].get("first")  # later ones begin where a release that kept no sessions has ended
        since = f", from step {first:,}" if type(first) is int and first else ""
        out[f"time of the sessions{since}"] = _least(run) + _duration(sum(run.session_hours()))
    if run.hours:
        out["time of training steps"] = _duration(run.hours)
    if found := run.device_hours():
        out[_device_hours(found[1])] = f"{_least(run)}{found[0]:,.4g}"
    if energy := run.energy():
        out["energy, estimated"] = f"{_least(run)}{energy[0]:,.4g} kWh"
    return out


def _device_hours(kind: str) -> str:
    """What the hours of the devices are called."""
    return "CPU core hours" if kind == CORE else f"GPU-hours ({kind})"


def _least(run: Facts) -> str:
    """Before a number that leaves out what sessions without an end did after their last sign of life."""
    return "at least " if run.unended else ""


def _happened(run: Facts) -> dict[str, str]:
    """How often something marked happened."""
    skipped = [int(row["skipped_steps"]) for row in run.rows if math.isfinite(row.get("skipped_steps", math.nan))]
    counts = {
        "restarts": len(run.sessions) - 1, "spikes of the gradient norm": sum(s.kind == SPIKE for s in run.spikes),
        "steps without an update": max(skipped, default=0), "configuration changes": len(run.changed),
    }  # fmt: skip
    return {what: f"{max(number, 0):,}" for what, number in counts.items()}


def _training(run: Facts) -> list[str]:
    marks = _marks(run)
    rows = [row for row in run.rows if "loss" in row]
    keys = _all(rows)
    parts = [part for part in PARTS if part in keys]
    ratios = [key for key in keys if key.startswith("update_ratio/")]
    accuracies = [key for key in keys if "accuracy" in key and key not in KNOWN]
    others = [k for k in keys if k not in KNOWN and k not in ratios and k not in accuracies]
    scale = [series(rows, key, key.removeprefix("update_ratio/")) for key in ratios]
    return [
        chart("training loss", [series(rows, "loss")], log=None, marks=marks),
        chart("parts of the loss", [series(rows, key) for key in parts], log=None, marks=marks),
        chart("accuracy on training batches", [series(rows, key) for key in accuracies], marks=marks),
        chart("learning rate", [series(rows, "lr")], marks=marks),
        chart("gradient norm", [series(rows, "grad_norm")], log=None, marks=marks),
        *(chart("size of updates / size of weights", scale[i : i + 8], log=True) for i in range(0, len(scale), 8)),
        *(chart(key, [series(rows, key)], log=None, marks=marks) for key in others),
    ]


def _marks(run: Facts, most: int | None = MARKS) -> list[Mark]:
    """Restarts, spikes, skipped steps and changed settings; of each kind the newest `most`."""
    marks = [
        Mark(s["first"], "restart", f"started again at step {s['first']:,}")
        for s in run.sessions[1:]
        if type(s.get("first")) is int
    ]
    marks += [
        Mark(spike.step, "spike" if spike.kind == SPIKE else "skipped", f"step {spike.step:,}: {spike.kind}")
        for spike in run.spikes
    ]
    marks += [Mark(step, "skipped", f"until step {step:,}: {n:,} skipped") for step, n in run.skips()]
    marks += [Mark(step, "changed", "settings changed here") for step in dict.fromkeys(s for s, _ in run.changed)]
    marks = sorted(marks, key=lambda mark: mark.step)
    kinds = {kind: [mark for mark in marks if mark.kind == kind] for kind in MARKED}
    return [mark for kind in kinds.values() for mark in kind[-(most or len(kind)) :]]


def _left_out(run: Facts) -> str:
    """Which marks are too many to be drawn."""
    kinds = collections.Counter(mark.kind for mark in _marks(run, None))
    cut = [f"{MARKS} of {count(n, MARKED[kind])}" for kind, n in kinds.items() if n > MARKS]
    return f'<p class="soft">Marked are the newest {_e(", ".join(cut))}.</p>' if cut else ""


def _spikes(run: Facts) -> str:
    """A table, as the texts of marks cannot be read on a phone."""
    rows = [[s.step, f"{s.step:,}", s.kind, _norm(s), s.tensor, s] for s in run.spikes]
    rows += [[step, f"until {step:,}", f"{n:,} skipped", "", "", None] for step, n in run.skips()]
    newest = sorted(rows, key=lambda row: row[0])[-ROWS:]
    shown = [[*row[1:-1], ", ".join(run.samples_of(row[-1])) if row[-1] else ""] for row in reversed(newest)]
    head = ["step", "kind", "gradient norm", "tensor", "samples of the largest loss"]
    left = f'<p class="soft">The newest {ROWS} of {len(rows):,}.</p>' if len(rows) > ROWS else ""
    replay = '<p class="soft">visionfm replay --step=N runs such a step again.</p>' if run.spikes else ""
    return table(head, shown, "n---w") + left + (replay if shown else "")


def _norm(spike: Spike) -> str:
    """Of the gradient, beside the usual one."""
    share = spike.norm / spike.usual if spike.usual > 0 else math.nan
    return _short(spike.norm) + (f", {share:,.3g} times the usual" if math.isfinite(share) else "")


def _speed(run: Facts) -> list[str]:
    rows = [row for row in run.rows if "images_per_s" in row]
    marks = [m for m in _marks(run) if m.kind == "restart"]
    return [
        chart("images per second", [series(rows, "images_per_s")], marks=marks),
        chart("share of the time that a step waits for data", [series(rows, "data_wait")], marks=marks),
        chart("MFU", [series(rows, "mfu")], marks=marks)
        or chart("TFLOP/s of a device", [series(rows, "tflops_per_device")], marks=marks),
        chart("memory of a device, GiB", [series(rows, key, name) for key, name in MEMORY.items()], marks=marks),
    ]


def _memory(run: Facts) -> dict[str, str]:
    """At the peaks of all sessions."""
    sizes = {
        "peak memory of a device": [*_measured_memory(run)],
        "peak memory of a process": [s["host_memory_bytes"] for s in run.sessions if _is_size(s, "host_memory_bytes")],
    }
    return {what: _gib(max(found)) for what, found in sizes.items() if found}


def _measured_memory(run: Facts) -> Iterator[float]:
    """Bytes of a device at the peak: of sessions that ended, and of lines of metrics."""
    yield from (s["device_memory_bytes"] for s in run.sessions if _is_size(s, "device_memory_bytes"))
    yield from (size * 2**30 for size in _values(run, "device_memory_peak_gib"))


def _resources(run: Facts) -> list[str]:
    """Memory, GPU-hours and energy."""
    rows = [[what, value] for what, value in _memory(run).items()]
    notes = []
    if run.unended:
        notes.append(
            f"Of {count(len(run.sessions), 'session')}, {run.unended:,} without an end (killed, or still running) "
            "are counted until the last sign of life, which comes every ten minutes."
        )
    if energy := run.energy():
        hours, kind = run.device_hours() or (0.0, "")
        notes.append(
            f"Energy: {_least(run)}{hours:,.4g} {_device_hours(kind)} at the thermal design power of {energy[1]:,.0f} "
            f"W, as if it were drawn all the time: {energy[0]:,.4g} kWh. Hosts, network and cooling are not in it."
        )
    return [table(["memory", ""], rows, "-n"), *(f'<p class="soft">{_e(note)}</p>' for note in notes)]


def _counts(run: Facts) -> dict[str, str]:
    """Samples and captions, and what was wrong with them."""
    out = {}
    if run.samples:
        step, seen, damaged = run.samples
        share = f" ({damaged / seen:.3%})" if damaged else ""
        out["samples seen"] = f"{seen:,} until step {step:,}"
        out["damaged, and replaced by others"] = f"{damaged:,}{share}"
    read, cut = run.captions
    if read:
        out["captions cut to the length of the text tower (first process)"] = f"{cut:,} of {read:,} ({cut / read:.2%})"
    return out


def _data(run: Facts) -> list[str]:
    """Where the training data came from, how much of it was used, and what was damaged."""
    named = "".join(
        _details(
            f"{count(len(names), 'damaged record')} of {source}",
            f"<p>{_e(', '.join(names[:NAMES]) + ', …' * (len(names) > NAMES))}</p>",
        )
        for source, names in run.damaged_records.items()
    )
    return [
        table(["data", ""], [[what, value] for what, value in _counts(run).items()], "-n"),
        named and f"<div>{named}</div>",
    ]


def _planned(run: Facts) -> str:
    if run.plan:
        return _plan(run)
    command = f"visionfm plan --config={run.folder} --cluster=h100:1x8 --json={run.folder / PLAN}"
    return f'<p class="soft">There is no {PLAN}. Make it for the cluster that you have: {_e(command)}</p>'


def _plan(run: Facts) -> str:
    """A table; first what the plan and the run do not have in common."""
    step, gpu, whole = (found if _is_dict(found := run.plan.get(k)) else {} for k in ("step", "per_gpu", "run"))
    speeds, hours = _values(run, "images_per_s"), run.device_hours()
    trained = found if _is_dict(found := run.config.get("train")) else {}
    on_gpus = hours and hours[1] != CORE
    cluster = re.fullmatch(r"(.+):(\d{1,6})x(\d{1,6})", str(run.plan.get("cluster", "")))
    planned = f"{int(cluster[2]) * int(cluster[3])} x {cluster[1]}" if cluster else ""
    used = ""
    for session in run.sessions[-1:]:
        target = find_target(kind := str(session.get("device")))
        used = f"{session.get('devices')} x {target.name if target else kind}"
    same = [
        ["configuration", str(run.plan.get("config", "")), run.name],
        ["batch size", _short(run.plan.get("batch_size")), _short(trained.get("batch_size"))],
        ["devices", planned, used],
    ]
    other = [what for what, one, two in same if one and two and one != two]
    rows = [
        *same,
        ["images/s", _short(step.get("images_per_s")), _short(float(np.median(speeds))) if speeds else ""],
        ["MFU", _percent(step.get("mfu")), _percent(float(np.median(mfu))) if (mfu := _values(run, "mfu")) else ""],
        ["peak memory of a device", _gib(gpu.get("peak_bytes")), _gib(max(_measured_memory(run), default=None))],
        ["GPU-hours", _short(whole.get("gpu_hours")), _least(run) + _short(hours[0]) if on_gpus else ""],
    ]
    warning = f"The plan is not of this run: {' and '.join(other)} differ{'s' * (len(other) == 1)}."
    note = f'<p class="warn">{_e(warning)}</p>' if other else ""
    return note + table(["", "planned", "measured"], rows, "-nn")


def _evaluation(run: Facts, name: str) -> str:
    """A section: curves, numbers over the steps, per class, pictures."""
    details, prefix = run.evals[name], f"{name}/"
    rows = [row for row in run.rows if "loss" not in row and any(key.startswith(prefix) for key in row)]
    keys = [key for key in _all(rows) if key.startswith(prefix)]
    curves = {key: series(rows, key, key.removeprefix(prefix)) for key in keys}
    moving = {k: c for k, c in curves.items() if len(c.values) > 1}
    shares = [c for c in moving.values() if _is_share(c)]
    others = [c for c in moving.values() if not _is_share(c) and np.ptp(c.values[np.isfinite(c.values)] if
              np.isfinite(c.values).any() else [0]) > 0]  # fmt: skip
    best_first = sorted(shares, key=lambda c: -c.values[-1])
    panels = [chart("scores", best_first[i : i + 8], marks=[]) for i in range(0, len(best_first), 8)]
    panels += [chart(c.name, [c], log=None) for c in others]
    shown = rows if len(rows) <= ROWS else [rows[i] for i in np.linspace(0, len(rows) - 1, ROWS).astype(int)]
    scores = table(
        ["step", *(k.removeprefix(prefix) for k in keys)],
        [[f"{row['step']:,.0f}", *(_short(row.get(key)) for key in keys)] for row in reversed(shown)],
        "n" * (len(keys) + 1),
    )
    left = (
        f'<p class="soft">{len(shown)} of {len(rows):,} evaluations are listed.</p>' if len(shown) < len(rows) else ""
    )
    protocol = f" <small>protocol {_e(found)}</small>" if (found := run.measured[name].protocol) else ""
    of = [f"step {details['step']:,}"] if type(details.get("step")) is int else []
    of += [f"protocol {details['protocol']}"] if details.get("protocol") else []
    of = f" ({', '.join(of)})" if of else ""
    settings = [[k, v] for k, v in flat(details.get("settings", {})).items() if k]
    mine = [path for path in run.pictures() if path.stem in {f"{kind}_{name}" for kind in KINDS}]
    return section(
        f"Evaluation: {name}",
        _panels(panels), scores, left,
        f'<p class="soft">Pictures{_e(of)}</p>' if mine and of else "", _images(run, mine),
        _details(f"per class{of}", _classes(details.get("classes"))),
        _details(f"settings of its protocol{of}", table(["setting", ""], settings)),
        more=protocol,
    )  # fmt: skip


def _classes(classes: Any) -> str:
    if not isinstance(classes, list) or not all(map(_is_dict, classes)) or not classes:
        return ""
    keys = _all(classes)
    rows = [[_short(row.get(key)) for key in keys] for row in classes[:CLASSES]]
    left = f'<p class="soft">{CLASSES} of {len(classes):,}</p>' if len(classes) > CLASSES else ""
    return table(keys, rows, "-" + "n" * (len(keys) - 1)) + left


def _apart(run: Facts) -> str:
    rows = []
    for found in reversed(run.evaluations[-ROWS:]):
        scores = [f"{k} {_short(v)}" for k, v in found.items() if "/" in k]
        protocols = flat(found.get("protocols", {}))
        said = ", ".join(f"{k} {v}" for k, v in protocols.items() if k)
        time = str(found.get("time", ""))[:16].replace("T", " ")
        rows.append([_short(found.get("step")), time, ", ".join(scores), said])
    return table(["step", "time (UTC)", "scores", "protocols"], rows, "n")


def _other_pictures(run: Facts) -> list[Path]:
    shown = {f"{kind}_{name}" for kind in KINDS for name in run.evals}
    return [path for path in run.pictures() if path.stem not in shown]


def _images(run: Facts, paths: Iterable[Path]) -> str:
    out = []
    for path in paths:
        content = run.read(path)
        if not content.startswith(PNG):
            run.damaged += [f"{path.name}: it is no PNG"] if content else []
            continue
        data = base64.b64encode(content).decode()
        caption = f"<figcaption>{_e(path.name)}</figcaption>"
        out.append(f'<figure><img alt="{_e(path.stem)}" src="data:image/png;base64,{data}"/>{caption}</figure>')
    return "".join(out)


def _scores(runs: Sequence[Facts], names: Sequence[str]) -> str:
    """The newest value of every metric, and the protocol of every eval."""
    rows, differing = [], []
    for eval_name in _all(run.evals for run in runs):
        found = [run.measured.get(eval_name) for run in runs]
        protocols = [one.protocol if one else "" for one in found]
        if any(protocols):
            rows.append([f"{eval_name}: protocol", *protocols])
        if len(set(filter(None, protocols))) > 1:
            differing.append(eval_name)
        rows += [
            [key, *(_score(run, one, key) for run, one in zip(runs, found, strict=True))]
            for key in _all(one.metrics for one in found if one)
        ]
    note = (
        f'<p class="warn">Measured by different protocols, not to be compared: {_e(", ".join(differing))}</p>'
        if differing
        else ""
    )
    return note + table(["metric", *(names if len(runs) > 1 else ["value"])], rows, "-" + "n" * len(runs))


def _score(run: Facts, found: Measured | None, key: str) -> str:
    if found is None or key not in found.metrics:
        return ""
    return _short(found.metrics[key]) + ("" if found.step == run.steps else f" (step {found.step:,})")


def _overlaid(runs: Sequence[Facts], names: Sequence[str]) -> list[str]:
    """A panel for every metric that changes, a curve for every run."""
    keys = [
        k for k in _all(row for run in runs for row in run.rows) if k != "step" and not k.startswith("update_ratio/")
    ]
    first = [k for k in ("loss", *PARTS, "lr", "grad_norm", *SPEED) if k in keys]
    panels = []
    for key in [*first, *(k for k in keys if k not in first and k != "skipped_steps")]:
        curves = [series(run.rows, key, name) for run, name in zip(runs, names, strict=True)]
        for i, curve in enumerate(curves):
            curve.colour = i
        moving = any(
            len(c.values) > 1 and np.isfinite(c.values).any() and np.nanmin(c.values) < np.nanmax(c.values)
            for c in curves
        )
        if moving:
            linear = key == "lr" or key in SPEED or all(_is_share(c) for c in curves if len(c.values))
            panels.append(chart(key, curves, log=False if linear else None))
    return panels


def _differing(runs: Sequence[Facts], names: Sequence[str]) -> str:
    settings = [flat(run.config) if run.config else {} for run in runs]
    rows = [[key, *(s.get(key, "—") for s in settings)] for key in _all(settings)]
    rows = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in ("name", "workdir")]
    return table(["setting", *names], rows) or '<p class="soft">None.</p>'


def _differing_versions(runs: Sequence[Facts], names: Sequence[str]) -> str:
    found = [_versions(run) for run in runs]
    rows = [[package, *(versions.get(package, "—") for versions in found)] for package in _all(found)]
    return table(["version", *names], [row for row in rows if len(set(row[1:])) > 1])


def _changes(run: Facts) -> list[list[str]]:
    return [[f"{step:,}", change] for step, change in run.changed]


def _origin(run: Facts) -> list[str]:
    weights = [[k, v] for k, v in flat(run.weights).items() if k]
    configured = run.config.get("checkpoint")
    resumed = str(configured.get("resume") or "") if _is_dict(configured) else ""
    begun = f"It continues the run in {resumed}." if resumed else "Its weights were initialised at random."
    trained, kept = run.config.get("data"), run.data.get("sources")
    sources = trained.get("train") if _is_dict(trained) else None
    rows = [
        [_short(source.get("kind")), _short(source.get("path")) + _selected(source), _short(source.get("split", "")),
         _short(found.get("records")),
         str(len(found["classes"])) if isinstance(found.get("classes"), list) else ""]
        for source, found in zip(
            sources if isinstance(sources, list) else [], kept if isinstance(kept, list) else [], strict=False
        )
        if _is_dict(source) and _is_dict(found)
    ]  # fmt: skip
    return [
        table(["weights at the beginning", ""], weights) or (f"<p>{_e(begun)}</p>" if run.config else ""),
        table(["training data", "path", "split", "records", "classes"], rows, "---nn"),
    ]


def _selected(source: dict[str, Any]) -> str:
    return f", selected by {source['selection']}" if source.get("selection") else ""


def _configuration(run: Facts) -> str:
    if not run.config:
        return ""
    chosen = [[s.name, s.value, "" if s.default is None else s.default] for s in run.chosen if s.chosen]
    same = [[s.name, s.value] for s in run.chosen if not s.chosen]
    if not same:
        note = '<p class="soft">Its defaults are not known: it is of another version, or of classes of its own.</p>'
        return note + _details("all settings", table(["setting", "value"], [row[:2] for row in chosen]))
    return table(["setting", "value", "default"], chosen) + _details(
        f"{len(same)} settings at their defaults", table(["setting", "value"], same)
    )


def _versions(run: Facts) -> dict[str, str]:
    """Of packages, in the newest sessions that say."""
    found = {"jax": run.settings.get("jax"), "grain": run.data.get("grain")}
    for session in run.sessions:
        found |= session["versions"] if _is_dict(session.get("versions")) else {}
    return {str(package): str(version) for package, version in found.items() if version}


def _software(run: Facts) -> list[str]:
    sessions = [
        [utc(s["began"]), utc(s["ended"]) if s["ended"] else "", _short(s.get("first")), _short(s.get("last")),
         s["state"] or "no end", f"{s.get('devices')} x {s.get('device')}", _short(s.get("processes")),
         _duration(hours)]
        for s, hours in zip(run.sessions, run.session_hours(), strict=True)
    ]  # fmt: skip
    head = ["began (UTC)", "ended", "from step", "to step", "outcome", "devices", "processes", "time"]
    left = f'<p class="soft">the latest {MARKS} of {len(sessions):,}</p>' if len(sessions) > MARKS else ""
    versions = [[k, v] for k, v in _versions(run).items()]
    return [table(["version", ""], versions), table(head, sessions[-MARKS:], "--nn--nn") + left]


def section(title: str, *parts: str, more: str = "") -> str:
    """Empty where it has no part."""
    body = "\n".join(filter(None, parts))
    return f"<section><h2>{_e(title)}{more}</h2>\n{body}</section>" if body else ""


def _panels(charts: Sequence[str]) -> str:
    drawn = [c for c in charts if c]
    shown, rest = (f'<div class="panels">{"".join(c)}</div>' if c else "" for c in (drawn[:PANELS], drawn[PANELS:]))
    return shown + _details(f"{len(drawn) - PANELS} more curves", rest)


def _tables(*tables: str) -> str:
    return f'<div class="tables">{"".join(tables)}</div>' if any(tables) else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{_e(title)}</summary>{body}</details>" if body else ""


def table(head: Sequence[Any], rows: Sequence[Sequence[Any]], columns: str = "") -> str:
    """Empty where it has no row; `columns` has an n for each column of numbers, a w for one of long texts."""
    if not rows:
        return ""
    kinds = [f' class="{kind}"' if (kind := columns[i : i + 1]) in ("n", "w") else "" for i in range(len(head))]
    top = "".join(f"<th{kind}>{_e(cell)}</th>" for kind, cell in zip(kinds, head, strict=True))
    lines = ("".join(f"<td{k}>{_e(c)}</td>" for k, c in zip(kinds, row, strict=True)) for row in rows)
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _e(value: Any) -> str:
    """Any text of others, as text."""
    return html.escape(printable(shortened(str(value))))


def _is_size(session: dict[str, Any], key: str) -> bool:
    return type(session.get(key)) is int


def _is_dict(value: Any) -> bool:
    return isinstance(value, dict)


def _is_share(curve: Curve) -> bool:
    """Whether it is a score from 0 to 1."""
    values = curve.values[np.isfinite(curve.values)]
    return len(values) > 0 and values.min() >= 0 and values.max() <= 1 and not any(w in curve.name for w in LOSSES)


def _values(run: Facts, key: str) -> list[float]:
    """Finite ones; without the first, in which a step is compiled, where there are more."""
    values = [row[key] for row in run.rows if math.isfinite(row.get(key, math.nan))]
    return values[1:] or values


def _all(groups: Iterable[Iterable[str]]) -> list[str]:
    """Every key once, in order."""
    return list(dict.fromkeys(itertools.chain.from_iterable(groups)))


def _distinct(names: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    """`names`, and what stands for them where two are the same: the ends of paths, or all of them."""
    if len(set(names)) == len(names):
        return list(names)
    ends = [Path(path).name for path in otherwise]
    return ends if len(set(ends)) == len(ends) else list(otherwise)


def _short(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if abs(value) < 10**15 and value == int(value):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _percent(share: Any) -> str:
    return f"{share:.1%}" if isinstance(share, int | float) and abs(share) < 10**6 else ""


def _gib(size: Any) -> str:
    return f"{size / 2**30:,.2f} GiB" if isinstance(size, int | float) and 0 <= size < 2**80 else ""


def _duration(hours: float) -> str:
    minutes = hours * 60
    if not math.isfinite(minutes):
        return ""
    if minutes < 90:
        return f"{minutes:.1f} min" if minutes < 10 else f"{minutes:.0f} min"
    return f"{hours:,.1f} h"
