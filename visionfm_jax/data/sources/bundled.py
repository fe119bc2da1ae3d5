"""The pictures that come with the package: `BundledConfig(path="digits", split="train")`.

A set is one `.npz` (written by `tools/curate.py`): `blob` uint8, all encoded images end to end; `offsets` int64 (N+1);
`label` int32 (N,); `split` uint8 (N,), an index into `meta["splits"]`; `concept` int32 (N,), an index into
`meta["concepts"]`; `meta` uint8, JSON.
"""

from __future__ import annotations

import io
import json
from functools import lru_cache
from importlib import resources
from typing import Any

import numpy as np

from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.errors import DataError

_PACKAGE = "visionfm_jax.data.bundled"


def set_names() -> tuple[str, ...]:
    """Names of the sets, sorted."""
    files = (entry.name for entry in resources.files(_PACKAGE).iterdir())
    return tuple(sorted(name.removesuffix(".npz") for name in files if name.endswith(".npz")))


@lru_cache(maxsize=4)
def read_set(name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the decoded `meta` of a set, read once per process; treat both as constants."""
    with np.load(io.BytesIO(resources.files(_PACKAGE).joinpath(f"{name}.npz").read_bytes())) as archive:
        arrays = {key: archive[key] for key in archive.files}
    return arrays, json.loads(arrays.pop("meta").tobytes())


class BundledSource:
    """One split of a bundled set; `record` gives what is known of a picture beyond its label."""

    def __init__(self, config: BundledConfig):
        self.name = f"bundled {config.path}/{config.split}"
        if config.path not in set_names():
            raise DataError(f"bundled set {config.path!r} does not exist; the sets are {', '.join(set_names())}")
        arrays, meta = read_set(config.path)
        if config.split not in meta["splits"]:
            raise DataError(f"{self.name}: no such split; the splits are {', '.join(meta['splits'])}")
        self._set = config.path
        self._rows = np.flatnonzero(arrays["split"] == meta["splits"].index(config.split))
        self.class_names: tuple[str, ...] | None = tuple(meta["class_names"])
        self.num_classes = len(self.class_names)
        known = len(meta["concepts"]) > self.num_classes  # a digit's name says what its class says
        self.has_captions = known and bool(config.caption_key)
        self.most_captions = int(self.has_captions)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The record's "image" (encoded bytes) and "label"; of emoji also "caption": name and group."""
        row = self._row(index)
        arrays, _ = read_set(self._set)
        start, stop = arrays["offsets"][row], arrays["offsets"][row + 1]
        record = {"image": arrays["blob"][start:stop].tobytes(), "label": int(arrays["label"][row])}
        if not self.has_captions:
            return record
        about = self._describe(row)
        return record | {"caption": f"{about['name']}, {about['group']}"}

    def key(self, index: int) -> str:
        """The picture's name in the package that it came from."""
        return read_set(self._set)[1]["keys"][self._row(index)]

    def fingerprint(self) -> dict[str, str]:
        """Of the whole set, and of what the split has of it."""
        arrays, meta = read_set(self._set)
        about = json.dumps(meta, sort_keys=True).encode()
        return {
            "set": f"{len(arrays['label']):,} pictures, {digest(*(arrays[k] for k in sorted(arrays)), about)}",
            "split": f"{len(self._rows):,} pictures, {digest(self._rows)}",
        }

    def record(self, index: int) -> dict[str, Any]:
        """What is known of picture `index`.

        Returns:
          key: as `key`; name: e.g. "waving hand: dark skin tone"; concept: the name without skin tones;
          keywords: list of str, of the concept; group: its class name; skin_tone: list of str, one per person
          whose tone is given, empty for the concept's default drawing.
        """
        return self._describe(self._row(index))

    def _describe(self, row: int) -> dict[str, Any]:
        arrays, meta = read_set(self._set)
        concept = meta["concepts"][arrays["concept"][row]]
        tones = [meta["skin_tones"][int(c)] for c in meta["tones"][row]]
        name = f"{concept['name']}: {', '.join(tones)}" if tones else concept["name"]
        return {
            "key": meta["keys"][row],
            "name": name,
            "concept": concept["name"],
            "keywords": concept["keywords"],
            "group": meta["class_names"][int(arrays["label"][row])],
            "skin_tone": tones,
        }

    def _row(self, index: int) -> int:
        if not 0 <= index < len(self._rows):
            raise IndexError(f"{self.name}: record {index} of {len(self._rows)}")
        return int(self._rows[index])
