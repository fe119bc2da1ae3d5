"""Curves as SVG inside a page: text stays text, and the page's style gives the colours."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator

from visionfm_jax.errors import printable
from visionfm_jax.telemetry.report import noisy, running_mean

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 50, 8, 10, 24  # what the axes leave free
COLOURS = 8  # classes k0 … k7 of the page's style
MOST = 2000  # points of a curve
MARKED = 40  # points up to which each is marked, and says its value


@dataclasses.dataclass
class Curve:
    """A series over steps; its values may have NaN and infinities."""

    name: str
    steps: np.ndarray
    values: np.ndarray
    colour: int | None = None  # None: its place among the curves


@dataclasses.dataclass
class Mark:
    """A step where something happened; `kind` is a class of the page's style."""

    step: float
    kind: str
    text: str


def series(rows: Sequence[dict[str, float]], key: str, name: str = "") -> Curve:
    """The curve of one metric."""
    points = [(row["step"], row[key]) for row in rows if key in row]
    steps, values = np.array(points, float).reshape(-1, 2).T
    return Curve(name or key, steps, np.where(np.isfinite(values), np.clip(values, -1e30, 1e30), values))


def chart(title: str, curves: Sequence[Curve], *, log: bool | None = False, marks: Sequence[Mark] = ()) -> str:
    """A <figure> with title, legend and axes; empty where no curve has a finite value.

    Args:
      title: above it.
      curves: as many as shall be drawn.
      log: whether the vertical axis is logarithmic; None: where all is positive and spans a factor of 50.
      marks: vertical lines.
    """
    drawn = [(i, c) for i, c in enumerate(curves) if np.isfinite(c.values).any()]
    if not drawn:
        return ""
    finite = np.concatenate([c.values[np.isfinite(c.values)] for _, c in drawn])
    low, high = float(finite.min()), float(finite.max())
    log = (log is None and low > 0 and high / low > 50) or (log is True and low > 0)
    axes = _Axes(max(1.0, *(float(c.steps.max()) for _, c in drawn)), low, high, log)
    body = [axes.grid(), *(_mark(axes, m) for m in marks if 0 <= m.step <= axes.last)]
    legend = []
    for i, curve in drawn:
        colour = f"k{(i if curve.colour is None else curve.colour) % COLOURS}"
        body.append(_curve(axes, curve, colour))
        newest = curve.values[np.isfinite(curve.values)][-1]
        legend.append(f'<span><i class="{colour}"></i>{_text(curve.name)} <b>{newest:.4g}</b></span>')
    seen = dict.fromkeys(m.kind for m in marks if 0 <= m.step <= axes.last)
    legend += [f'<span><i class="{kind}"></i>{_text(kind)}</span>' for kind in seen]
    scale = " <small>log axis</small>" if log else ""
    return (
        f'<figure class="chart"><h3>{_text(title)}{scale}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{_text(title)}">{"".join(body)}</svg><figcaption>{"".join(legend)}</figcaption></figure>'
    )


class _Axes:
    """Places of steps and values in the picture."""

    def __init__(self, last: float, low: float, high: float, log: bool):
        self.last, self.log = last, log
        if log:
            self.low, self.high = np.log10(low), np.log10(high)
        else:
            pad = 0.04 * (high - low) or 0.1 * abs(high) or 1.0
            self.low = 0.0 if 0 <= low < 0.3 * high else low - pad
            self.high = high + pad
        if not np.isfinite(self.high - self.low) or self.high - self.low <= 0:
            self.low, self.high = self.low - 0.5, self.low + 0.5

    def x(self, steps: np.ndarray | float) -> np.ndarray:
        return LEFT + np.asarray(steps, float) / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, values: np.ndarray | float) -> np.ndarray:
        values = np.asarray(values, float)
        if self.log:
            values = np.log10(np.where(values > 0, values, np.nan))
        return HEIGHT - BOTTOM - (values - self.low) / (self.high - self.low) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> str:
        out = []
        for value in self._ticks():
            at = float(self.y(value))
            if TOP - 1 <= at <= HEIGHT - BOTTOM + 1:
                out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
                out.append(f'<text x="{LEFT - 5}" y="{at + 4:.1f}" text-anchor="end">{_number(value)}</text>')
        for step in MaxNLocator(nbins=5, integer=True, steps=[1, 2, 2.5, 5, 10]).tick_values(0, self.last):
            if 0 <= step <= self.last:
                at, anchor = float(self.x(step)), "end" if step > 0.95 * self.last else "middle"
                out.append(f'<text x="{at:.1f}" y="{HEIGHT - 6}" text-anchor="{anchor}">{_number(step)}</text>')
        return "".join(out)

    def _ticks(self) -> np.ndarray:
        if not self.log:
            return MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        few = self.high - self.low < 2
        return LogLocator(subs=(1, 2, 5) if few else (1,), numticks=6).tick_values(10**self.low, 10**self.high)


def _mark(axes: _Axes, mark: Mark) -> str:
    at = float(axes.x(mark.step))
    return (
        f'<line class="mark {mark.kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}">'
        f"<title>{_text(mark.text)}</title></line>"
    )


def _curve(axes: _Axes, curve: Curve, colour: str) -> str:
    """The line, pale with its running mean where it is noisy, and crosses where it is not finite."""
    steps, values = curve.steps, curve.values
    finite = np.isfinite(values)
    out = []
    if noisy(values[finite]):
        out.append(_line(axes, *thinned(steps, values, MOST // 2), f"{colour} pale"))
        out.append(_line(axes, *thinned(steps, running_mean(values), MOST // 4), colour))
    else:
        out.append(_line(axes, *thinned(steps, values, MOST), colour))
    if finite.sum() <= MARKED:
        for x, y, step, value in zip(
            axes.x(steps[finite]), axes.y(values[finite]), steps[finite], values[finite], strict=True
        ):
            if np.isfinite(y):
                says = f"<title>step {step:,.0f}: {value:.5g}</title>"
                out.append(f'<circle class="{colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{says}</circle>')
    for x in np.unique(np.round(axes.x(steps[~finite]), 0)):  # at most one a pixel
        says = f"<title>{_text(curve.name)} is not finite</title>"
        out.append(f'<text class="lost" x="{x:.0f}" y="{HEIGHT - BOTTOM}" text-anchor="middle">×{says}</text>')
    return "".join(out)


def _line(axes: _Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> str:
    """A path that is interrupted where values are not finite."""
    path, pen = [], "M"
    for x, y in zip(axes.x(steps), axes.y(values), strict=True):
        if np.isfinite(y):
            path.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return f'<path class="{colour}" d="{"".join(path)}"/>' if path else ""


def thinned(steps: np.ndarray, values: np.ndarray, most: int = MOST) -> tuple[np.ndarray, np.ndarray]:
    """At most about `most` points: of each of `most` / 2 pieces the lowest and the highest, so that no spike is lost.

    A piece without a finite value keeps one that is not.
    """
    if len(values) <= most:
        return steps, values
    kept = []
    for piece in np.array_split(np.arange(len(values)), most // 2):
        inside = piece[np.isfinite(values[piece])]
        ends = {inside[np.argmin(values[inside])], inside[np.argmax(values[inside])]} if len(inside) else {piece[0]}
        kept += sorted(ends)
    return steps[kept], values[kept]


def _number(value: float) -> str:
    """Short, for an axis."""
    if value and (abs(value) >= 1e4 or abs(value) < 1e-3):
        for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
            if unit <= abs(value) < unit * 1e4:
                return f"{value / unit:.4g}{sign}"
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:.4g}"


def _text(text: str) -> str:
    return html.escape(printable(text))
