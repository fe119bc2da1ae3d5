"""A replayed step for people: a summary, every figure in a file, layers and samples as pictures."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from visionfm_jax import storage
from visionfm_jax.errors import DataError
from visionfm_jax.telemetry.report import BLUE, DPI, GREY, INK, ORANGE, RED, save
from visionfm_jax.train.layer_statistics import OUTPUT, Layer
from visionfm_jax.train.replay import Replayed
from visionfm_jax.train.spikes import kept_step, plain

SUBFOLDER = "replay"
LABELS = 36  # layers named under the picture
PALE_ORANGE, PALE_BLUE = "#F3D9A0", "#A9CDE6"


def write(found: Replayed, run: Path) -> str:
    """Write RUN/replay/step-N; the summary, for people.

    `statistics.json` has everything; `layers.png` each layer beside the same one on the next step's batch;
    `samples.png` the images of the suspects.

    Raises:
      OutputError, StorageError: the folder cannot be written.
    """
    folder = run / SUBFOLDER / f"step-{found.step:08}"
    files = [folder / name for name in ("statistics.json", "layers.png", "samples.png")]
    title = f"step {found.step}" + (f": first not finite: {found.first_bad}" if found.first_bad else "")

    def write_all() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        storage.write_text(files[0], json.dumps(plain(_everything(found)), indent=1, allow_nan=False) + "\n")
        save(_layers(found.layers, found.beside, title), files[1])
        save(_samples(found, title), files[2])

    storage.write(write_all, folder)
    return "\n".join([*_summary(found, run), *(f"  {file}" for file in files)])


def _summary(found: Replayed, run: Path) -> list[str]:
    metrics = found.metrics
    lines = [
        f"step {found.step} again: loss {metrics['loss']:g}, gradient norm {metrics['grad_norm']:g}"
        + (f", loss scale {metrics['loss_scale']:g}" if "loss_scale" in metrics else ""),
        f"  in the run       {_as_in_the_run(found, run)}",
        f"  first not finite {found.first_bad or 'nowhere: everything is finite'}",
        f"  samples          {_named(found)}",
    ]
    norms = found.gradient_norms
    largest = sorted(norms, key=lambda name: -norms[name] if np.isfinite(norms[name]) else -math.inf)[:3]
    lines.append(
        "  tensors          " + ", ".join(f"{name} {norms[name]:.3g}" for name in largest) + " (gradient norms)"
    )
    for what, side in (("activations", "forward"), ("gradients", "backward")):
        if grown := _most_grown(found, side):
            ratio, layer = grown
            lines.append(f"  {what:16} most beside the next batch: {ratio:.3g} times its RMS, {layer}")
    return lines


def _as_in_the_run(found: Replayed, run: Path) -> str:
    """Whether the run saw the same, where it has kept the step."""
    try:
        kept = kept_step(run, found.step)
    except DataError as error:
        return f"unknown: {error}"
    if kept is None:
        return "not kept"
    head, rows = kept
    then = [head["loss"], head["grad_norm"], *head["gradient_norms"].values(), *(row["loss"] for row in rows)]
    losses = [sample["loss"] for sample in found.samples[: len(rows)]]
    now = [found.metrics["loss"], found.metrics["grad_norm"], *found.gradient_norms.values(), *losses]
    if np.array_equal(then, now, equal_nan=True):
        return f"{head['kind']}, the same to the last bit"
    return (
        f"{head['kind']}, loss {head['loss']:g}, gradient norm {head['grad_norm']:g}: other settings, devices, "
        "versions or data"
    )


def _named(found: Replayed) -> str:
    shown = [found.samples[row] for row in found.suspects[:4]]
    names = [f"{s['sample']} = {s['source']} {s['key']} (loss {s['loss']:.4g})" for s in shown]
    finite = all(math.isfinite(s["loss"]) for s in shown)
    return (
        ("of the largest losses: " if finite else "")
        + ", ".join(names)
        + (f" and {len(found.suspects) - 4} more" if len(found.suspects) > 4 else "")
    )


def _most_grown(found: Replayed, direction: str) -> tuple[float, Layer] | None:
    """The layer whose RMS exceeds that of the next step's batch most, while all are finite."""
    pairs = [(getattr(a, direction), getattr(b, direction), a) for a, b in _paired(found.layers, found.beside)]
    if any(own.bad or other.bad for own, other, _ in pairs):
        return None
    ratios = [(own.rms / other.rms, layer) for own, other, layer in pairs if other.rms > 0]
    return max(ratios, key=lambda pair: pair[0], default=None)


def _paired(layers: Sequence[Layer], beside: Sequence[Layer]) -> list[tuple[Layer, Layer]]:
    """The same layers of both; one through which nothing passes back of one batch is left out."""
    others = {str(layer): layer for layer in beside}
    return [(layer, others[str(layer)]) for layer in layers if str(layer) in others]


def _everything(found: Replayed) -> dict[str, Any]:
    def figures(layers: Sequence[Layer]) -> list[dict[str, Any]]:
        return [
            {"layer": str(layer), "forward": layer.forward._asdict(), "backward": layer.backward._asdict()}
            for layer in layers
        ]

    return {
        "step": found.step,
        "first_not_finite": found.first_bad or None,
        "metrics": found.metrics,
        "gradient_norms": found.gradient_norms,
        "suspects": [found.samples[row] for row in found.suspects],
        "layers": figures(found.layers),
        "layers_of_the_next_batch": figures(found.beside),
        "samples": found.samples,
    }


def _layers(layers: Sequence[Layer], beside: Sequence[Layer], title: str) -> Figure:
    """RMS and largest value of each layer's output and of its gradient, in execution order."""
    pairs = [(own, other) for own, other in _paired(layers, beside) if own.side == OUTPUT]
    figure = Figure(figsize=(13, 8), layout="constrained", dpi=DPI)
    above, below = figure.subplots(2, 1, sharex=True)
    _panel(above, pairs, "forward", "activations →")
    _panel(below, pairs, "backward", "← gradients of the activations")
    places = _labelled([own.name for own, _ in pairs])
    below.set_xticks(places, [pairs[i][0].name or "output" for i in places], rotation=60, ha="right", fontsize=7.5)
    figure.suptitle(_wrapped(title, 130), color=INK, fontsize=11)
    return figure


def _labelled(names: Sequence[str]) -> list[int]:
    """At most `LABELS` layers: of the least depth that is worth naming, evenly spread."""
    outer = [i for i, name in enumerate(names) if name.endswith("]") or "blocks[" not in name]
    return outer[:: math.ceil(len(outer) / LABELS)]


def _panel(ax: Axes, pairs: Sequence[tuple[Layer, Layer]], direction: str, name: str) -> None:
    own, other = ([getattr(pair[k], direction) for pair in pairs] for k in (0, 1))
    x = np.arange(len(pairs))
    for values, label, colour, size in (
        ([s.largest for s in other], "largest, next batch", PALE_ORANGE, 9),
        ([s.rms for s in other], "RMS, next batch", PALE_BLUE, 9),
        ([s.largest for s in own], "largest", ORANGE, 4.5),
        ([s.rms for s in own], "RMS", BLUE, 4.5),
    ):
        values = np.array(values)
        ax.plot(x[values > 0], values[values > 0], "o", markersize=size, color=colour, label=label, markeredgewidth=0)
    bad = [i for i, s in enumerate(own) if s.bad]
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(numticks=9))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if bad:
        ax.plot(
            bad, np.full(len(bad), 0.03), "x", color=RED, markersize=5, transform=ax.get_xaxis_transform(),
            label=f"not finite ({len(bad)} of {len(x)} layers)",
        )  # fmt: skip
        ax.axvline(bad[0] if direction == "forward" else bad[-1], color=RED, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_title(name, loc="left", color=INK, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=GREY, labelsize=8.5)
    ax.grid(axis="y", color="#E5E7EB", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.set_xlim(-0.5, len(x) - 0.5)
    ax.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="upper left", bbox_to_anchor=(1, 1))


def _samples(found: Replayed, title: str) -> Figure:
    """The suspects, as the loader gave them."""
    count = len(found.suspects)
    columns = min(6, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(max(2.1 * columns, 6), 2.5 * rows + 0.8), layout="constrained", dpi=DPI)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, row, image in zip(axes, found.suspects, found.images, strict=False):
        sample = found.samples[row]
        how = "nearest" if len(image) < 128 else "antialiased"
        ax.imshow(image, vmin=0, vmax=255, interpolation=how)
        ax.set(xticks=[], yticks=[])
        finite = np.isfinite(sample["loss"])
        ax.spines[:].set(color=GREY if finite else RED, linewidth=1 if finite else 2.5)
        ax.set_xlabel(f"{_short(sample['key'])}\nloss {sample['loss']:.4g}", color=INK if finite else RED, fontsize=8)
    for ax in axes[count:]:
        ax.set_axis_off()
    figure.suptitle(_wrapped(title, 32 * columns), color=INK, fontsize=9)
    return figure


def _short(key: str) -> str:
    return _wrapped(key if len(key) <= 28 else "…" + key[-27:], 28)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text.replace("$", r"\$"), width))  # matplotlib reads formulas between dollars
