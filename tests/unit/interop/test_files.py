"""Files of weights: what they hold, and what a damaged or hostile one sets off: one line."""

from __future__ import annotations

import json
import os
import struct
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from visionfm_jax.errors import DataError, UserError
from visionfm_jax.interop import files

ONE = np.float32([[1, 2], [3, 4]])


def written(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file byte by byte."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_floating_tensors_become_fp32(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": ONE, "b": ONE.astype(ml_dtypes.bfloat16), "c": ONE.astype(np.float16), "n": np.arange(3)}, file)
    found = files.read_weights(file)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in found.tensors.items()} == {
        "a": (np.float32, (2, 2)), "b": (np.float32, (2, 2)), "c": (np.float32, (2, 2)), "n": (np.int64, (3,)),
    }  # fmt: skip
    np.testing.assert_array_equal(found.tensors["b"], ONE)
    assert found.digests == {"model.safetensors": files.digest(file)}


def tensor(shape: list, *offsets: int, kind: str = "F32") -> dict:
    return {"dtype": kind, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        ({}, b"", 2**60, "header too large"),
        ({}, b"", 90_000_000, "invalid header length"),
        ({"a": tensor([2**20, 2**20], 0, 2**42)}, b"abcd", None, "incomplete metadata"),
        ({"a": tensor([1], 0, 4), "b": tensor([1], 2, 6)}, b"abcdef", None, "invalid offset"),
        ({"a": tensor([2**62, 4], 0, 4)}, b"abcd", None, "overflow"),
        ({"a": tensor([-1], 0, 4)}, b"abcd", None, "expected usize"),
        ({"a": tensor([2**40, 0], 0, 0)}, b"", None, "is empty"),
        (b'{"a":' * 100_000, b"", None, "recursion limit"),
        ({"a": tensor([1], 0, 1, kind="F8_E4M3")}, b"a", None, "of a quantised model"),
        ({"a": tensor([1], 0, 4)}, struct.pack("<f", np.nan), None, "not finite"),
        ({}, b"", None, "holds no tensors"),
    ],
)
def test_a_hostile_file_is_one_line(tmp_path, header, data, length, says):
    file = written(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(UserError, match=says) as error:
        files.read_weights(file)
    assert "\n" not in str(error.value)
    assert error.value.exit_code == 2


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": ONE, "b": ONE}, file)
    content = file.read_bytes()
    for length in range(0, len(content), 7):
        file.write_bytes(content[:length])
        with pytest.raises(UserError, match="not a complete safetensors file"):
            files.read_weights(file)


def test_parts_that_an_index_lists(tmp_path):
    save_file({"a": ONE}, tmp_path / "model-1.safetensors")
    save_file({"b": ONE}, tmp_path / "model-2.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    assert files.file_in(tmp_path, "checkpoint.weights") == index
    found = files.read_weights(index)
    assert (set(found.tensors), set(found.digests)) == ({"a", "b"}, {"model-1.safetensors", "model-2.safetensors"})
    for listed in ("../model-1.safetensors", "/etc/passwd", "config.json"):
        index.write_text(json.dumps({"weight_map": {"a": listed}}))
        with pytest.raises(UserError, match="lists no safetensors files of its folder"):
            files.read_weights(index)
    os.mkfifo(tmp_path / "pipe.safetensors")  # for whose writer nobody waits
    (tmp_path / "folder.safetensors").mkdir()
    for listed in ("pipe", "folder", "missing"):
        index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": f"{listed}.safetensors"}}))
        with pytest.raises(UserError, match=f"names {listed}.safetensors, which is no file of its folder; get"):
            files.read_weights(index)
    index.write_text(json.dumps({"weight_map": {"a": f"{'x' * 300}.safetensors"}}))
    with pytest.raises(DataError, match="File name too long"):
        files.read_weights(index)
    save_file({"a": ONE}, tmp_path / "model-2.safetensors")
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(UserError, match="'a' is in another file, too"):
        files.read_weights(index)


def test_the_file_of_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"config\.w = .*holds neither a run's checkpoints nor weights"):
        files.file_in(tmp_path, "w")
    (tmp_path / "other.bin").touch()
    with pytest.raises(UserError, match=r"name the file: other\.bin"):
        files.file_in(tmp_path, "w")
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).touch()
        assert files.file_in(tmp_path, "w").name == name
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds model\.safetensors and open_clip_model\.safetensors; name the file"):
        files.file_in(tmp_path, "w")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not a weights file by its name"):
        files.file_in(tmp_path / "notes.txt", "w")


def test_what_is_said_beside_a_file(tmp_path):
    assert files.about(tmp_path / "model.safetensors") is None
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    (tmp_path / "config.json").write_text('{"architecture": "vit"}')
    assert files.about(tmp_path / "model.safetensors") == {"architecture": "vit"}
    assert files.about(tmp_path / "open_clip_model.safetensors") == {"model_cfg": {}}
    for text, says in (
        ("[1]", "no JSON object"),
        ("{", "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
        ("", "not valid JSON"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=says):
            files.about(tmp_path / "model.safetensors")


def test_a_torch_file_needs_torch(tmp_path, monkeypatch):
    file = tmp_path / "pytorch_model.bin"
    file.write_bytes(b"-")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"is a file of PyTorch.*pip install torch, or convert it to safetensors"):
        files.read_weights(file)
