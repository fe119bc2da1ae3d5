"""What may be wrong with the data that a configuration names: a function for each group of findings, all in `CHECKS`.

Severities: "error", training will fail, or learn or measure nonsense; "warning", it will be worse or slower than it
could be; "note", worth knowing.
"""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.config.limits import height_width
from visionfm_jax.config.schema import SourceConfig
from visionfm_jax.curation.survey import (
    SMALL,
    UNLABELLED,
    Flag,
    Part,
    label_counts,
    near_copies,
    repeated,
)
from visionfm_jax.data.fields import Fields, Texts, check_classes, class_names
from visionfm_jax.data.sources import checksums, read_record
from visionfm_jax.data.sources.kinds import BundledConfig, Format, ScenesConfig
from visionfm_jax.data.tokenizer import SHIPPED
from visionfm_jax.errors import DataError, count, printable
from visionfm_jax.parallel.targets import Cluster

SEVERITIES = ("error", "warning", "note")
SHOWN = 5  # examples of a finding
PASSES = 2000  # over a dataset; MAE (He et al. 2022) reads ImageNet-1k 1,600 times
HUGE = 16e6  # pixels of an image that are many for any model
LABEL_SPACES = {
    21_841: "ImageNet-21K, all of 2011", 21_843: "ImageNet-21K as TFDS and AugReg have it", 19_167: "ImageNet-21K, "
    "winter 2021", 10_450: "ImageNet-21K-P, winter 2021", 11_221: "ImageNet-21K-P, 2011", 1_000: "ImageNet-1k",
    365: "Places365", 91: "the ids of COCO, of which 11 are not used", 90: "the ids of COCO, of which 10 are not used",
    80: "COCO", 133: "COCO panoptic", 150: "ADE20K", 20: "Pascal VOC",
}  # fmt: skip
SIZES = {  # records of a set as it was published, by its number of classes (0: any), kind and split
    (1_000, "", "train"): 1_281_167, (1_000, "", "validation"): 50_000, (1_000, "", "val"): 50_000,
    (0, "coco", "train2017"): 118_287, (0, "coco", "val2017"): 5_000,
    (0, "coco_panoptic", "train2017"): 118_287, (0, "coco_panoptic", "val2017"): 5_000,
    (0, "coco_captions", "train2017"): 118_287, (0, "coco_captions", "val2017"): 5_000,
    (0, "ade20k", "training"): 20_210, (0, "ade20k", "validation"): 2_000,
}  # fmt: skip


class Finding(NamedTuple):
    """Something that a person should know before training."""

    severity: str  # one of SEVERITIES
    name: str  # of what was found; stays the same
    where: str  # configuration field
    what: str
    number: int  # of the records, or what else `what` counts; 0: nothing is counted
    examples: tuple[str, ...]
    remedy: str


@dataclass
class Study:
    """What the checks look at.

    Attributes:
      config: of the run.
      parts: the datasets that it names, each once.
      fields: what its task reads of a record; None: it cannot say, for `refused`.
      refused: field of the configuration -> why its part refuses to work.
      rate: images/s that this machine reads, decodes and augments, and on how many cores; None: not measured.
      cluster, flops: that it shall run on, and what a step computes; None: not known.
      parameters: of the model; 0: not known.
    """

    config: Config
    parts: list[Part]
    fields: Fields | None = None
    refused: list[tuple[str, str]] = field(default_factory=list)
    rate: tuple[float, int] | None = None
    cluster: Cluster | None = None
    flops: float = 0.0
    parameters: int = 0

    @property
    def texts(self) -> Texts | None:
        return self.fields if isinstance(self.fields, Texts) else None

    @property
    def trained(self) -> list[Part]:
        """Those that it is trained on that could be opened."""
        return [part for part in self.parts if part.trained and part.source]

    @property
    def opened(self) -> list[Part]:
        return [part for part in self.parts if part.source]

    @property
    def reads_classes(self) -> str:
        """The field of a record that holds the classes that the task learns; empty: it learns none."""
        spec = self.fields.spec if self.fields else {}
        kinds = {"label": "label", "box_labels": "box_labels", "mask_labels": "masks", "class_map": "class_map"}
        return next((kind for name, kind in kinds.items() if name in spec), "")


def has_classes(part: Part, kind: str) -> bool:
    """Whether a dataset has classes of that kind."""
    return bool(part.source.num_classes) and kind in getattr(part.source, "classes_of", ("label",))


# Paths, opening


def named_sources(config: Config) -> Iterator[tuple[str, SourceConfig]]:
    """All datasets of a configuration, and the fields that name them."""
    for i, source in enumerate(config.data.train):
        yield f"data.train[{i}]", source
    for i, e in enumerate(config.evals):
        yield f"evals[{i}].source", e.source
        others = "gallery" if hasattr(e, "gallery") else "sources"
        for k, source in enumerate(s for s in e.sources if s is not e.source):
            yield f"evals[{i}].{others}[{k}]", source


def named_paths(config: Config) -> Iterator[tuple[str, str]]:
    """Fields of a configuration that name files or folders of this machine, and these."""
    for name, source in named_sources(config):
        if isinstance(source, Format) and not isinstance(source, BundledConfig | ScenesConfig):
            yield f"{name}.path", source.path
            yield f"{name}.selection", getattr(source, "selection", "")
    tokenizer = getattr(config.task, "tokenizer", "")
    yield "task.tokenizer", "" if tokenizer in ("clip", *SHIPPED) else tokenizer
    yield "checkpoint.weights", config.checkpoint.weights
    yield "checkpoint.resume", config.checkpoint.resume


def missing_paths(config: Config) -> dict[str, list[str]]:
    """Paths that do not exist, and the fields that name them."""
    out: dict[str, list[str]] = {}
    for name, path in named_paths(config):
        if path and "://" not in path and "\0" not in path and not Path(path).expanduser().exists():
            out.setdefault(path, []).append(f"config.{name}")
    return out


def paths(study: Study) -> Iterator[Finding]:
    """Files and folders that are not there, all of them."""
    for path, fields in missing_paths(study.config).items():
        above = next((p for p in Path(path).expanduser().absolute().parents if p.exists()), Path("/"))
        where = ", ".join(dict.fromkeys(fields))
        what = f"{printable(path)} does not exist (but {above} does)"
        remedy = (
            "run the configuration that makes it first, or set the field"
            if "checkpoint" in where
            else "set the field to where it is on this machine"
        )
        yield Finding("error", "missing", where, what, 0, (), remedy)


class Meaning(NamedTuple):
    """What an error message of a reader means."""

    pattern: str
    name: str
    what: str
    remedy: str


MEANINGS = (
    Meaning(
        r"its label is -|runs from -", "unlabelled", "have no label (-1, as in test sets whose labels are secret)",
        "set a split that has labels",
    ),
    Meaning(
        r"its label is|labels of boxes are|objects have labels", "label_outside", "have a label outside the classes",
        "set config.task.num_classes, or mend the labels",
    ),
    Meaning(
        r"class map has the channels", "map_colours",
        "have maps of several channels: ADE20K's full set codes instances and parts by colours",
        "for ADE20K use ADEChallengeData2016, with 150 classes in grey PNGs; convert other maps to one channel",
    ),
    Meaning(
        r"map has the value|class_map has class", "map_values", "have maps with values that are no class",
        "set num_classes, first or ignore of the source, or mend the maps",
    ),
    Meaning(
        r"(class_map|masks) have \d|its map has \d+ x|annotations are for", "size_differs",
        "have maps, masks or annotations of another size than their image",
        "use the images that were annotated: do not resize or turn them afterwards",
    ),
    Meaning(
        r"caption is not UTF-8", "not_utf8", "have captions that are not UTF-8", "convert the captions to UTF-8",
    ),
    Meaning(
        r"caption is empty|no caption", "empty_caption", "have empty captions", "leave these records out",
    ),
    Meaning(
        r"checksum|differs from what was indexed", "changed", "differ from their checksums",
        "copy them again, or, if they were changed on purpose, make the checksums again",
    ),
    Meaning(
        r"data\.max_pixels", "too_large", "have images of more pixels than config.data.max_pixels",
        "raise it, or shrink these images",
    ),
    Meaning(r"", "unreadable", "cannot be read or decoded", "repair or remove them"),
)  # fmt: skip


def meaning_of(reason: str) -> Meaning:
    """What a reader's error message means; the last of `MEANINGS` fits any."""
    return next(meaning for meaning in MEANINGS if re.search(meaning.pattern, reason))


def opening(study: Study) -> Iterator[Finding]:
    """Datasets that cannot be opened, and what the task, the transforms and the evals say to those that can."""
    lacking = missing_paths(study.config)
    for part in study.parts:
        if part.problem and part.config.path not in lacking and getattr(part.config, "selection", "") not in lacking:
            what, remedy = _told(part.problem)
            meaning, name, full = meaning_of(part.problem), "unusable", full_ade20k(part.config)
            if full:
                name, remedy = "map_colours", MEANINGS[2].remedy
                what = f"{printable(part.config.path)} is ADE20K's full set, whose maps code instances and parts"
            elif meaning.pattern:
                name, remedy = meaning.name, meaning.remedy
            yield Finding("error", name, part.where, what, 0, (), remedy)
    for where, reason in study.refused:
        what, remedy = _told(reason)
        yield Finding("error", "refused", where, what, 0, (), remedy)


def full_ade20k(config: SourceConfig) -> bool:
    """Whether the path is of ADE20K with instances and parts, as ADE20K_2021_17_01 and its like lay it out."""
    path = Path(config.path).expanduser()
    return config.kind == "ade20k" and ((path / "images/ADE").is_dir() or any(path.glob("index_ade20k.*")))


def left_out(study: Study) -> Iterator[Finding]:
    """What a dataset itself warned of when it was opened."""
    for part in study.opened:
        for line in part.said:
            line = line.removeprefix(f"{part.source.name}: ")
            if "checksum" in line:
                continue
            found = re.search(r"left out: ([\d,]+) |(\d+) of \d+ tars are", line)
            number = int((found[1] or found[2]).replace(",", "")) if found else 0
            few = "left out" in line and number < 0.01 * len(part.source)
            remedy = "download, copy or mend what is named, or train without it"
            yield Finding("note" if few else "warning", "left_out", part.where, line, number, (), remedy)


def no_checksums(study: Study) -> Iterator[Finding]:
    """Loose files without checksums."""
    for part in study.opened:
        if part.config.loose_files and checksums.newest(part.config) is None:
            what = f"its {count(len(part.source), 'file')} have no checksums, so a flipped bit may go unnoticed"
            yield Finding("note", "no_checksums", part.where, what, len(part.source), (), f"run {checksums.COMMAND}")


# Counts and damage


def sizes(study: Study) -> Iterator[Finding]:
    """Numbers of records, against the configuration and against the set as it was published."""
    config, parts = study.config, study.trained
    total = sum(len(part.source) for part in parts)
    known, epochs = config.data.num_examples, config.train.epochs
    if known and total != known and len(parts) == len([p for p in study.parts if p.trained]):
        refused = epochs and len(config.data.train) == 1
        what = f"config.data.num_examples = {known:,}, and the training data have {count(total, 'record')}"
        what += "; training refuses this" if refused else "; an epoch is counted by the former"
        severity = "error" if refused else "warning"
        yield Finding(severity, "num_examples", "config.data.num_examples", what, total, (), f"set it to {total}")
    if 0 < total < config.train.batch_size:
        what = f"a batch of {config.train.batch_size:,} is more than the {count(total, 'record')} of the training data"
        yield Finding("warning", "few_records", "config.train.batch_size", what, total, (), "set a smaller batch")
    for part in study.opened:
        for (classes, kind, split), whole in SIZES.items():
            fits = part.source.num_classes == classes if classes else part.config.kind == kind
            if fits and part.config.split == split and (lacking := whole - len(part.source)) > 0:
                what = f"the set as it was published has {whole:,} records; {lacking:,} are missing"
                yield Finding("warning", "incomplete", part.where, what, lacking, (), "download and unpack it again")


def repeats(study: Study) -> Iterator[Finding]:
    """Datasets whose records come again more often than anything is learned from them."""
    config, ratio = study.config, study.config.task.pair_ratio
    named = {name: part for part in study.trained for name in part.fields}
    parts = [named.get(f"config.data.train[{i}]") for i in range(len(config.data.train))]
    if None in parts:
        return
    for i, part in enumerate(parts):
        pool, of_pool = parts, 1.0
        if any(ratio):
            pool = [p for p in parts if p.source.has_captions == part.source.has_captions]
            of_pool = ratio[not part.source.has_captions] / sum(ratio)
        whole = sum(s.weight for s, p in zip(config.data.train, parts, strict=True) if p in pool)
        share = of_pool * config.data.train[i].weight / whole
        passes = share * config.total_steps * config.train.batch_size / len(part.source)
        if passes > PASSES:
            what = f"its {count(len(part.source), 'record')} are read {passes:,.0f} times: {share:.1%} of all samples"
            remedy = f"lower config.data.train[{i}].weight, or train for fewer steps"
            yield Finding("warning", "repeats", f"config.data.train[{i}]", what, int(passes), (), remedy)


def damaged(study: Study) -> Iterator[Finding]:
    """Records that cannot be used, by what is wrong with them."""
    for part in study.opened:
        reasons, read = part.survey.reasons, len(part.survey.rows)
        allowed = study.config.data.max_damaged * read
        chance = 4 * allowed**0.5 + 1 if allowed and read < len(part.source) else 0  # as `data.loader.DamageLog`
        stops = len(reasons) > allowed + chance
        severity = "error" if (part.trained and stops) or len(reasons) == read else "warning"
        by_meaning: dict[Meaning, list[int]] = {}
        for index, reason in reasons.items():
            by_meaning.setdefault(meaning_of(reason), []).append(index)
        for meaning, indices in by_meaning.items():
            named = tuple(f"{part.source.key(i)}: {printable(reasons[i])}" for i in indices[:SHOWN])
            what = f"{_of(len(indices), read)} {meaning.what}"
            what += "; training stops at this share" * (part.trained and stops)
            yield Finding(severity, meaning.name, part.where, what, len(indices), named, meaning.remedy)


# Classes


def classes(study: Study) -> Iterator[Finding]:
    """Classes of the data against those of the task, and those of training against those of evals."""
    kind = study.reads_classes
    wanted = getattr(study.config.task, "num_classes", 0)
    parts = [part for part in study.trained if kind and has_classes(part, kind)]
    for part in study.trained if kind else ():
        if part.config.kind == "coco" and part.source.num_classes in (90, 91):
            what = f"the file lists {part.source.num_classes} categories, with those ids that COCO does not use"
            remedy = "leave unused categories out of the file; labels count its categories in order"
            yield Finding("warning", "coco_ids", part.where, what, part.source.num_classes, (), remedy)
    most = max((part.source.num_classes for part in parts), default=wanted)
    if most < wanted:
        what = f"config.task.num_classes = {_space(wanted)}, and the training data have {_space(most)} classes"
        if most == 80 and wanted in (90, 91):
            what += ": labels count the categories from 0 on without gaps, unlike the ids in the file"
        remedy = f"set it to {most}, or use the data that have them all"
        yield Finding("warning", "label_space", "config.task.num_classes", what, wanted - most, (), remedy)
    for part in study.opened:
        if part.held_out and kind and has_classes(part, kind) and part.source.num_classes != most and most <= wanted:
            what = f"has {_space(part.source.num_classes)} classes, and the training data {_space(most)}"
            remedy = "evaluate on data of the same classes"
            yield Finding("warning", "label_space", part.where, what, 0, (), remedy)
    names = class_names([part.source for part in parts])
    for part in study.opened:
        if kind and has_classes(part, kind):
            try:
                check_classes(part.where, part.source, names)
            except DataError as error:
                what, remedy = _told(str(error).removeprefix(f"{part.where}: "))
                yield Finding("error", "classes_differ", part.where, what, 0, _differing(part, names), remedy)


def _differing(part: Part, names: Sequence[str]) -> tuple[str, ...]:
    pairs = enumerate(zip(part.source.class_names, names, strict=False))
    return tuple(f"{i}: {printable(a)} | {printable(b)}" for i, (a, b) in pairs if a != b)[:SHOWN]


def frequencies(study: Study) -> Iterator[Finding]:
    """Classes without an image, and classes that most images have."""
    kind = study.reads_classes
    for part in study.opened:
        if not kind or not has_classes(part, kind) or not (part.trained or part.held_out):
            continue
        counts, all_known = label_counts(part, part.source.num_classes)
        names, total = part.source.class_names or [str(i) for i in range(len(counts))], int(counts.sum())
        what = {"label": "image", "class_map": "map"}.get(kind, "object")
        if total and (all_known or total >= 20 * len(counts)) and (none := np.flatnonzero(counts == 0)).size:
            said = f"{_of(len(none), len(counts))} classes have no {what}" + " among those that were read" * (
                not all_known
            )
            named = tuple(printable(names[i]) for i in none[:SHOWN])
            remedy = "complete the data, or leave the classes out"
            yield Finding("warning", "no_" + what, part.where, said, len(none), named, remedy)
        if part.trained and total >= 20 * len(counts) > 20 and kind != "class_map":
            some = counts[counts > 0]
            largest, share = int(counts.argmax()), counts.max() / total
            said = f"{what}s of a class: {some.min():,} to {some.max():,}, median {np.median(some):,.0f}; "
            said += f"{share:.0%} are of {printable(names[largest])}"
            if share > 0.9 or some.max() > 100 * some.min():
                severity = "warning" if share > 0.9 else "note"
                remedy = "sample classes more evenly by several sources with weights, and look at balanced accuracy"
                yield Finding(severity, "imbalance", part.where, said, 0, (), remedy)


def contradictions(study: Study) -> Iterator[Finding]:
    """Equal images with different labels."""
    for part in study.trained:
        rows = part.survey.good
        rows = rows[rows["label"] != UNLABELLED]
        _, first = np.unique(rows[["digest", "label"]], return_index=True)
        twice = repeated(rows[np.sort(first)], "digest")
        if len(twice):
            what = f"{count(len(twice), 'image')} also occur with another label"
            yield Finding(
                "warning", "contradiction", part.where, what, len(twice), part.keys(twice), "keep one of each"
            )


def order(study: Study) -> Iterator[Finding]:
    """Records that come in the order of the files."""
    if study.config.data.shuffle:
        return
    for part in study.trained:
        labels = part.survey.good["label"]
        is_sorted = len(labels) > 1 and (np.diff(labels) >= 0).all() and labels[0] != labels[-1]
        what = (
            "records come sorted by class, so that a batch has one class" if is_sorted else "records are not shuffled"
        )
        severity = "error" if is_sorted else "note"
        yield Finding(severity, "order", "config.data.shuffle", f"{part.where}: {what}", 0, (), "set it to True")


# Images


class Kind(NamedTuple):
    """A kind of image, by its flag."""

    flag: Flag
    name: str
    severity: str
    what: str
    remedy: str


KINDS = (
    Kind(Flag.GREY, "grey", "note", "are grey; they become three equal channels", "nothing, if that is known"),
    Kind(Flag.PALETTE, "palette", "note", "have a palette", "nothing; Pillow decodes them, slower than JPEG"),
    Kind(Flag.TRANSPARENT, "transparent", "note", "are transparent; they are laid on white", "nothing, if that fits"),
    Kind(Flag.CMYK, "cmyk", "note", "are CMYK; colours are converted without a profile", "convert them to RGB"),
    Kind(Flag.DEEP, "deep", "warning", "have more than 8 bits a channel; the high byte is read", "rescale to 8 bits"),
    Kind(Flag.ANIMATED, "animated", "note", "are animated; the first frame is read", "nothing, if that fits"),
    Kind(Flag.BLANK, "blank", "warning", "are of one colour, such as placeholders of lost images", "leave them out"),
)


def kinds(study: Study) -> Iterator[Finding]:
    """Images that are stored in an unusual way, or show nothing."""
    for part, kind in itertools.product(study.opened, KINDS):
        if len(found := part.survey.having(kind.flag)):
            what = f"{_of(len(found), len(part.survey.rows))} {kind.what}"
            yield Finding(kind.severity, kind.name, part.where, what, len(found), part.keys(found), kind.remedy)


def shapes(study: Study) -> Iterator[Finding]:
    """Images of unusual size or shape."""
    side = min(height_width(study.config.model.image_size))
    for part in study.opened:
        rows = part.survey.good
        short, long = np.minimum(rows["height"], rows["width"]), np.maximum(rows["height"], rows["width"])
        for name, wrong, what, remedy in (
            ("tiny", long < side / 2, f"are smaller than half of the model's {side} pixels, and are enlarged",
             "leave them out, or train at a smaller config.model.image_size"),
            ("huge", rows["height"].astype(np.int64) * rows["width"] > max(HUGE, 64 * side**2),
             "are so large that decoding costs more than the step needs", "store them at a smaller size"),
            ("long", long > 4 * short, "are more than four times as long as wide", "leave them out, or look at crops"),
        ):  # fmt: skip
            if wrong.any():
                found = rows[wrong]
                sizes_ = [f"{k} ({r['height']} x {r['width']})" for k, r in zip(part.keys(found), found, strict=False)]
                severity = "warning" if part.trained and len(found) > 0.5 * len(rows) else "note"
                said = f"{_of(len(found), len(rows))} {what}"
                yield Finding(severity, name, part.where, said, len(found), tuple(sizes_), remedy)


# What lies on images


def maps(study: Study) -> Iterator[Finding]:
    """Class maps in which little or nothing is of a class."""
    for part in study.opened:
        rows = part.survey.good
        if "class_map" not in getattr(part.source, "classes_of", ()) or not len(rows):
            continue
        if len(none := rows[rows["unclassed"] == 1]):
            what = f"{_of(len(none), len(rows))} have maps without a pixel of a class"
            remedy = "check first and ignore of the source, and that the maps are those of the images"
            severity = "error" if len(none) == len(rows) else "warning"
            yield Finding(severity, "unclassed_maps", part.where, what, len(none), part.keys(none), remedy)
        share = float(rows["unclassed"].mean())
        if share > 0.5 and len(none) < len(rows):
            what = f"{share:.0%} of the pixels are of no class"
            remedy = "check num_classes, first and ignore of the source"
            yield Finding("warning", "unclassed_pixels", part.where, what, 0, (), remedy)


def objects(study: Study) -> Iterator[Finding]:
    """Images without objects, and objects of which little can be learned."""
    most = getattr(study.fields, "most", 0)
    for part in study.opened:
        rows = part.survey.good
        if "box_labels" not in getattr(part.source, "classes_of", ()) or not len(rows):
            continue
        single, total = rows["objects"] - rows["crowd"], int(rows["objects"].sum())
        for name, wrong, severity, of_all, what, remedy in (
            ("no_objects", single == 0, "warning" if (single == 0).mean() > 0.5 else "note", 0,
             "have no object (areas of many do not count)", "check the annotations, or leave them out"),
            ("box_outside", rows["outside"] > 0, "warning", 0, "have boxes that are empty, inverted or outside",
             "check their order, left, top, width, height or corners, and their unit"),
            ("empty_mask", rows["empty"] > 0, "warning", 0, "have objects whose mask has no pixel", "mend the masks"),
            ("too_many", (single > most) & bool(most) & part.trained, "warning", 0,
             f"have more than the {most:,} objects that the task learns",
             "raise most_objects or most_masks of config.task"),
            ("small", rows["little"] > 0, "note", int(rows["little"].sum()),
             f"objects are below {SMALL} x {SMALL} pixels of the model's image", "raise config.model.image_size"),
            ("crowd", rows["crowd"] > 0, "note", int(rows["crowd"].sum()),
             "objects are areas of many (crowd, difficult), and are not learned", "nothing, if that is known"),
        ):  # fmt: skip
            if wrong.any():
                said = f"{_of(of_all, total) if of_all else _of(int(wrong.sum()), len(rows))} {what}"
                found = rows[wrong]
                yield Finding(severity, name, part.where, said, of_all or len(found), part.keys(found), remedy)


# Captions


def captions(study: Study) -> Iterator[Finding]:
    """Captions that say little, or that the model reads in part only."""
    length = study.texts.length if study.texts else 0
    for part in study.opened:
        rows = part.survey.good
        if not study.texts or not part.source.has_captions or not len(rows):
            continue
        for flag, name, usual, what, remedy in (
            (Flag.CUT, "cut", 0.1, f"have captions of more than the {length} tokens that the text network reads",
             "raise config.model.text.context, or shorten them"),
            (Flag.WORDLESS, "wordless", 0.01, "have captions without a letter", "leave these records out"),
            (Flag.FILE_NAME, "file_names", 0.01, "have the name of a file as caption", "leave these records out"),
            (Flag.MARKUP, "markup", 0.01, "have captions with HTML or web addresses", "clean the captions"),
        ):  # fmt: skip
            if len(found := rows[rows["flags"] & flag > 0]):
                share = len(found) / len(rows)
                severity = "note" if share <= usual else "warning" if share <= 0.5 or flag == Flag.CUT else "error"
                said = f"{_of(len(found), len(rows))} {what}"
                yield Finding(severity, name, part.where, said, len(found), _texts(part, found), remedy)
        found, numbers = np.unique(rows["text"], return_counts=True)
        often = np.argsort(-numbers, kind="stable")
        often = often[numbers[often] > max(2, 0.01 * len(rows))][:SHOWN]
        if often.size:
            number = int(numbers[often].sum())
            said = f"{_of(number, len(rows))} share the most frequent captions"
            firsts = np.concatenate([rows[rows["text"] == found[i]][:1] for i in often])
            times = [f"{numbers[i]:,} times: {t}" for i, t in zip(often, _texts(part, firsts), strict=True)]
            severity = "error" if part.trained and number > 0.5 * len(rows) else "warning"
            remedy = "leave them out (visionfm data dedup --by=caption): they are wrong negatives of each other"
            yield Finding(severity, "frequent_captions", part.where, said, number, tuple(times), remedy)


def _texts(part: Part, rows: np.ndarray) -> tuple[str, ...]:
    """The first captions of the first of some records."""
    out = []
    for index in rows["index"][:SHOWN].tolist():
        caption = read_record(part.source, index)["caption"]
        caption = caption[0] if isinstance(caption, tuple) else caption
        text = caption.decode(errors="replace") if isinstance(caption, bytes) else caption
        text = printable(" ".join(text.split()))
        out.append(text if len(text) <= 80 else text[:79] + "…")
    return tuple(out)


# Duplicates


def duplicates(study: Study) -> Iterator[Finding]:
    """Datasets, files and images that occur more than once in the training data."""
    for part in study.trained:
        if len(again := [name for name in part.fields if name.startswith("config.data.train")]) > 1:
            what, remedy = f"is the data of {again[0]} once more", "name it once, with a weight"
            yield Finding("warning", "named_twice", ", ".join(again[1:]), what, len(part.source), (), remedy)
    for part, other in itertools.combinations(study.trained, 2):
        if _same(part.config, other.config) and part.source.has_captions == other.source.has_captions:
            what = f"is the data of {part.where} once more"
            yield Finding(
                "warning", "named_twice", other.where, what, len(other.source), (), "name it once, and weigh it"
            )
    for part in study.trained:
        if hasattr(part.source, "file"):
            files = np.array([hash(part.source.file(i)) for i in range(len(part.source))])
            _, first = np.unique(files, return_index=True)
            again = np.delete(np.arange(len(files)), first)
            if len(again):
                what = f"{_of(len(again), len(files))} name a file that another record names"
                named = tuple(part.source.key(int(i)) for i in again[:SHOWN])
                yield Finding("warning", "duplicate_files", part.where, what, len(again), named, "list each file once")
        rows = part.survey.good
        again = repeated(rows, "digest")
        if len(again):
            what = f"{_of(len(again), len(rows))} have the same image, byte for byte, as another record"
            severity = "warning" if len(again) > 0.01 * len(rows) else "note"
            remedy = "leave them out; visionfm data dedup finds all, near copies too"
            yield Finding(severity, "duplicates", part.where, what, len(again), part.keys(again), remedy)


def overlap(study: Study) -> Iterator[Finding]:
    """Evaluation data in the training data."""
    for part in study.opened:
        if not part.held_out:
            continue
        remedy = "leave them out of the training data, as the scores are too high"
        if part.trained or any(_same(part.config, other.config) for other in study.trained):
            what = "evaluates on the training data"
            remedy = "set another split"
            yield Finding("error", "trained_on", part.where, what, len(part.source), (), remedy)
            continue
        rows = part.survey.good
        for other in study.trained:
            if shared := _shared_records(part, other):
                what = f"{count(len(shared), 'record')} of those read are records of {other.source.name}, too"
                remedy = "choose splits that do not overlap"
                yield Finding("error", "trained_on", part.where, what, len(shared), tuple(shared[:SHOWN]), remedy)
                continue
            learned = other.survey.good
            exact = np.isin(rows["digest"], learned["digest"])
            compared = f"of {len(rows):,} of its images and {len(learned):,} of {other.source.name}"
            if exact.any():
                what = f"{compared}, {count(int(exact.sum()), 'image')} are equal, byte for byte"
                found = part.keys(rows[exact])
                yield Finding("error", "trained_on", part.where, what, int(exact.sum()), found, remedy)
            pairs = [(i, j) for i, j in near_copies(rows, learned) if not exact[i]]
            if pairs:
                number = len(pairs)
                what = f"{compared}, {count(number, 'image')} look alike"
                named = [f"{part.keys(rows[i : i + 1])[0]} | {other.keys(learned[j : j + 1])[0]}" for i, j in pairs]
                severity = "warning" if number > 0.02 * len(rows) else "note"
                yield Finding(severity, "near_trained_on", part.where, what, number, tuple(named[:SHOWN]), remedy)


def _same(one: SourceConfig, other: SourceConfig) -> bool:
    """Whether they are the same records."""
    place = [Path(c.path).expanduser().resolve() if isinstance(c, Format) else c.path for c in (one, other)]
    parts = [(c.kind, c.split, getattr(c, "selection", ""), getattr(c, "seed", 0)) for c in (one, other)]
    return place[0] == place[1] and parts[0] == parts[1]


def _shared_records(part: Part, other: Part) -> list[str]:
    """Of those read, the records that slices of one TFDS split have in common: they have their keys."""
    if part.config.kind != "tfds" or other.config.kind != "tfds" or part.config.path != other.config.path:
        return []
    keys = part.keys(part.survey.rows, len(part.survey.rows))
    learned = set(keys).intersection(map(other.source.key, range(len(other.source))))
    return [key for key in keys if key in learned]


# The machine


def throughput(study: Study) -> Iterator[Finding]:
    """Whether hosts like this machine read as fast as the step learns."""
    if not study.rate or not study.cluster or not study.flops:
        return
    rate, cores = study.rate
    cluster = study.cluster
    seconds = study.flops / cluster.devices / cluster.target.peak_flops
    most = study.config.train.batch_size / cluster.hosts / seconds  # as `cli.data.demand_of`
    if rate < most:
        what = (
            f"{cores} cores of this machine read, decode and augment {rate:,.0f} images/s; a step at the peak of "
            f"{cluster.name} takes {most:,.0f} a host, at half of it {most / 2:,.0f}: "
            f"{most / 2 / rate * cores:,.0f} such cores"
        )
        remedy = "store smaller images, choose cheaper transforms, or hosts with more cores"
        severity = "warning" if rate < most / 2 else "note"
        yield Finding(severity, "throughput", "config.data", what, int(most), (), remedy)


def disk(study: Study) -> Iterator[Finding]:
    """Whether the checkpoints fit."""
    config = study.config
    if not study.parameters or "://" in config.folder:
        return
    copies = config.checkpoint.keep_last + config.checkpoint.keep_best + 1  # the one that is being written
    size = 4 * study.parameters * (3 + (config.optim.ema > 0))  # weights, two moments, averages: fp32
    folder = Path(config.folder).absolute()
    free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
    if free < size * copies:
        what = (
            f"{folder} has {free / 1e9:,.0f} GB free, and {copies} checkpoints of {size / 1e9:,.1f} GB, of "
            f"{study.parameters:,} parameters, need {size * copies / 1e9:,.0f} GB"
        )
        remedy = "set config.workdir to a larger disk, or keep fewer by config.checkpoint.keep_last"
        yield Finding("error", "disk", "config.workdir", what, 0, (), remedy)


CHECKS: tuple[Callable[[Study], Iterator[Finding]], ...] = (
    paths, opening, left_out, no_checksums, sizes, repeats, damaged, classes, frequencies, contradictions, order, kinds,
    shapes, maps, objects, captions, duplicates, overlap, throughput, disk,
)  # fmt: skip


def findings(study: Study) -> list[Finding]:
    """Of all checks, the most severe first."""
    found = [finding for check in CHECKS for finding in check(study)]
    return sorted(found, key=lambda f: SEVERITIES.index(f.severity))


def _told(message: str) -> tuple[str, str]:
    """What an error message says, and its remedy, which stands at its end."""
    what, _, remedy = message.rpartition("; ")
    return (what, remedy) if what else (message, "mend this")


def _of(number: int, total: int) -> str:
    """ "3 of 1,000 (0.3 %)"."""
    return f"{number:,} of {total:,} ({100 * number / max(total, 1):.3g} %)"


def _space(number: int) -> str:
    """A number of classes, and the set that has so many."""
    return f"{number:,}" + (f" ({LABEL_SPACES[number]})" if number in LABEL_SPACES else "")


def remarks(study: Study) -> list[str]:
    """What holds of the whole, for people."""
    out = []
    if study.rate:
        out.append(f"The loader makes {study.rate[0]:,.0f} images/s on {study.rate[1]} cores of this machine.")
    if any(len(part.survey.rows) < len(part.source) for part in study.opened):
        out.append(
            "Not all records were read, so rare damage, duplicates and evaluation images in the training data may be "
            "missed: --samples=0 reads all, and visionfm data dedup compares all."
        )
    return out


def as_json(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """For other programs."""
    return [finding._asdict() for finding in found]
