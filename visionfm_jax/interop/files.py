"""Files of weights as other libraries write them: arrays by name, and what is said of the model beside them.

Nothing of a file is run: safetensors hold arrays alone, and torch's own files are read by `weights_only` loading.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from visionfm_jax.errors import UserError, one_line
from visionfm_jax.interop.leaves import some
from visionfm_jax.storage import read, read_bytes

# Names of weights in a folder, the preferred first, and of what is said beside them.
NAMES = {
    "config.json": ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"),
    "open_clip_config.json": ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
}
TORCH = (".bin", ".pt", ".pth")
SUFFIXES = (".safetensors", ".safetensors.index.json", *TORCH)
_FLOATS = ("F64", "F32", "F16", "BF16")  # of safetensors
_WHOLE = ("I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
_LARGEST = 2**26  # bytes of a JSON file


class Weights(NamedTuple):
    """The tensors of a file, or of several that belong together."""

    tensors: dict[str, np.ndarray]  # floating ones in fp32
    digests: dict[str, str]  # file -> SHA-256


def file_in(where: Path, field: str) -> Path:
    """The file of weights that `where` is, or that lies in the folder `where`; of `config.FIELD`, for errors.

    Raises:
      UserError: there is none, or several that differ in what they are.
    """
    if where.is_file():
        if where.name.endswith(SUFFIXES):
            return where
        known = ", ".join(SUFFIXES)
        raise UserError(f"config.{field} = {str(where)!r}: is not a weights file by its name ({known}); name one")
    found = [next((where / name for name in names if (where / name).is_file()), None) for names in NAMES.values()]
    there = [path for path in found if path]
    if len(there) == 1:
        return there[0]
    if there:
        both = " and ".join(path.name for path in there)
        raise UserError(f"config.{field} = {str(where)!r}: holds {both}; name the file")
    others = sorted(path.name for path in where.iterdir() if path.name.endswith(SUFFIXES))
    hint = f"name the file: {', '.join(others[:5])}" if others else "name another folder"
    raise UserError(f"config.{field} = {str(where)!r}: holds neither a run's checkpoints nor weights by name; {hint}")


def about(file: Path) -> dict[str, Any] | None:
    """What is said beside `file` of its model; None: nothing.

    Raises:
      UserError: it is no JSON object.
    """
    names = list(NAMES)[:: -1 if file.name.startswith("open_clip") else 1]
    for name in names:
        if (file.parent / name).is_file():
            return read_json(file.parent / name)
    return None


def normalization(file: Path, about: dict[str, Any] | str) -> dict[str, tuple[float, ...]]:
    """`mean` and `std` (3,) of pixels in [0, 1] with which the weights in `file` were trained; {}: nothing says it.

    timm and OpenCLIP say it in their JSON file, `about`; transformers in a file of its own.

    Raises:
      UserError: what is said is no mean or no standard deviation.
    """
    if isinstance(about, str):
        return {}
    said, names = about.get("pretrained_cfg") or about.get("preprocess_cfg"), ("mean", "std")
    if not said and (path := file.with_name("preprocessor_config.json")).is_file():
        said, names = read_json(path), ("image_mean", "image_std")
    if not isinstance(said, dict) or said.get("do_normalize") is False:
        return {}
    values = [said.get(name) for name in names]
    if None in values:
        return {}
    for name, value, least in zip(names, values, (-1e3, 1e-6), strict=True):
        numbers = isinstance(value, list) and len(value) == 3 and {type(x) for x in value} <= {int, float}
        if not numbers or not all(least <= x <= 1e3 for x in value):
            what = "above 0" if least > 0 else "a channel each"
            raise UserError(
                f"{file}: {name} = {value!r:.60} beside it is none of pixels: it needs three numbers, {what}; get the "
                "folder again"
            )
    return dict(zip(("mean", "std"), map(tuple, values), strict=True))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      UserError: it is none.
      DataError, StorageError: it cannot be read.
    """
    if read(path.stat, lambda: str(path)).st_size > _LARGEST:
        raise UserError(f"{path}: is larger than {_LARGEST} bytes; name another file")
    try:
        value = json.loads(read_bytes(path) or b"")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON: {one_line(error)}; get the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds no JSON object; name another file")
    return value


def read_weights(file: Path) -> Weights:
    """All arrays of `file`, or of the files that an index lists.

    Raises:
      UserError: it is damaged, or no such file; torch is not there to read it.
      DataError, StorageError: it cannot be read.
    """
    files = [file]
    if file.name.endswith(".json"):
        listed = read_json(file).get("weight_map")
        names = sorted(set(map(str, listed.values()))) if isinstance(listed, dict) else []
        if not names or any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise UserError(f"{file}: its weight_map lists no safetensors files of its folder; get the folder again")
        files = [file.parent / name for name in names]
        if missing := [part.name for part in files if not read(part.is_file, lambda: str(file))]:
            raise UserError(f"{file}: names {some(missing, 3)}, which is no file of its folder; get the folder again")
    tensors: dict[str, np.ndarray] = {}
    for part in files:
        read_part = _torch_tensors if part.name.endswith(TORCH) else _safetensors
        for name, tensor in read_part(part):
            if name in tensors:
                raise UserError(f"{part}: {name!r} is in another file, too; get the folder again")
            if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
                raise UserError(f"{part}: {name!r} holds numbers that are not finite; use other weights")
            tensors[name] = tensor
    if not tensors:
        raise UserError(f"{file}: holds no tensors; name another file")
    return Weights(tensors, {part.name: digest(part) for part in files})


def digest(file: Path) -> str:
    """SHA-256 of a file.

    Raises:
      DataError, StorageError: it cannot be read.
    """

    def of_content() -> str:
        with open(file, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    return read(of_content, lambda: str(file))


def _safetensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    with _reading(file, lambda: safe_open(file, framework="numpy")) as stored:
        for name in stored.keys():  # noqa: SIM118 (no mapping)
            about = stored.get_slice(name)
            kind, shape = about.get_dtype(), about.get_shape()
            if kind not in _FLOATS + _WHOLE:
                raise UserError(f"{file}: {name!r} is {kind}, of a quantised model; use weights in F32, F16 or BF16")
            if not math.prod(shape):
                raise UserError(f"{file}: {name!r} of shape {tuple(shape)} is empty; get the file again")
            tensor = _reading(file, functools.partial(stored.get_tensor, name))
            yield name, tensor.astype(np.float32, copy=False) if kind in _FLOATS else tensor


def _reading(file: Path, act: Callable[[], Any]) -> Any:
    def reading() -> Any:
        try:
            return act()
        except SafetensorError as error:
            raise UserError(f"{file}: is not a complete safetensors file: {one_line(error)}; get it again") from error

    return read(reading, lambda: str(file))


def _torch_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Of all dicts within dicts, names joined by dots; what is no tensor is no weight."""
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"{file}: is a file of PyTorch, which reads it without running it; pip install torch, or convert it to "
            "safetensors"
        ) from error
    try:
        stored = read(lambda: torch.load(file, map_location="cpu", weights_only=True), lambda: str(file))
    except UserError:
        raise
    except Exception as error:  # whatever a file of a stranger sets off
        raise UserError(
            f"{file}: is damaged, or holds more than tensors, which is not run ({type(error).__name__}); use its "
            "safetensors"
        ) from error

    seen = set()

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
        if not isinstance(node, Mapping) or id(node) in seen:  # dicts may hold each other
            return
        if prefix.count(".") > 20:
            raise UserError(f"{file}: holds dicts within dicts without end; use its safetensors")
        seen.add(id(node))
        for key, value in node.items():
            if not isinstance(value, torch.Tensor):
                yield from walk(value, f"{prefix}{key}.")
                continue
            plain = value.device.type == "cpu" and value.layout == torch.strided and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise UserError(f"{file}: {f'{prefix}{key}'!r} is not a plain array; use its safetensors")
            yield f"{prefix}{key}", (value.detach().float() if value.is_floating_point() else value.detach()).numpy()

    yield from walk(stored, "")
