"""Parquet files with pictures in them, as Hugging Face writes them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from tar_sets import picture

STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def written_parquet(folder: Path, files: int = 2, rows: int = 6, **columns: pa.Array) -> Path:
    """File f holds the pictures f * 100 … with label i % 3, and two captions, in row groups of four; `columns` replace
    or add some.
    """
    (folder / "data").mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], "_type": "ClassLabel"}}
    meta = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for f in range(files):
        which = range(f * 100, f * 100 + rows)
        table = {
            "image": pa.array([{"bytes": picture(i), "path": f"{i}.png"} for i in which], STRUCT),
            "label": pa.array([i % 3 for i in which], pa.int64()),
            "caption": pa.array([[f"caption {i}", f"other {i}"][: 1 + i % 2] for i in which], pa.list_(pa.string())),
        } | columns
        table = pa.table({name: values for name, values in table.items() if values is not None})
        pq.write_table(
            table.replace_schema_metadata(meta), folder / f"data/train-{f:05d}-of-{files:05d}.parquet", row_group_size=4
        )
    return folder
