"""The model card of an exported model: README.md, whose header hubs read.

It says what the run's folder says: the recipe, the data, the steps, and what its evaluations have found, in words and,
in the header, in the fields of Hugging Face's hub.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from visionfm_jax.api import Model
from visionfm_jax.config import EvalConfig
from visionfm_jax.errors import UserError, printable
from visionfm_jax.interop.files import read_json
from visionfm_jax.interop.hub import Folder, Trained
from visionfm_jax.models.clip import ClipConfig
from visionfm_jax.telemetry.writers import read_metrics
from visionfm_jax.train.provenance import read_provenance

TITLES = {"image-classification": "image classifier", "image-feature-extraction": "image encoder",
          "zero-shot-image-classification": "image and text encoder"}  # fmt: skip
# Of evals, as the hub has them; others by their own kind.
_TASKS = {
    **dict.fromkeys(("classification", "knn", "linear_probe"), "image-classification"),
    "zero_shot": "zero-shot-image-classification", "boxes": "object-detection", "captioning": "image-to-text",
    **dict.fromkeys(("instances", "panoptic", "segmentation"), "image-segmentation"),
}  # fmt: skip
_METRICS = {"top1": "accuracy", "miou": "mean_iou"}  # likewise
_TIMM = """import timm
import torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()  # on a hub: "hf-hub:NAME"
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.no_grad():
    out = model(transform(Image.open("cat.jpg").convert("RGB"))[None])  # SHAPE"""
_TRANSFORMERS = """import torch
from PIL import Image
from transformers import AutoImageProcessor, CLASS

model = CLASS.from_pretrained("FOLDER"MORE).eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
with torch.no_grad():
    out = model(**processor(Image.open("cat.jpg"), return_tensors="pt"))RESULT"""
_TWO_TOWERS = """import torch
from PIL import Image
from transformers import AutoImageProcessor, CLASS

model = CLASS.from_pretrained("FOLDER").eval()
processor = AutoImageProcessor.from_pretrained("FOLDER")
with torch.no_grad():
    out = model.get_image_features(**processor(Image.open("cat.jpg"), return_tensors="pt"))"""
_TEXTS = """
    texts = AutoTokenizer.from_pretrained("FOLDER")(["a cat"], padding="max_length", max_length=LENGTH, truncation=True,
                                                    return_tensors="pt")
    text = model.get_text_features(input_ids=texts["input_ids"])"""
_OPEN_CLIP = """import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")  # on a hub: "hf-hub:NAME"
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("cat.jpg"))[None], normalize=True)"""
_OPEN_CLIP_TEXTS = """
    tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")
    text = model.encode_text(tokenizer(["a cat"]), normalize=True)"""

_PROGRAMS = """import jax  # pip install jax flatbuffers safetensors
import numpy as np
from jax import export
from safetensors.numpy import load_file

weights = load_file("FOLDER/model.safetensors")
with open("FOLDER/images.stablehlo", "rb") as file:
    encode_images = jax.jit(export.deserialize(bytearray(file.read())).call)
images = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)  # any number of RGB images of this size
out = encode_images(weights, images)  # a dictionary of arrays: OUTPUTS"""
_TEXT_PROGRAM = """
with open("FOLDER/texts.stablehlo", "rb") as file:
    encode_texts = jax.jit(export.deserialize(bytearray(file.read())).call)
tokens = np.zeros((3, LENGTH), np.int32)  # any number of texts, as ids of the tokenizer, zeros behind them
text = encode_texts(weights, tokens)["text_embedding"]"""


_ONNX = """import numpy as np
import onnxruntime  # pip install onnxruntime

onnxruntime.set_default_logger_severity(3)  # else it names each constant that it drops
encode_images = onnxruntime.InferenceSession("FOLDER/images.onnx")
images = np.zeros((3, HEIGHT, WIDTH, 3), np.uint8)  # any number of RGB images of this size
out = dict(zip([OUTPUTS], encode_images.run([OUTPUTS], {"images": images})))"""
_TEXT_ONNX = """
encode_texts = onnxruntime.InferenceSession("FOLDER/texts.onnx")
tokens = np.zeros((3, LENGTH), np.int32)  # any number of texts, as ids of the tokenizer, zeros behind them
[text] = encode_texts.run(["text_embedding"], {"texts": tokens})"""


def card(
    model: Model, folder: Folder, trained: Trained, notes: Sequence[str], license: str, tokenized: bool = False
) -> str:
    """The text of README.md.

    Args:
      model: that was exported.
      folder: what was made of it.
      trained: what of it that was.
      notes: sentences for people, without their full stops.
      license: of the weights, as hubs name it.
      tokenized: the library reads texts as the model does.
    """
    config = model.config
    two_towers = isinstance(trained.config, ClipConfig)
    task = "image-classification" if trained.names else "image-feature-extraction"
    task = "zero-shot-image-classification" if two_towers else task
    tags = dict.fromkeys([task, folder.library, "visionfm_jax"])
    size = " x ".join(map(str, trained.pixels.size))
    kind = getattr(config.task, "kind", type(config.task).__name__)
    averaged = f", averaged over steps with decay {config.optim.ema:g}" if config.optim.ema else ""
    count = sum(tensor.size for tensor in folder.tensors.values() or jax.tree.leaves(trained.params))
    converted = config.checkpoint.weights  # of another library: `api.load`
    facts = {
        "network": f"{type(config.model).__name__}, {count:,} parameters, images of {size} pixels",
        "pixels": f"(value / 255 - {_numbers(trained.pixels.mean)}) / {_numbers(trained.pixels.std)}",
    }
    training = {
        "objective": kind, "weights": f"after step {model.step:,} of {config.total_steps:,}{averaged}",
        "batch": f"{config.train.batch_size:,}", "precision": config.train.precision,
        "learning rate": f"{config.optim.lr:g}, weight decay {config.optim.weight_decay:g}",
    }  # fmt: skip
    measured = [] if converted else _measured(model)
    about = ["Data:", "", *(_data(model) or ["- not known"]), "", "## Evaluation", "", *_table(measured)]
    header = {"license": license, "library_name": folder.library, "pipeline_tag": task, "tags": list(tags)}
    if not converted:
        header |= {"datasets": _datasets(model) or None, "recipe": training}
    if converted:
        training = {"weights": f"converted from {Path(converted).name}"}
        about = ["How they were trained and evaluated, and their licence, is what their own model card says."]
    parts = [
        "---", _yaml(header, config.name, measured), "---", "",
        f"# {_plain(config.name)}", "",
        f"An {TITLES[task]}, {'converted' if converted else 'trained'} with visionfm_jax and written for "
        f"{folder.library}.", "",
        "## Open it", "", "```python", _code(folder, trained, tokenized), "```", "", *(f"{note}.\n" for note in notes),
        "## Weights" if converted else "## Training", "",
        "| | |", "|---|---|", *(f"| {name} | {_plain(v)} |" for name, v in (facts | training).items()), "",
        *about,
    ]  # fmt: skip
    return "\n".join(parts).rstrip() + "\n"


def _code(folder: Folder, trained: Trained, tokenized: bool) -> str:
    """How the folder is opened."""
    if folder.library in ("jax", "onnx"):
        about = folder.texts["config.json"]
        height, width, _ = about["images"]
        jaxs = folder.library == "jax"
        outputs = ", ".join(about["outputs"] if jaxs else map(json.dumps, about["outputs"]))
        code = (_PROGRAMS if jaxs else _ONNX) + (_TEXT_PROGRAM if jaxs else _TEXT_ONNX) * ("tokens" in about)
        sizes = {"HEIGHT": height, "WIDTH": width, "LENGTH": about.get("tokens"), "OUTPUTS": outputs}
        return functools.reduce(lambda text, name: text.replace(name, str(sizes[name])), sizes, code)
    if folder.library == "timm":
        shape = f"(1, {len(trained.names)}), logits" if trained.names else "pooled features"
        return _TIMM.replace("SHAPE", shape)
    if folder.library == "open_clip":
        return _OPEN_CLIP + _OPEN_CLIP_TEXTS * tokenized
    settings = folder.texts["config.json"]
    name = settings["architectures"][0]
    if isinstance(trained.config, ClipConfig):
        code = _TWO_TOWERS + _TEXTS.replace("LENGTH", str(trained.config.text.context)) * tokenized
        return code.replace("CLASS", f"AutoTokenizer, {name}" if tokenized else name, 1).replace("CLASS", name)
    more = ", add_pooling_layer=False" if name == "ViTModel" else ""
    result = ".logits" if trained.names else ".last_hidden_state[:, 0]" if name == "ViTModel" else ".pooler_output"
    return _TRANSFORMERS.replace("CLASS", name).replace("MORE", more).replace("RESULT", result)


def _data(model: Model) -> list[str]:
    """A line for each dataset of training; of a path its last part alone."""
    kept = read_provenance(Path(model.config.folder)).data.get("sources", [])
    lines = []
    for i, source in enumerate(model.config.data.train):
        known = kept[i] if i < len(kept) and isinstance(kept[i], dict) else {}
        facts = [getattr(source, "split", "") and f"split {source.split}"]
        facts += [f"{known['records']:,} records"] if isinstance(known.get("records"), int) else []
        facts += [f"{len(known['classes']):,} classes"] if known.get("classes") else []
        name = Path(source.path.rstrip("/")).name or source.path
        kind = getattr(source, "kind", type(source).__name__)
        lines.append(f"- {_plain(name)} ({kind}): {_plain(', '.join(filter(None, facts)))}".rstrip(": "))
    return lines


def _datasets(model: Model) -> list[str]:
    """The names of the training data that can be names on a hub."""
    names = (Path(source.path.rstrip("/")).name or source.path for source in model.config.data.train)
    return [name for name in dict.fromkeys(names) if re.fullmatch(r"[\w.-]+", name, re.ASCII)]


class _Measured(NamedTuple):
    """What an eval of the run has found: `step` and `protocol` may be empty."""

    config: EvalConfig
    step: int | str
    protocol: str
    metrics: dict[str, float]


def _yaml(header: dict[str, Any], name: str, measured: Sequence[_Measured]) -> str:
    """What the hub reads: `header`, and the evaluations as its `model-index`, by the hub's own library."""
    from huggingface_hub import EvalResult, ModelCardData  # here: bare GPU images, which export nothing, lack it

    results = [
        EvalResult(
            task_type=_TASKS.get(one.config.kind, one.config.kind),
            task_name=one.config.kind,
            dataset_type=one.config.source.kind,
            dataset_name=printable(Path(one.config.source.path.rstrip("/")).name or one.config.source.path),
            dataset_split=one.config.source.split or None,
            metric_type=_METRICS.get(metric, metric),
            metric_name=metric,
            metric_value=value,
            metric_args={"protocol": one.protocol, "step": one.step, "eval": one.config.name},
        )
        for one in measured
        if one.config.kind != "pixel_baseline"  # which is no number of the model
        for metric, value in one.metrics.items()
        if math.isfinite(value)
    ]
    return ModelCardData(**header, model_name=printable(name), eval_results=results or None).to_yaml().strip()


def _measured(model: Model) -> list[_Measured]:
    """What the run's evaluations have found; of one without details, what the metrics of training say."""
    folder, out = Path(model.config.folder), []
    last: dict[str, tuple[int, Any]] = {}
    for row in read_metrics(folder):
        last |= {name: (row["step"], value) for name, value in row.items() if name != "step"}
    for one in model.config.evals:
        found = _details(folder / f"eval_{one.name}.json")
        metrics, step = found.get("metrics"), found.get("step", "")
        if not isinstance(metrics, dict):
            prefix = f"{one.name}/"
            own = {name.removeprefix(prefix): v for name, v in last.items() if name.startswith(prefix)}
            metrics, step = {k: v for k, (_, v) in own.items()}, max((s for s, _ in own.values()), default="")
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        out.append(_Measured(one, step, str(found.get("protocol", "")), numbers))
    return out


def _table(measured: Sequence[_Measured]) -> list[str]:
    rows = [
        f"| {one.config.name} | {one.step} | {one.protocol} | {k} | {v:.6g} |"
        for one in measured
        for k, v in one.metrics.items()
    ]
    if not rows:
        return ["There is none in the run's folder."]
    head = ["| evaluation | step | protocol | metric | value |", "|---|--:|---|---|--:|"]
    return [*head, *map(_plain_row, rows), "", "Numbers of the same protocol were measured in the same way."]


def _details(path: Path) -> dict[str, Any]:
    """Of an evaluation; {}: not there, or damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}


def _numbers(values: Sequence[float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def _plain(text: str) -> str:
    """For a table of Markdown."""
    return printable(str(text)).replace("|", "/")


def _plain_row(row: str) -> str:
    return printable(row)
