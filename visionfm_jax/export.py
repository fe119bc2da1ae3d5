"""Write a trained model, of a run or of another library, as a folder that another library opens.

    visionfm export runs/vit_huge --to=timm --out=exported/vit_huge
    visionfm export runs/vit_huge --to=transformers --out=exported/vit_huge
    visionfm export runs/clip --to=open_clip --out=exported/clip
    visionfm export runs/vit_huge --to=stablehlo --out=exported/vit_huge
    visionfm export runs/vit_huge --to=onnx --out=exported/vit_huge

The folder holds the newest weights (of the moving average where the run has one) in safetensors, the settings of the
network and of the preprocessing of images, the names of the classes, a tokenizer where there are texts and the library
has a place for it, and README.md, a model card that says how it was trained and evaluated, and how to open it.

timm: the backbone, with its classifier if it was trained on classes; of two towers, that of images. transformers: the
same, or CLIP and SigLIP with both towers. open_clip: both towers. A network that the library does not have is refused.
stablehlo: networks of images, as programs that need JAX alone (`visionfm_jax.programs`), for batches of any size. onnx:
ViTs and CLIPs of them, likewise, for ONNX Runtime; needs jax2onnx here (docs/export.md).
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from visionfm_jax import parts
from visionfm_jax.api import Model, load
from visionfm_jax.config import BackboneConfig, PreprocessConfig
from visionfm_jax.config.arguments import Parser
from visionfm_jax.config.limits import height_width, shortest
from visionfm_jax.data.tokenizer.files import huggingface_files
from visionfm_jax.errors import ConfigError, UserError, entry_point, one_line, printable
from visionfm_jax.interop.hub import FOLDERS, SETTINGS, Folder, Pixels, Trained, other_pixels, parts_of
from visionfm_jax.interop.resample import resize_positions
from visionfm_jax.logs import quiet_logs
from visionfm_jax.models.backbones.swin_v2 import SwinV2Config
from visionfm_jax.models.backbones.vit import ViTConfig, table_grid
from visionfm_jax.models.layers import no_gather
from visionfm_jax.programs import PLATFORMS, onnx_of, stablehlo_of
from visionfm_jax.storage import is_full, not_written, replacing_folder
from visionfm_jax.tasks.classification import ClassificationConfig
from visionfm_jax.tasks.contrastive import ContrastiveConfig
from visionfm_jax.telemetry.card import card
from visionfm_jax.train.initialise import with_fields

PROGRAMS = ("stablehlo", "onnx")
FORMS = (*FOLDERS, *PROGRAMS)
LARGEST = 5 * 10**9  # bytes of a file, of libraries that read several by an index


def export(
    run: str | Path | Model, to: str, out: str | Path, license: str = "unknown", largest: int = LARGEST
) -> list[str]:
    """Write a trained model as the folder `out`, whole or not at all.

    Args:
      run: a folder that `api.load` takes, or a loaded model.
      to: timm, transformers, open_clip, stablehlo or onnx.
      out: a new or empty folder.
      license: of the weights, as hubs name it, for the model card.
      largest: bytes of a file of weights, where the library reads several.

    Returns:
      What people should know, which the model card says, too.

    Raises:
      ConfigError: `to` or `out` cannot be, or as `api.load`.
      CheckpointError: as `api.load`.
      UserError: the library has no such network, or the folder cannot be written.
    """
    out = Path(out)
    if to not in FORMS:
        raise ConfigError(f"--to={to}: there are {', '.join(FORMS)}; name one of them")
    _require_empty(out)
    model = run if isinstance(run, Model) else load(run)
    trained, notes = _programmed(model, to) if to in PROGRAMS else trained_of(model, to)
    folder, programs = _programs(model, to, trained) if to in PROGRAMS else (_folder(model, to, trained), {})
    extra, about_texts = _tokenizer(model, to, trained, folder)
    notes += [about_texts] if about_texts else []
    notes += [note] if to not in PROGRAMS and (note := other_pixels(folder.library, trained.pixels)) else []
    texts = {name: json.dumps(value, indent=2, ensure_ascii=False) + "\n" for name, value in folder.texts.items()}
    tokenized = bool(about_texts) and "tokenizer.model" not in extra
    texts["README.md"] = card(model, folder, trained, notes, license, tokenized)
    try:
        with replacing_folder(out) as part:
            if folder.tensors:  # else the programs hold them
                _write_weights(part, folder, largest if folder.indexed else sys.maxsize)
            for name, content in {**{name: text.encode() for name, text in texts.items()}, **extra, **programs}.items():
                (part / name).write_bytes(content)
    except (OSError, SafetensorError) as error:
        if not isinstance(error, OSError):  # which says of a full disk in words alone
            error = OSError(errno.ENOSPC if is_full(str(error)) else errno.EIO, one_line(error))
        raise not_written(f"--out={printable(str(out))}", error) from error
    return notes


def _require_empty(out: Path) -> None:
    try:
        if out.is_symlink():
            raise ConfigError(f"--out={printable(str(out))}: is a link; name the folder itself")
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            what = "is a folder that is not empty" if out.is_dir() else "is a file"
            raise ConfigError(f"--out={printable(str(out))}: {what}; name a new one")
        parts.check_writable(out)
    except OSError as error:
        raise not_written(f"--out={printable(str(out))}", error) from error


def trained_of(model: Model, to: str) -> tuple[Trained, list[str]]:
    """What of a model a library is given, at the size of its evaluation's images; and what people should know.

    Raises:
      UserError: it has no network that any library has.
    """
    config, notes = model.config, []
    pixels, note = _pixels(model)
    notes += [note] if note else []
    params, network, names = dict(model.params), config.model, ()
    two_towers = isinstance(config.task, ContrastiveConfig)
    if not (two_towers and to != "timm"):
        if not isinstance(network, BackboneConfig):
            params, network = dict(params["image"]), network.image
        if not isinstance(network, ViTConfig | SwinV2Config):
            raise UserError(f"config.model is a {type(network).__name__}: no other library has it; keep the run")
        kept = _names_of(network) | ({"head"} if isinstance(config.task, ClassificationConfig) else set())
        params = {name: value for name, value in params.items() if name in kept}
        names = model.class_names if "head" in params else ()
        network, params, note = _at_size(network, params, pixels)
    else:
        image, params["image"], note = _at_size(network.image, params["image"], pixels)
        network = dataclasses.replace(network, image=image)
    notes += [note] if note else []
    sigmoid = two_towers and config.task.loss == "sigmoid"
    return Trained(params, network, pixels, names, sigmoid), notes


def _programmed(model: Model, to: str) -> tuple[Trained, list[str]]:
    """The whole of a model, whose programs take images of its evaluation's size; and what people should know."""
    names = model.class_names if "labels" in model.config.task.predictions else ()
    notes = ["The programs normalise the pixels themselves"]
    notes[0] += "; they run on CPUs and on GPUs of NVIDIA" if to == "stablehlo" else " and compute in fp32"
    if to == "stablehlo" and model.config.train.precision == "fp16":
        notes.append("The run was trained in fp16; the programs compute in fp32")
    return Trained(model.params, model.config.model, _pixels(model)[0], names), notes


def _programs(model: Model, to: str, trained: Trained) -> tuple[Folder, dict[str, bytes]]:
    """Weights and settings, and the programs by file."""
    about: dict[str, Any] = {"images": [*trained.pixels.size, 3]}
    if to == "onnx":
        (files, outputs), weights = onnx_of(model), {}
    else:
        weights, files, outputs = stablehlo_of(model)
        about["platforms"] = list(PLATFORMS)
    about["outputs"] = list(outputs)
    if f"texts.{to}" in files:
        about["tokens"] = model.config.model.text.context
    about |= {"class_names": list(trained.names)} if trained.names else {}
    return Folder("onnx" if to == "onnx" else "jax", weights, "model.safetensors", {"config.json": about}), files


def _names_of(network: BackboneConfig) -> set[str]:
    """The first names of a backbone's parameters, beside which a task has others."""
    image = jax.ShapeDtypeStruct((1, *height_width(network.image_size), 3), jnp.float32)
    made = network.make(jnp.float32, no_gather)
    return set(jax.eval_shape(made.init, jax.random.key(0), image)["params"])


def _pixels(model: Model) -> tuple[Pixels, str]:
    """How images of its evaluation become what it is given; and, where no library can say it, what it does."""
    augment, transform = model.config.data.augment, model.transform
    size, how = height_width(transform.size), transform.preprocess
    if type(how) is PreprocessConfig and how.resize != "pad":
        return Pixels(size, augment.mean, augment.std, how.crop, how.resize == "squash", how.interpolation), ""
    what = "fits the whole image and adds grey borders" if type(how) is PreprocessConfig else f"is {type(how).__name__}"
    note = f"The preprocessing of the run's evaluation {what}; the one in this folder squashes the whole image instead"
    return Pixels(size, augment.mean, augment.std, squash=True), note


def _at_size(network: Any, params: Mapping[str, Any], pixels: Pixels) -> tuple[Any, dict[str, Any], str]:
    """A backbone for images of the size of `pixels`, which it computes as it would by itself; and what was resized."""
    size, params = shortest(pixels.size), dict(params)
    if isinstance(network, ViTConfig):
        there, old = dataclasses.replace(network, image_size=size, pos_image_size=0), table_grid(network)
        if "pos_embed" not in params or old == table_grid(there):
            return there, params, ""
        new = table_grid(there)
        params["pos_embed"] = resize_positions(np.asarray(params["pos_embed"]), old, new, network.pos_resize)
        note = f"The position table was resized from {old[0]} x {old[1]} to {new[0]} x {new[1]} patches"
        return there, params, f"{note} ({network.pos_resize}), as the run does for images of this size"
    if isinstance(network, SwinV2Config) and pixels.size != height_width(network.image_size):
        before = {"pretrained_window": network.window, "pretrained_image_size": network.image_size}
        before = {} if network.pretrained_window else before
        return dataclasses.replace(network, image_size=size, **before), params, ""
    return network, params, ""


def _folder(model: Model, to: str, trained: Trained) -> Folder:
    """What the library is given.

    Raises:
      UserError: it has no such network; the line says which one has it.
    """
    try:
        return FOLDERS[to](trained)
    except UserError as error:
        others = [other for other in FOLDERS if other != to and _has(model, other)]
        remedy = f"--to={' or --to='.join(others)} works" if others else "no other library has it either; keep the run"
        remedy += " (transformers opens that folder, too)" if others == ["timm"] and to == "transformers" else ""
        raise UserError(f"--to={to}: {_named(str(error), model)}; {remedy}") from error


def _has(model: Model, to: str) -> bool:
    try:
        SETTINGS[to](trained_of(model, to)[0])
    except UserError:
        return False
    return True


def _named(text: str, model: Model) -> str:
    """With the fields of the run's configuration in place of those of classes."""
    return with_fields(text, model.config).replace(f"{type(model.config.task).__name__}.", "config.task.")


def _tokenizer(model: Model, to: str, trained: Trained, folder: Folder) -> tuple[dict[str, bytes], str]:
    """The files of its tokenizer for a model of two towers, and what to say of it; `folder` learns of them."""
    if to == "timm" or not isinstance(model.config.task, ContrastiveConfig):
        return {}, ""
    name, length = model.config.task.tokenizer, trained.config.text.context
    if to == "open_clip" and name == "clip":
        return {}, "Texts are read by CLIP's tokenizer, OpenCLIP's default"
    files = huggingface_files(name, length)
    if "tokenizer.model" in files:
        begin, end = model.tokenizer.begin, model.tokenizer.end
        return files, (
            "Texts are read by the SentencePiece model `tokenizer.model`, not by the tokenizer that the library would "
            f"choose: a text is {begin}, its ids (at most {length - 2}), {end}, then zeros up to {length} numbers"
        )
    if to == "open_clip":
        text_cfg = folder.texts["open_clip_config.json"]["model_cfg"]["text_cfg"]
        text_cfg["hf_tokenizer_name"] = model.config.name
        return files, "Texts are read by `tokenizer.json`; on a hub, set `hf_tokenizer_name` to the name of the model"
    return files, f"Texts are padded to {length} tokens (`padding='max_length'`), as in training"


def _write_weights(part: Path, folder: Folder, most: int) -> None:
    files = parts_of(folder.tensors, folder.weights, most)
    for file, names in files.items():
        save_file({name: folder.tensors[name] for name in names}, part / file, {"format": "pt"})
        (part / file).chmod(0o666 & ~_umask())  # as all other files; safetensors leaves it to its owner alone
    if len(files) > 1:
        total = sum(tensor.nbytes for tensor in folder.tensors.values())
        by_name = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": by_name}
        (part / f"{folder.weights}.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.export") -> None:
    """Load the run and write the folder."""
    parser = Parser(program, __doc__)
    parser.add_argument("run", help="folder of a run, or of a model of timm, Hugging Face or OpenCLIP")
    parser.add_argument("--to", required=True, help=f"what opens it: {', '.join(FORMS)}")
    parser.add_argument("--out", required=True, help="folder to write; new or empty")
    parser.add_argument("--license", default="unknown", help="of the weights, for the model card (%(default)s)")
    arguments = parser.parse_args(argv)
    quiet_logs()
    for note in export(arguments.run, arguments.to, arguments.out, arguments.license):
        print(f"note: {printable(note)}")
    size = sum(file.stat().st_size for file in Path(arguments.out).iterdir())
    print(f"{arguments.to} folder of {size / 1e6:,.1f} MB: {arguments.out}")


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
