"""Folders of tars and parquets as img2dataset writes them, of bundled pictures."""

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from visionfm_jax.data.sources import claim
from visionfm_jax.data.sources.bundled import read_set


def picture(i: int) -> bytes:
    arrays, _ = read_set("twemoji")
    return arrays["blob"][arrays["offsets"][i] : arrays["offsets"][i + 1]].tobytes()


def caption(i: int) -> str:
    arrays, meta = read_set("twemoji")
    return f"a drawing of {meta['concepts'][arrays['concept'][i]]['name']} \N{SMILING FACE WITH SMILING EYES}"


def members(first: int, count: int, **change: bytes | None) -> dict[str, bytes]:
    """`count` pairs from picture `first` on; `change` replaces captions by key, or drops them with None."""
    out = {}
    for i in range(first, first + count):
        key = f"{i:09d}"
        out[f"{key}.jpg"] = picture(i)
        out[f"{key}.json"] = json.dumps({"key": key, "width": 64}).encode()
        text = change.get(f"k{i}", f" {caption(i)}\n".encode())
        if text is not None:
            out[f"{key}.txt"] = text
    return out


def tar_bytes(files: dict[str, bytes]) -> bytes:
    """A tar as WebDataset's writer makes it: streamed, with a fraction in the time, so with an extended header each."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1700000000.25
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tars(folder: Path, tars: int = 3, pairs: int = 4) -> Path:
    """Tar t holds the pictures t * 100 … t * 100 + pairs - 1."""
    folder.mkdir(parents=True, exist_ok=True)
    for t in range(tars):
        (folder / f"{t:05d}.tar").write_bytes(tar_bytes(members(t * 100, pairs)))
    return folder


def write_parquet(path: Path, **columns: list) -> None:
    pq.write_table(pa.table(columns), path)


def cannot_write(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """From now on nothing can be written beside the data in `folder`; also not by root, whom no permission stops."""
    take = claim._take

    def refuse(path: Path) -> object:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied")
        return take(path)

    monkeypatch.setattr(claim, "_take", refuse)
