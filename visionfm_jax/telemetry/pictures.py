"""Pictures of what an eval found: retrieved, written, reconstructed and detected things, maps, confused classes.

Shapes: H W image, C classes, K answers to a query.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from visionfm_jax.telemetry.report import BLUE, DPI, GREEN, GREY, INK, ORANGE, RED, drawable, predictions, save

MATRIX = 40  # classes up to which a confusion matrix is drawn; above, the largest confusions
NUMBERS = 20  # classes up to which its cells hold numbers
LISTED = 30  # confusions
PANEL = 2.6  # inches, the side of an image with its boxes, or of a map
LEGEND = 35  # classes whose colours are named
CELL, PICTURE, LINE, HEAD, GAP = 6.6, 0.94, 0.25, 0.5, 0.2  # inches; a cell holds one query, two cells lie side by side
PALE = "#E5E7EB"
PALE_GREEN = "#A7DCCB"


KINDS = (  # KIND_NAME.png
    "predictions", "confusion", "retrieval", "captions", "reconstructions",
    "boxes", "worst_boxes", "precision", "maps", "worst_maps", "segments", "worst_segments",
)  # fmt: skip


def draw(pictured: Mapping[str, Any], folder: Path, name: str, title: str) -> list[Path]:
    """Draw what there is to see of an eval: the pictures that `pictured` has the parts of.

    Args:
      pictured: an eval's: `image`, `label`, `guess` and `class_names` as `report.predictions` takes them; `captions`
        and `images` as `retrieval` takes them; `generated` as `captions` does; `reconstructed` as `reconstructions`
        does; `confusion` and `class_names` as `confusion` does; `boxes`, `worst_boxes` and `least_score` as `boxes`
        does; `precision` as `precision_recall` does; `maps` and `worst_maps` as `maps` does; `segments` and
        `worst_segments` as `segments` does.
      folder: the run's.
      name: the eval's.
      title: above every picture.

    Returns:
      The files, KIND_NAME.png for each of `KINDS` that there is something of.

    Raises:
      OSError: one cannot be written.
    """
    drawn = []
    if "guess" in pictured:
        drawn.append(folder / f"predictions_{name}.png")
        shown = (pictured[key] for key in ("image", "label", "guess", "class_names"))
        predictions(*shown, drawn[-1], title)
    if "confusion" in pictured:
        drawn.append(folder / f"confusion_{name}.png")
        confusion(pictured["confusion"], pictured["class_names"], drawn[-1], title)
    if "captions" in pictured:
        drawn.append(folder / f"retrieval_{name}.png")
        retrieval(pictured["captions"], pictured["images"], drawn[-1], title)
    if "generated" in pictured:
        drawn.append(folder / f"captions_{name}.png")
        captions(pictured["generated"], drawn[-1], title)
    if "reconstructed" in pictured:
        drawn.append(folder / f"reconstructions_{name}.png")
        reconstructions(pictured["reconstructed"], drawn[-1], title)
    for kind in ("boxes", "worst_boxes", "maps", "worst_maps", "segments", "worst_segments"):
        if kind in pictured:
            function = {"boxes": boxes, "maps": maps, "segments": segments}[kind.removeprefix("worst_")]
            drawn.append(folder / f"{kind}_{name}.png")
            which = f"{title}, the worst images" if kind.startswith("worst") else title
            least = (pictured["least_score"],) if function is boxes else ()
            function(pictured[kind], pictured["class_names"], *least, drawn[-1], which)
    if "precision" in pictured:
        drawn.append(folder / f"precision_{name}.png")
        precision_recall(pictured["precision"], drawn[-1], title)
    return drawn


def retrieval(
    captions: Sequence[Mapping[str, Any]],
    images: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draw images with their best captions, and captions with their best images; right ones by colour and sign.

    Args:
      captions: queries that are images. Of each: `query`, uint8 (H, W, 3); `answers`, K captions, best first;
        `scores` (K,); `right` (K,) bool; `own`, the caption that belongs to it; `rank`, the place of the best right
        answer, which may be inf.
      images: queries that are captions; as `captions`, with the two exchanged.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    lines = max((len(c["answers"]) + (not any(c["right"])) for c in captions), default=0)
    tall = [max(lines * LINE, 4 * LINE) + GAP, PICTURE + 2 * LINE + GAP]  # inches, of a query of either kind
    rows = [(len(captions) + 1) // 2, (len(images) + 1) // 2]
    height = 0.45 + sum(HEAD + t * r for t, r in zip(tall, rows, strict=True))
    figure = Figure(figsize=(2 * CELL + 3 * GAP, height), dpi=DPI)
    ax = _canvas(figure)  # in inches, y downwards
    ax.text(GAP, 0.3, title, color=INK, fontsize=13, fontweight="bold", va="center")
    top = 0.45
    for what, queries, step, one in (
        ("Image to caption", captions, tall[0], _best_captions),
        ("Caption to image", images, tall[1], _best_images),
    ):
        first = sum(q["rank"] == 1 for q in queries)
        ax.text(GAP, top + 0.25, what, color=BLUE, fontsize=11.5, fontweight="bold", va="center")
        ax.text(
            GAP + 1.75, top + 0.25, f"the first answer is right for {first} of the {len(queries)} shown",
            color=GREY, fontsize=10, va="center",
        )  # fmt: skip
        top += HEAD
        for i, query in enumerate(queries):
            one(ax, query, GAP + (i % 2) * (CELL + GAP), top + (i // 2) * step)
        top += step * ((len(queries) + 1) // 2)
    save(figure, path)


def captions(generated: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw images beside the captions that a model wrote for them, and the true ones below where they differ.

    Args:
      generated: of each, `image`, uint8 (H, W, 3); `generated` and `caption`, the model's and the true one; `right`.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    columns, side, width = 3, 1.55, 4.9  # inches, of the image and of the cell that it begins
    rows = -(-len(generated) // columns)
    figure = Figure(figsize=(columns * width + GAP, 0.85 + rows * (side + 1.5 * GAP)), dpi=DPI)
    ax = _canvas(figure)
    hits = sum(bool(one["right"]) for one in generated)
    _heading(ax, title, f"{hits} of the {len(generated)} shown match a caption of their image exactly")
    for i, one in enumerate(generated):
        x, y = GAP + i % columns * width, 0.85 + i // columns * (side + 1.5 * GAP)
        sign, colour = ("✓", GREEN) if one["right"] else ("✗", RED)
        _picture(ax, one["image"], x, y, side, colour, 3.0)
        x, room = x + side + 0.15, width - side - 0.35
        ax.text(x, y + 0.12, sign, color=colour, fontsize=11, fontweight="bold", va="center")
        text, most = one["generated"] or "(no word)", 6 if one["right"] else 3
        used = _paragraph(ax, text, x + 0.22, y, room - 0.22, most, colour, bold=True)
        if not one["right"]:
            y += used * LINE + 0.06
            ax.text(x, y + LINE / 2, "true", color=GREY, fontsize=9, va="center")
            _paragraph(ax, one["caption"], x + 0.42, y, room - 0.42, 6 - used, INK)
    save(figure, path)


def reconstructions(reconstructed: Mapping[str, Any], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw images, below them what the model saw of each, and below that what it reconstructed.

    Args:
      reconstructed: `image`, `seen`, `reconstruction`, uint8 (B, H, W, 3); `error` (B,).
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    side, gap, left, top = 1.6, 0.1, 1.25, 0.85  # inches
    rows = {"image": "image", "what the\nmodel saw": "seen", "what it\npredicted": "reconstruction"}
    count = len(reconstructed["image"])
    wide = max(left + count * (side + gap) + GAP, 6)
    figure = Figure(figsize=(wide, top + len(rows) * (side + gap) + 2 * LINE), dpi=DPI)
    ax = _canvas(figure)
    _heading(ax, title, "grey parts were masked: the model reconstructed them, the rest is the image")
    for row, (label, key) in enumerate(rows.items()):
        y = top + row * (side + gap)
        ax.text(left - 0.15, y + side / 2, label, color=INK, fontsize=11, ha="right", va="center", linespacing=1.4)
        for column, image in enumerate(reconstructed[key]):
            _picture(ax, image, left + column * (side + gap), y, side, PALE, 1.0)
    y = top + len(rows) * (side + gap) + LINE / 2
    ax.text(left - 0.15, y, "mean error", color=INK, fontsize=11, ha="right", va="center")
    for column, error in enumerate(reconstructed["error"]):
        x = left + column * (side + gap) + side / 2
        ax.text(x, y, f"{error:.3f}", color=GREY, fontsize=11, ha="center", va="center")
    save(figure, path)


def confusion(cells: np.ndarray, class_names: Sequence[str], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw which classes are taken for which: a matrix, or with more than 40 classes the largest confusions.

    Args:
      cells: (K, 3) integers: class, guess, how many images; of any two at most one.
      class_names: C, name by class.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    names = [_short(n, 24) for n in class_names]
    save((_matrix if len(names) <= MATRIX else _largest)(cells, names, title), path)


def boxes(
    shown: Sequence[Mapping[str, Any]],
    class_names: Sequence[str],
    least_score: float,
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draw images with their objects, beside them with the predicted boxes.

    Args:
      shown: of each, `image`, uint8 (H, W, 3); `key`; `share`, its F1; `truth`: `boxes` (N, 4), left, top, right,
        bottom, pixels of the image, `labels`, `crowd` and `found` (N,); `found`: `boxes` (D, 4), `labels`, `scores` and
        `matched` (D,), the object, -1 where there is none, -2 where the box lies on a crowd.
      class_names: by label.
      least_score: of the predicted boxes that are shown.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    shown_from = f"{least_score:.2f} or more (the best F1)"
    says = "left: objects, green if found, dashed orange if missed; right: boxes of score "
    says += f"{shown_from}, green if right, orange if wrong (IoU < 0.5)"

    def one(ax: Axes, entry: Mapping[str, Any], x: float, y: float) -> None:
        truth, found = entry["truth"], entry["found"]
        scale = _picture(ax, entry["image"], x, y, PANEL, PALE, 1.0)
        for box, label, crowd, hit in zip(truth["boxes"], truth["labels"], truth["crowd"], truth["found"], strict=True):
            name = _short(class_names[label], 16) + " (crowd)" * bool(crowd)
            _box(ax, box, name, GREY if crowd else GREEN if hit else RED, scale, x + PANEL, "-" if hit else "--")
        x += PANEL + GAP / 2
        scale = _picture(ax, entry["image"], x, y, PANEL, PALE, 1.0)
        for i in np.argsort(found["scores"], kind="stable"):  # the highest on top
            name = f"{_short(class_names[found['labels'][i]], 16)} {found['scores'][i]:.2f}"
            match = found["matched"][i]
            _box(ax, found["boxes"][i], name, GREY if match == -2 else GREEN if match >= 0 else RED, scale, x + PANEL)

    _side_by_side(shown, 2, one, says, "F1", path, title)


def maps(
    shown: Sequence[Mapping[str, Any]], class_names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw images, beside them their class maps, and beside these the predicted ones.

    Args:
      shown: of each, `image`, uint8 (H, W, 3); `key`; `share`, of its pixels that is right; `truth` and `guess`,
        integers (H, W), black where they are no class.
      class_names: by number.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    classes = len(class_names)
    areas = np.zeros(classes + 1, np.int64)
    for entry in shown:
        for one in (entry["truth"], entry["guess"]):
            areas += np.bincount(np.where((one < 0) | (one >= classes), classes, one).ravel(), minlength=classes + 1)
    colours, legend = _legend(areas, class_names)

    def one(ax: Axes, entry: Mapping[str, Any], x: float, y: float) -> None:
        _picture(ax, entry["image"], x, y, PANEL, PALE, 1.0)
        for i, which in enumerate((entry["truth"], entry["guess"]), 1):
            known = np.where((which < 0) | (which >= classes), classes, which)
            _picture(ax, colours[known], x + i * (PANEL + GAP / 2), y, PANEL, PALE, 1.0, smooth=False)

    says = "image, its map, the predicted map; black: no class, which does not count"
    _side_by_side(shown, 3, one, says, "right", path, title, legend)


def segments(
    shown: Sequence[Mapping[str, Any]], class_names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw images below the colours of their segments' classes, beside them below those of the predicted ones.

    Args:
      shown: of each, `image`, uint8 (H, W, 3); `key`; `share`, its quality; `truth` and `found`: `map`, integers
        (H, W), 0 where there is no segment, else 1 + the number of the segment in `labels`.
      class_names: by label.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    classes = len(class_names)
    areas = np.zeros(classes + 1, np.int64)
    for part in (entry[which] for entry in shown for which in ("truth", "found")):
        areas += np.bincount(_classes(part, classes).ravel(), minlength=classes + 1)
    colours, legend = _legend(areas, class_names)

    def one(ax: Axes, entry: Mapping[str, Any], x: float, y: float) -> None:
        for i, part in enumerate((entry["truth"], entry["found"])):
            number, of_class = part["map"], _classes(part, classes)
            tinted = np.where(number[..., None] > 0, entry["image"] * 0.4 + colours[of_class] * 0.6, entry["image"])
            edge = np.zeros(number.shape, bool)
            edge[1:] |= number[1:] != number[:-1]
            edge[:, 1:] |= number[:, 1:] != number[:, :-1]
            tinted[edge] = 255
            _picture(ax, tinted.astype(np.uint8), x + i * (PANEL + GAP / 2), y, PANEL, PALE, 1.0)

    _side_by_side(shown, 2, one, "left: the segments; right: those that are predicted", "quality", path, title, legend)


def detections(shown: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw images with what was detected in them.

    Args:
      shown: of each, `image`, uint8 (H, W, 3); `key`; `boxes` (D, 4), left, top, right, bottom, pixels of the image;
        `names` and `scores` (D,).
      path: PNG to write; its folder is made.
      title: above the picture.
    """

    def one(ax: Axes, entry: Mapping[str, Any], x: float, y: float) -> None:
        scale = _picture(ax, entry["image"], x, y, PANEL, PALE, 1.0)
        for i in np.argsort(entry["scores"], kind="stable"):  # the highest on top
            name = f"{_short(entry['names'][i], 16)} {entry['scores'][i]:.2f}"
            _box(ax, entry["boxes"][i], name, GREEN, scale, x + PANEL)

    _side_by_side(shown, 1, one, "boxes with their classes and scores", "", path, title)


def areas(
    shown: Sequence[Mapping[str, Any]], class_names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw images, beside them their class maps.

    Args:
      shown: of each, `image`, uint8 (H, W, 3); `key`; `map`, integers (H, W), of which others than classes are none.
      class_names: by number.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    classes = len(class_names)
    shown = [{**entry, "map": np.where(entry["map"] < classes, entry["map"], classes)} for entry in shown]
    sizes = sum(np.bincount(entry["map"].ravel(), minlength=classes + 1)[:classes] for entry in shown)
    colours, legend = _legend(np.append(sizes, 0), class_names)

    def one(ax: Axes, entry: Mapping[str, Any], x: float, y: float) -> None:
        _picture(ax, entry["image"], x, y, PANEL, PALE, 1.0)
        _picture(ax, colours[entry["map"]], x + PANEL + GAP / 2, y, PANEL, PALE, 1.0, smooth=False)

    _side_by_side(shown, 2, one, "image, and the class of each pixel", "", path, title, legend)


def precision_recall(curves: Mapping[str, np.ndarray], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw precision over recall.

    Args:
      curves: by name, precision at levels of recall evenly spaced from 0 to 1; NaN: there is no object.
      path: PNG to write; its folder is made.
      title: above the picture.
    """
    figure = Figure(figsize=(6, 5), layout="constrained", dpi=DPI)
    ax = figure.subplots()
    for (name, curve), colour in zip(curves.items(), (BLUE, ORANGE, GREEN), strict=False):
        recall = np.linspace(0, 1, len(curve))
        ax.plot(recall, curve, color=colour, linewidth=1.8, label=f"{name}  {np.mean(curve):.3f}")
    ax.set(xlim=(0, 1), ylim=(0, 1.02))
    ax.set_xlabel("recall", color=GREY, fontsize=10)
    ax.set_ylabel("precision, mean over classes", color=GREY, fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(GREY)
    ax.tick_params(colors=GREY, labelsize=9)
    ax.grid(color=PALE, linewidth=0.8)
    ax.legend(frameon=False, fontsize=10, labelcolor=INK, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3)
    figure.suptitle(drawable(title), color=INK, fontsize=12, fontweight="bold")
    save(figure, path)


def _side_by_side(
    shown: Sequence[Mapping[str, Any]],
    panels: int,
    one: Callable[[Axes, Mapping[str, Any], float, float], None],
    says: str,
    measure: str,
    path: str | os.PathLike[str],
    title: str,
    legend: Sequence[tuple[str, Any]] = (),
) -> None:
    """Images of several panels each, which `one` draws at (x, y), each below its name and its `share`, if measured."""
    columns, width, top = 4 if panels == 1 else 2, panels * (PANEL + GAP / 2) + GAP, 0.85
    rows, lines = max(1, -(-len(shown) // columns)), -(-len(legend) // 6)
    step = PANEL + LINE + GAP
    figure = Figure(figsize=(columns * width + GAP, top + rows * step + lines * LINE + GAP), dpi=DPI)
    ax = _canvas(figure)
    _heading(ax, drawable(title), says)
    for i, entry in enumerate(shown):
        x, y = GAP + i % columns * width, top + i // columns * step
        name = _short(str(entry["key"]), 40 if panels > 1 else 30)
        name += f"   {measure} {entry['share']:.2f}" if measure else ""
        ax.text(x, y + LINE / 2, name, color=GREY, fontsize=9, va="center")
        one(ax, entry, x, y + LINE)
    wide = (columns * width - GAP) / 6
    for i, (name, colour) in enumerate(legend):
        x, y = GAP + i % 6 * wide, top + rows * step + i // 6 * LINE
        ax.add_patch(Rectangle((x, y), 0.16, 0.16, color=colour, linewidth=0))
        ax.text(x + 0.24, y + 0.08, name, color=INK, fontsize=9, va="center")
    save(figure, path)


def _box(
    ax: Axes, box: np.ndarray, name: str, colour: str, place: tuple[float, float, float], right: float, style: str = "-"
) -> None:
    """A box with its name within, at its upper left; `place` as `_picture` returns it."""
    x, y, scale = place
    left, top, width, height = x + box[0] * scale, y + box[1] * scale, *((box[2:] - box[:2]) * scale)
    ax.add_patch(Rectangle((left, top), width, height, fill=False, edgecolor=colour, linewidth=1.4, linestyle=style))
    ax.text(
        min(left, right - 0.055 * len(name) - 0.05), top, name, color="white", fontsize=6, va="top", ha="left",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.85},
    )  # fmt: skip


def _classes(part: Mapping[str, np.ndarray], classes: int) -> np.ndarray:
    """The class (H, W) of each pixel of `segments`; C: none."""
    return np.array([classes, *part["labels"]])[part["map"]]


def _legend(areas: np.ndarray, class_names: Sequence[str]) -> tuple[np.ndarray, list[tuple[str, np.ndarray]]]:
    """Colours uint8 (C + 1, 3) of classes by the pixels (C + 1,) that are drawn of them, and those that are named."""
    classes = len(class_names)
    largest = [c for c in np.argsort(-areas[:classes], kind="stable") if areas[c]]
    colours = class_colours(classes, largest)
    legend = [(_short(class_names[c], 22), colours[c] / 255) for c in largest[:LEGEND]]
    if (more := len(largest) - len(legend)) > 0:
        legend.append((f"and {more} more", np.ones(3)))
    return colours, legend


def class_colours(classes: int, largest: Sequence[int]) -> np.ndarray:
    """uint8 (C + 1, 3): those of the largest classes far apart, black for none."""
    out = np.zeros((classes + 1, 3))
    for i, c in enumerate(largest):
        hue, turn = i * 0.618034 % 1, i // 8 % 3  # the golden ratio keeps hues that follow each other apart
        out[c] = hsv_to_rgb((hue, (0.75, 0.45, 0.9)[turn], (0.95, 0.8, 0.55)[turn]))
    return np.round(out * 255).astype(np.uint8)


def _canvas(figure: Figure) -> Axes:
    """The whole figure as one plane, whose unit is an inch, with y downwards."""
    width, height = figure.get_size_inches()
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set(xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    return ax


def _heading(ax: Axes, title: str, text: str) -> None:
    ax.text(GAP, 0.3, title, color=INK, fontsize=13, fontweight="bold", va="center")
    ax.text(GAP, 0.6, text, color=GREY, fontsize=10.5, va="center")


def _paragraph(
    ax: Axes, text: str, x: float, y: float, width: float, most: int, colour: str, bold: bool = False
) -> int:
    """A text in at most `most` lines of `width` inches; returns in how many."""
    sign = 0.09 if bold else 0.081  # inches, of the usual one
    lines = textwrap.wrap(" ".join(text.split()), int(width / sign), max_lines=most, placeholder=" …")
    for line in lines:
        shown = line.replace("$", r"\$")  # no formula
        weight = "bold" if bold else "normal"
        drawn = ax.text(
            x, y + LINE / 2, shown, color=colour, fontsize=10.5, va="center", fontweight=weight, clip_on=True
        )
        drawn.set_clip_path(Rectangle((x, y), width + 0.15, LINE, transform=ax.transData))  # capitals are wider
        y += LINE
    return len(lines)


def _best_captions(ax: Axes, query: Mapping[str, Any], x: float, y: float) -> None:
    side = 4 * LINE + 0.1
    hit = query["rank"] == 1
    _picture(ax, query["query"], x, y, side, GREEN if hit else RED, 1.5 if hit else 3.0)
    x += side + 0.15
    width = CELL - side - 0.15
    top = max(float(np.nanmax(query["scores"], initial=0)), 1e-6)
    y += LINE / 2
    for text, score, right in zip(query["answers"], query["scores"], query["right"], strict=True):
        share = float(np.clip(np.nan_to_num(score) / top, 0.01, 1))
        bar = Rectangle((x, y - 0.1), share * width, 0.2, color=PALE_GREEN if right else PALE, linewidth=0)
        ax.add_patch(bar)
        weight = "bold" if right else "normal"
        ax.text(x + 0.06, y, "✓" if right else "", color=INK, fontsize=9, va="center", fontweight="bold")
        ax.text(x + 0.58, y, f"{score:.2f}", color=INK, fontsize=8.5, ha="right", va="center", fontweight=weight)
        _line(ax, text, x + 0.68, y, width - 0.68, INK)
        y += LINE
    if not any(query["right"]):
        ax.text(x + 0.06, y, f"✗ {_place(query['rank'])}", color=RED, fontsize=9, va="center", fontweight="bold")
        _line(ax, query["own"], x + 1.05, y, width - 1.05, RED)


def _best_images(ax: Axes, query: Mapping[str, Any], x: float, y: float) -> None:
    _line(ax, f"“{query['query']}”", x, y + LINE / 2, CELL, INK)
    y += LINE
    for image, score, right in zip(query["answers"], query["scores"], query["right"], strict=True):
        _picture(ax, image, x, y, PICTURE, GREEN if right else PALE, 3.0 if right else 1.0)
        text, colour = (f"✓ {score:.2f}", GREEN) if right else (f"{score:.2f}", GREY)
        _below(ax, text, colour, x, y, right)
        x += PICTURE + 0.1
    if not any(query["right"]):
        x += 0.15
        _picture(ax, query["own"], x, y, PICTURE, RED, 3.0, "--")
        _below(ax, f"✗ {_place(query['rank'])}", RED, x, y, True)


def _line(ax: Axes, text: str, x: float, y: float, width: float, colour: str) -> None:
    """A caption in `width` inches: smaller where it is long, cut where it is too long."""
    text, size = " ".join(text.split()), 9.0
    signs = width / 0.074  # of that size
    size *= min(1, max(signs / max(len(text), 1), 0.78))
    ax.text(x, y, _short(text, int(signs / 0.78)), color=colour, fontsize=size, va="center")


def _below(ax: Axes, text: str, colour: str, x: float, y: float, bold: bool) -> None:
    ax.text(
        x + PICTURE / 2, y + PICTURE + LINE / 2, text, color=colour, fontsize=8.5, ha="center", va="center",
        fontweight="bold" if bold else "normal",
    )  # fmt: skip


def _picture(
    ax: Axes,
    image: np.ndarray,
    x: float,
    y: float,
    side: float,
    colour: str,
    line: float,
    style: str = "-",
    smooth: bool = True,
) -> tuple[float, float, float]:
    """An image in the middle of a square of `side` inches, which it fills along its longer side.

    Returns:
      The left and upper edge of the image, and the inches of a pixel.
    """
    limits, longest = (ax.get_xlim(), ax.get_ylim()), max(image.shape[:2])
    height, width = (side * pixels / longest for pixels in image.shape[:2])
    left, top = x + (side - width) / 2, y + (side - height) / 2
    how = "nearest" if longest < side * DPI / 2 or not smooth else "antialiased"
    ax.imshow(image, extent=(left, left + width, top + height, top), interpolation=how, aspect="auto", vmin=0, vmax=255)
    ax.set(xlim=limits[0], ylim=limits[1])  # which imshow has set to the image
    frame = Rectangle((x, y), side, side, fill=False, edgecolor=colour, linewidth=line, linestyle=style, clip_on=False)
    ax.add_patch(frame)
    return left, top, side / longest


def _matrix(cells: np.ndarray, names: Sequence[str], title: str) -> Figure:
    count = len(names)
    matrix = np.zeros((count, count), np.int64)
    matrix[cells[:, 0], cells[:, 1]] = cells[:, 2]
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    cell = 0.55 if count <= NUMBERS else 0.26
    side = max(cell * count, 2.5)
    figure = Figure(figsize=(side + 3.2, side + 2.4), layout="constrained", dpi=DPI)
    ax = figure.subplots()
    heat = ax.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ax.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=8.5, color=INK)
    ax.set_yticks(range(count), names, fontsize=8.5, color=INK)
    ax.set_xlabel("guess", color=GREY, fontsize=10)
    ax.set_ylabel("class", color=GREY, fontsize=10)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(count + 1) - 0.5, minor=True)
    ax.set_yticks(np.arange(count + 1) - 0.5, minor=True)
    ax.grid(which="minor", color="white", linewidth=1.5)
    ax.tick_params(which="minor", length=0)
    if count <= NUMBERS:
        for row, column in np.argwhere(matrix):
            dark = shares[row, column] > 0.55
            ax.text(
                column, row, f"{shares[row, column]:.0%}", ha="center", va="center", fontsize=7.5,
                color="white" if dark else INK, fontweight="bold" if row == column else "normal",
            )  # fmt: skip
    bar = figure.colorbar(heat, ax=ax, shrink=0.6, format=lambda share, _: f"{share:.0%}")
    bar.set_label("of the class's images", color=GREY, fontsize=9)
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=0, labelsize=8.5, labelcolor=INK)
    figure.suptitle(f"{title}\n" * bool(title) + _share_right(cells), color=INK, fontsize=11)
    return figure


def _largest(cells: np.ndarray, names: Sequence[str], title: str) -> Figure:
    totals = np.bincount(cells[:, 0], cells[:, 2], minlength=len(names)).astype(int)
    wrong = cells[cells[:, 0] != cells[:, 1]]
    most = wrong[np.argsort(-wrong[:, 2], kind="stable")][:LISTED]
    figure = Figure(figsize=(9, 0.27 * max(len(most), 2) + 1.2), layout="constrained", dpi=DPI)
    ax = figure.subplots()
    places, values = np.arange(len(most)), most[:, 2] / totals[most[:, 0]]
    ax.barh(places, values, color=BLUE, height=0.62)
    for place, (label, _, count), value in zip(places, most, values, strict=True):
        ax.text(value, place, f" {value:.0%}  ({count} of {totals[label]})", va="center", fontsize=8.5, color=GREY)
    ax.set_yticks(places, [f"{names[c]}  →  {names[g]}" for c, g, _ in most], fontsize=8.5, color=INK)
    ax.set(ylim=(len(most) - 0.4, -0.6), xlim=(0, 1.3 * max(values, default=1)), xticks=[])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_title("the most frequent confusions, class → guess", loc="left", color=INK, fontsize=10)
    figure.suptitle(f"{title}\n" * bool(title) + _share_right(cells), color=INK, fontsize=11)
    return figure


def _share_right(cells: np.ndarray) -> str:
    return f"{cells[cells[:, 0] == cells[:, 1], 2].sum():,} of {cells[:, 2].sum():,} images right"


def _place(rank: float) -> str:
    return f"rank {rank:,.0f}" if np.isfinite(rank) else "no rank"


def _short(text: str, length: int) -> str:
    """One line of at most `length` signs."""
    text = " ".join(text.split())
    return drawable(text if len(text) <= length else text[: length - 1] + "…")
