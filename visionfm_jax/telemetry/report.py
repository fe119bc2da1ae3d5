"""Pictures of a run: learning curves, and predictions beside their images."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg  # no display, no global state of pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from visionfm_jax.storage import replacing

# Okabe & Ito's palette: distinguishable with every kind of colour vision.
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#6B7280"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, GREY)
INK = "#1F2937"
DPI = 120

LINEAR = ("learning rate", "evaluation")  # panels whose values lie between 0 and a bound
PARTS = ("masked_image", "contrastive", "captioning", "masked_language")  # losses of a task that has several


def learning_curves(
    metrics: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    shares: Sequence[str] = (),
    panels: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Draw loss, learning rate, gradient norm and evaluations over the steps, two by two.

    Args:
      metrics: lines of `writers.read_metrics`: "step" and named numbers; a line may hold any of them.
      path: PNG to write; its folder is made.
      title: above the picture.
      shares: EVAL/METRIC names of what is better the higher it is; those in [0, 1] are drawn in the fourth panel.
      panels: panel title -> names of its series; None: "loss", and its parts where it has any, "lr" and "grad_norm"
        as the training loop logs them, and the shares.
    """
    if panels is None:
        panels = {
            "training loss": ["loss", *(part for part in PARTS if any(part in row for row in metrics))],
            "learning rate": ["lr"],
            "gradient norm": ["grad_norm"],
            "evaluation": _best_first(metrics, shares),
        }
    figure = Figure(figsize=(10, 7.2), layout="constrained", dpi=DPI)
    columns = 2
    axes = figure.subplots(math.ceil(len(panels) / columns), columns, squeeze=False).ravel()
    last = max((row["step"] for row in metrics), default=0)
    for ax, (name, keys) in zip(axes, panels.items(), strict=False):
        _panel(ax, name, {key: _series(metrics, key) for key in keys}, last)
    for ax in axes[len(panels) :]:
        ax.set_axis_off()
    if title:
        figure.suptitle(title, color=INK, fontsize=13, fontweight="bold")
    save(figure, path)


def predictions(
    images: np.ndarray,
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    class_names: Sequence[str] | None,
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draw images in a grid, under each what the model says; mistakes marked by colour and by sign.

    Args:
      images: (B, H, W, C) uint8, C = 1 or 3.
      labels: (B,) true classes.
      predicted: (B,) the model's.
      class_names: name by class; None: the numbers.
      path: PNG to write; its folder is made.
      title: above the picture.

    Raises:
      ValueError: no image, or numbers of images, labels and predictions that differ.
    """
    count = len(images)
    if count == 0 or len(labels) != count or len(predicted) != count:
        raise ValueError(
            f"{count} images, {len(labels)} labels, {len(predicted)} predictions: must be equal, at least 1"
        )
    columns = min(8, math.ceil(math.sqrt(count * 1.6)))
    rows = math.ceil(count / columns)
    texts = _captions(labels, predicted, class_names)
    height, width = images[0].shape[:2]
    tall = 1.42 * height / width + (0.45 if "\n" in texts[0] else 0.3)  # inches, with the lines of text
    figure = Figure(figsize=(1.5 * columns, tall * rows + 0.7), layout="constrained", dpi=DPI)
    figure.get_layout_engine().set(w_pad=0.05, h_pad=0.05)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, image, text in zip(axes, images, texts, strict=False):
        right = text.startswith("✓")
        ax.imshow(
            image.squeeze(-1) if image.shape[-1] == 1 else image, cmap="gray", vmin=0, vmax=255, interpolation="nearest"
        )
        ax.set_xticks([])
        ax.set_yticks([])
        for side in ax.spines.values():
            side.set(color=GREEN if right else RED, linewidth=1.2 if right else 3.5)
        ax.set_xlabel(
            text, color=GREEN if right else RED, fontsize=8.5, fontweight="normal" if right else "bold", labelpad=3
        )
    for ax in axes[count:]:
        ax.set_axis_off()
    hits = int(np.sum(np.asarray(labels) == np.asarray(predicted)))
    figure.suptitle(f"{title}\n" * bool(title) + f"{hits} of the {count} shown right", color=INK, fontsize=11)
    save(figure, path)


def _captions(labels: Sequence[int], predicted: Sequence[int], class_names: Sequence[str] | None) -> list[str]:
    """Under each image "✓ cat", or "✗ dog, true: cat" in as many lines as the longest needs, so that rows stay even."""
    pairs = [
        (_name(guess, class_names), _name(label, class_names), guess == label)
        for guess, label in zip(predicted, labels, strict=True)
    ]
    short = all(len(guess) + len(label) <= 12 for guess, label, right in pairs if not right)
    return [
        f"✓ {guess}" + "\n" * (not short) if right else f"✗ {guess}{', ' if short else chr(10)}true: {label}"
        for guess, label, right in pairs
    ]


def _name(label: int, class_names: Sequence[str] | None) -> str:
    label = int(label)
    name = class_names[label] if class_names is not None and 0 <= label < len(class_names) else str(label)
    return drawable(name if len(name) <= 16 else name[:15] + "…")


def drawable(text: str) -> str:
    """A text from a dataset as matplotlib draws it: no formulas between dollars, no bytes that are no UTF-8."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _best_first(metrics: Sequence[Mapping[str, Any]], shares: Sequence[str]) -> list[str]:
    """Those of `shares` whose values all lie in [0, 1], the best first so that the legend reads downwards."""
    last: dict[str, float] = {}
    for key in shares:
        values = [row[key] for row in metrics if key in row]
        if values and all(0 <= value <= 1 for value in values):
            last[key] = values[-1]
    return sorted(last, key=lambda key: -last[key])[: len(SERIES)]


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], float(row[key])) for row in metrics if key in row]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, float), np.array(values, float)


def _panel(ax: Axes, name: str, series: Mapping[str, tuple[np.ndarray, np.ndarray]], last: int) -> None:
    """One panel, over the steps 0 to `last`."""
    ax.set_title(name, loc="left", color=INK, fontsize=11)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=GREY, labelsize=9)
    ax.grid(axis="y", color="#E5E7EB", linewidth=0.8)
    ax.set_axisbelow(True)
    drawn = {key: points for key, points in series.items() if np.isfinite(points[1]).any()}
    if not drawn:
        ax.text(0.5, 0.5, "not measured", transform=ax.transAxes, ha="center", va="center", color=GREY)
        ax.set(xticks=[], yticks=[])
        return
    finite = np.concatenate([values[np.isfinite(values)] for _, values in drawn.values()])
    above: list[np.ndarray] = []
    for (key, (steps, values)), colour in zip(drawn.items(), SERIES, strict=False):
        hides = any(
            len(a) == len(values) and np.nanmax(np.abs(a - values), initial=0) <= 0.02 * np.ptp(finite) for a in above
        )
        _curve(ax, key, steps, values, colour, dashed=hides)
        above.append(values)
    if name not in LINEAR and finite.min() > 0 and finite.max() / finite.min() > 50:
        ax.set_yscale("log")
    else:
        ax.ticklabel_format(axis="y", style="sci", scilimits=(-2, 5))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    ax.set_xlim(-0.03 * max(last, 1), 1.03 * max(last, 1))
    ax.set_xlabel("step", color=GREY, fontsize=9)
    columns = 1 if max(len(text) for text in ax.get_legend_handles_labels()[1]) > 30 else 2
    # Below the axes, where nothing is drawn; the padding leaves room for the numbers and the name of the axis.
    below = {"loc": "upper left", "bbox_to_anchor": (-0.08, 0), "borderaxespad": 3.8}
    ax.legend(frameon=False, fontsize=9, labelcolor=INK, ncols=columns, **below)


def _curve(ax: Axes, key: str, steps: np.ndarray, values: np.ndarray, colour: str, dashed: bool) -> None:
    """One series; `dashed` where it would hide another."""
    style = (0, (3, 3)) if dashed else "solid"
    finite = np.isfinite(values)
    label = f"{key}  (last {values[finite][-1]:.4g})"
    if len(values) == 1:  # hollow, so that it hides no other
        side = 4 if dashed else 7
        ax.plot(steps, values, "D", color=colour, ms=side, markerfacecolor="none", markeredgewidth=1.8, label=label)
    elif noisy(values[finite]):
        ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.3)
        ax.plot(steps, running_mean(values), color=colour, linewidth=1.8, linestyle=style, label=label)
    else:
        marker = "o" if len(values) <= 30 else None
        ax.plot(steps, values, color=colour, linewidth=1.8, linestyle=style, marker=marker, markersize=4, label=label)
    if not finite.all():
        lost = steps[~finite]
        ax.plot(lost, np.full(len(lost), values[finite].min()), "x", color=RED, markersize=7, label="not finite")


def noisy(values: np.ndarray) -> bool:
    """Whether a curve of many points goes up and down rather than somewhere."""
    return len(values) >= 60 and np.abs(np.diff(values)).sum() > 3 * np.ptp(values)


def running_mean(values: np.ndarray) -> np.ndarray:
    """The centred mean over about a thirtieth of the curve, over what is finite there."""
    window = np.ones(max(3, len(values) // 30) | 1)  # odd, so that it has a centre
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, mode="same")
    return total / np.maximum(np.convolve(finite, window, mode="same"), 1)


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """A run that is killed while drawing leaves the previous picture whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    with warnings.catch_warnings(), replacing(path) as part:
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # captions have signs of every script
        figure.savefig(part, format="png", facecolor="white")
