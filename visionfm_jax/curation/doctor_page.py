"""What `visionfm data doctor` found as one HTML page: findings, histograms, and images with what is known of them.

Shapes: H W image, N objects.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np
from PIL import Image

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.curation.checks import Finding, Study, remarks
from visionfm_jax.curation.survey import Part, label_counts
from visionfm_jax.data.chain import FAILS, Chain
from visionfm_jax.data.loader import DAMAGED
from visionfm_jax.data.sources import Source, read_record
from visionfm_jax.errors import printable
from visionfm_jax.telemetry.page import document, section, table
from visionfm_jax.telemetry.pictures import class_colours

PICTURES = 12  # of a dataset, as they are stored and as training sees them
SIDE = 224  # pixels of a picture
BARS = 24  # of a histogram
MANY = 200  # classes up to which a bar is one class
TEXT = 160  # characters of a caption


def page(study: Study, found: Sequence[Finding]) -> str:
    """The whole page."""
    rows = [[f.severity, f.where, " · ".join([f.what, *f.examples]), f.remedy] for f in found]
    body = [
        f"<h1>Data of {_e(study.config.name)}</h1>",
        section("Findings", table(["", "where", "what", "remedy"], rows, "..ww") or "<p>Nothing was found.</p>"),
        section("Datasets", _datasets(study)),
        *(_part(study, part) for part in study.opened),
    ]
    return document(f"Data of {study.config.name}", body)


def _datasets(study: Study) -> str:
    rows = []
    for part in study.parts:
        if part.source is None:
            rows.append([f"{part.config.kind} {part.config.path}", part.where, "cannot be opened", "", ""])
            continue
        numbers = len(part.source), len(part.survey.rows), len(part.survey.reasons)
        rows.append([part.source.name, part.where, *(f"{n:,}" for n in numbers)])
    said = "".join(f"<p>{_e(remark)}</p>" for remark in remarks(study))
    return table(["dataset", "in", "records", "read", "damaged"], rows, "..nnn") + said


def _part(study: Study, part: Part) -> str:
    chosen = part.survey.good["index"]
    chosen = chosen[np.linspace(0, len(chosen) - 1, min(PICTURES, len(chosen))).astype(int)]
    whole = Chain((PreprocessConfig(crop=1.0, resize="pad"),), SIDE, study.config.data.max_pixels, exact=True)
    sheets = [_sheet("As they are stored", part.source, chosen, whole)]
    if part.trained:
        config = study.config
        seen = Chain(config.data.transforms, config.model.image_size, config.data.max_pixels)
        sheets.append(_sheet("As the transforms make them; the device augments further", part.source, chosen, seen))
    return section(part.source.name, f'<div class="panels">{"".join(_histograms(part))}</div>', *sheets)


def _sheet(title: str, source: Source, chosen: np.ndarray, chain: Chain) -> str:
    figures = []
    for index in chosen.tolist():
        try:
            sample = chain(read_record(source, index), np.random.default_rng(index))
        except (*DAMAGED, *FAILS):
            continue
        views = [sample["image"][None]] if "image" in sample else [sample[name] for name in chain.spec]
        first = [pixels[0] for pixels in views]
        shown = (_jpeg(drawn(pixels, sample, source)) for pixels in first)
        images = "".join(f'<img alt="" style="width:100%" src="{image}"/>' for image in shown)
        figures.append(f"<figure>{images}<figcaption>{_e(_about(source, index, sample))}</figcaption></figure>")
    if not figures:
        return ""
    grid = "display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px"
    return f'<h3 style="margin:1.2em 0 .5em">{_e(title)}</h3><div style="{grid}">{"".join(figures)}</div>'


def drawn(image: np.ndarray, sample: Mapping[str, Any], source: Source) -> np.ndarray:
    """An image uint8 (H, W, 3), resized to `SIDE` pixels along, with its objects and classes drawn on it."""
    scale = SIDE / max(image.shape[:2])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
    out = cv2.resize(image, size, interpolation=how).astype(np.float32)
    classes = source.num_classes
    if not {"class_map", "box_labels"} & sample.keys():
        return out.astype(np.uint8)
    colours = class_colours(classes, range(classes))
    if "class_map" in sample:
        shown = cv2.resize(sample["class_map"].astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(int)
        out = 0.4 * out + 0.6 * colours[np.where(shown < classes, shown, classes)]
    boxes, labels = sample.get("boxes", np.zeros((0, 4))), sample.get("box_labels", ())
    for i, label in enumerate(labels):
        colour = colours[label if 0 <= label < classes else -1]
        if "masks" in sample:
            inside = cv2.resize(sample["masks"][i].astype(np.uint8), size, interpolation=cv2.INTER_NEAREST) > 0
            out[inside] = 0.4 * out[inside] + 0.6 * colour
        left, top, right, bottom = np.round(boxes[i] * scale).astype(int).tolist()
        cv2.rectangle(out, (left, top), (right - 1, bottom - 1), colour.tolist(), 2)
    return out.round().astype(np.uint8)


def _about(source: Source, index: int, sample: Mapping[str, Any]) -> str:
    """Its name, its class, its captions and the classes of its objects."""
    parts = [source.key(index)]
    if "label" in sample:
        parts.append(f"class {_name(source, sample['label'])}")
    if "caption" in sample:
        captions = sample["caption"] if isinstance(sample["caption"], tuple) else (sample["caption"],)
        texts = [c.decode(errors="replace") if isinstance(c, bytes) else str(c) for c in captions]
        text = " | ".join(texts)
        parts.append(text if len(text) <= TEXT else text[: TEXT - 1] + "…")
    if "box_labels" in sample:
        names = sorted({_name(source, label) for label in sample["box_labels"]})
        parts.append(f"{len(sample['box_labels'])} objects: {', '.join(names[:6])}{' …' * (len(names) > 6)}")
    if "class_map" in sample:
        names = [_name(source, c) for c in np.unique(sample["class_map"]) if c < source.num_classes]
        parts.append(f"{', '.join(names[:6])}{' …' * (len(names) > 6)}")
    return " · ".join(parts)


def _name(source: Source, label: int) -> str:
    names = source.class_names or ()
    return printable(names[label]) if 0 <= label < len(names) else str(label)


def _jpeg(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _histograms(part: Part) -> list[str]:
    rows = part.survey.good
    if not len(rows):
        return []
    height, width = rows["height"].astype(float), rows["width"].astype(float)
    charts = [
        histogram("shorter side, pixels", np.minimum(height, width)),
        histogram("width / height", width / height),
    ]
    if (rows["tokens"] > 0).any():
        charts.append(histogram("tokens of a caption", rows["tokens"]))
    if (rows["objects"] > 0).any():
        charts.append(histogram("objects on an image", rows["objects"]))
    if "class_map" in getattr(part.source, "classes_of", ()):
        charts.append(histogram("share of a map's pixels that are of no class", rows["unclassed"]))
    if part.survey.classes and part.source.num_classes:
        counts, _ = label_counts(part, part.source.num_classes)
        if len(counts) > MANY:
            charts.append(histogram("images or objects of a class", counts))
        else:
            names = [f"{_name(part.source, i)}: {n:,}" for i, n in enumerate(counts)]
            charts.append(_bars("images or objects of each class", counts, names, ("0", str(len(counts) - 1))))
    return charts


def histogram(title: str, values: np.ndarray) -> str:
    """A <figure> of how many values lie where."""
    low, high = float(np.min(values)), float(np.max(values))
    counts, edges = np.histogram(values, BARS, (low, high if high > low else low + 1))
    says = [f"{a:.4g} to {b:.4g}: {n:,}" for a, b, n in zip(edges, edges[1:], counts, strict=False)]
    return _bars(title, counts, says, (f"{edges[0]:.4g}", f"{edges[-1]:.4g}"))


def _bars(title: str, counts: np.ndarray, says: Sequence[str], ends: tuple[str, str]) -> str:
    """A <figure> of a bar for each count, with what each says when it is pointed at."""
    width, height, below, highest = 420, 150, 18, max(int(counts.max()), 1)
    step = width / len(counts)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{(height - below) * (1 - n / highest):.1f}" width="{max(step - 1, 0.5):.1f}" '
        f'height="{(height - below) * n / highest:.1f}" style="fill:var(--c0)"><title>{_e(say)}</title></rect>'
        for i, (n, say) in enumerate(zip(counts.tolist(), says, strict=True))
    )
    axis = f'<text x="0" y="{height - 4}">{_e(ends[0])}</text>'
    axis += f'<text x="{width}" y="{height - 4}" text-anchor="end">{_e(ends[1])}</text>'
    picture = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{_e(title)}">{bars}{axis}</svg>'
    most = f"<figcaption>highest bar: {highest:,}</figcaption>"
    return f'<figure class="chart"><h3>{_e(title)}</h3>{picture}{most}</figure>'


def _e(text: str) -> str:
    return html.escape(printable(text))
