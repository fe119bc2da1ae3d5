"""Copies of selected pairs: a folder of tars with parquets as img2dataset has them, or a TFDS dataset.

    tars          NNNNN.tar of KEY.jpg, KEY.txt and NNNNN.parquet with the columns, for each tar with selected pairs
    arrayrecord   pairs-train.array_record-NNNNN-of-NNNNN, and the description by which TFDS finds them

The records are those of the selection, in its order. Each file is written by rename; a copy that was interrupted goes
on when it is started again.
"""

from __future__ import annotations

import functools
import io
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from visionfm_jax.data import column_folder
from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.columns import KEY, STATUS, SUCCESS, Columns, names_of, parquet_of
from visionfm_jax.data.shards import Engine, map_shards
from visionfm_jax.data.sources.fingerprint import digest
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.sources.selection import Selection
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tar_index import BLOCK, Shard, engine_for, member_in
from visionfm_jax.data.sources.tars import TarPairs, pair_in
from visionfm_jax.errors import ConfigError, DataError, printable
from visionfm_jax.storage import read, remove_unfinished, replacing, writing

FORMS = ("tars", "arrayrecord")
_DATASET, _SPLIT = "pairs", "train"


@dataclass(frozen=True)
class _Shard:
    """The selected pairs of a tar.

    Attributes:
      tar: its entry in `Index.tars`.
      records: all of its pairs, as in `Index.records`.
      bits: uint8, which are selected, as in `Selection.bits`.
      beside: whether there is a parquet beside it.
      out: the file to write.
    """

    tar: dict[str, Any]
    records: np.ndarray
    bits: np.ndarray
    beside: bool
    out: Path

    def __str__(self) -> str:
        return self.tar["name"]

    @property
    def rows(self) -> np.ndarray:
        """int64, which of the pairs are selected."""
        return np.flatnonzero(np.unpackbits(self.bits, count=len(self.records)))


def copy_pairs(
    source: TarPairs,
    selection: Selection,
    to: Path,
    form: str,
    *,
    caption_key: str = "txt",
    columns: Sequence[Path] = (),
    engine: Engine | None = None,
) -> None:
    """Copy the selected pairs of a folder of tars.

    Args:
      source: all pairs.
      selection: which of them.
      to: folder to write, or one that the same copy has begun.
      form: one of `FORMS`.
      caption_key: as of the source.
      columns: folders of computed columns, which come into the parquets of tars.
      engine: that copies; None: as `tar_index.engine_for` says.

    Raises:
      DataError: a tar or its columns cannot be read, or have changed.
      UserError: `to` holds something else, or cannot be written.
    """
    if form == "arrayrecord" and ":" in caption_key:
        raise ConfigError(
            f"--write=arrayrecord: its records have one text, --caption_key={caption_key}; use --write=tars"
        )
    index, folders = source.index, [column_folder.open_folder(path) for path in columns]
    about = {"command": "data select", "write": form, "selection": f"{index.crc:08x} {digest(selection.bits)}"}
    column_folder.create(to, about | {"columns": [folder.about for folder in folders]}, flag="--to")
    files = read(source.store.files, lambda: source.store.url)
    used = np.flatnonzero(selection.counts).tolist()
    shards = [
        _Shard(
            tar=index.tars[t],
            records=index.records[index.starts[t] : index.starts[t + 1]],
            bits=selection.bits[selection.first[t] : selection.first[t + 1]],
            beside=parquet_of(index.tars[t]["name"]) in files,
            out=to / (index.tars[t]["name"] if form == "tars" else _array_record(n, len(used))),
        )
        for n, t in enumerate(used)
    ]
    act = _write_tar if form == "tars" else _write_array_record
    work = functools.partial(act, source.store, caption_key, tuple(folders))
    with writing(f"--to: {printable(str(to))}"):
        for _ in map_shards(work, shards, engine_for(source.store, len(shards), engine), title="copying", unit=" tars"):
            pass
        if form == "arrayrecord":
            _describe(to, selection.counts[used].tolist(), [shard.out for shard in shards])


def _write_tar(store: Store, suffix: str, folders: tuple[ColumnFolder, ...], shard: _Shard) -> None:
    """A tar and its parquet; the tar comes last, and tells that both are there."""
    if shard.out.exists():
        return
    parquet, name, rows = shard.out.with_name(parquet_of(shard.out.name)), shard.tar["name"], shard.rows
    found: list[str] = []
    with writing(f"--to: {printable(str(shard.out))}"):
        remove_unfinished(shard.out)
        remove_unfinished(parquet)
        with replacing(shard.out) as part, tarfile.open(part, "w") as tar:
            for key, extension, image, text in _pairs(store, name, shard.records[rows]):
                found.append(key)
                for member, content in ((f"{key}.{extension}", image), (f"{key}.{suffix.partition(':')[0]}", text)):
                    info = tarfile.TarInfo(member)
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
            if len(set(found)) < len(found) or "" in found:
                raise DataError(
                    f"{store.path(name)}: has names of more than 490 bytes, which a copy would mix up; use "
                    "--write=arrayrecord"
                )
            tar.close()
            table = _columns(store, folders, shard, rows)
            named = {KEY: pa.array(found), STATUS: pa.array([SUCCESS] * len(rows))}
            with replacing(parquet) as file:
                pq.write_table(
                    pa.table(named | dict(zip(table.column_names, table.columns, strict=True))),
                    file,
                    compression="zstd",
                )


def _columns(store: Store, folders: tuple[ColumnFolder, ...], shard: _Shard, rows: np.ndarray) -> pa.Table:
    """All columns but key and status of pairs, null where a pair has no row beside the tar."""
    tar = shard.tar
    computed = [(folder, tuple(column_folder.columns_of(folder, tar))) for folder in folders]
    taken = {KEY, STATUS, *(name for _, names in computed for name in names)}
    beside = names_of(store, parquet_of(tar["name"])) if shard.beside else []
    columns = Columns(store, tuple(name for name in beside if name not in taken), tuple(computed))
    found = columns.read(Shard(tar, shard.records))
    place = np.full(len(shard.records), -1)
    place[found.known] = np.arange(len(found.known))
    return found.table.take(pa.array(place[rows], mask=place[rows] < 0))


def _write_array_record(store: Store, suffix: str, folders: tuple[ColumnFolder, ...], shard: _Shard) -> None:
    """A file of a TFDS dataset."""
    from array_record.python.array_record_module import ArrayRecordWriter

    if shard.out.exists():
        return
    features, name = _features(), shard.tar["name"]
    with writing(f"--to: {printable(str(shard.out))}"):
        remove_unfinished(shard.out)
        with replacing(shard.out) as part:
            writer = ArrayRecordWriter(str(part), "group_size:1")  # a record is read alone
            try:
                for key, _, image, text in _pairs(store, name, shard.records[shard.rows]):
                    example = {
                        "image": io.BytesIO(image),
                        "caption": text.decode().strip(),
                        "key": f"{name.removesuffix('.tar')}/{key}",
                    }
                    writer.write(features.serialize_example(features.encode_example(example)))
            finally:
                writer.close()


def _features() -> Any:
    import tensorflow_datasets as tfds  # takes seconds

    return tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "caption": tfds.features.Text(), "key": tfds.features.Text()}
    )


def _array_record(number: int, count: int) -> str:
    return f"{_DATASET}-{_SPLIT}.array_record-{number:05d}-of-{count:05d}"


def _describe(folder: Path, counts: list[int], files: list[Path]) -> None:
    """What TFDS wants to know of the files; `dataset_info.json` comes last, and tells that all is there."""
    import tensorflow_datasets as tfds

    template = tfds.core.ShardedFileTemplate(
        data_dir=folder, dataset_name=_DATASET, split=_SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=_SPLIT,
        shard_lengths=counts,
        num_bytes=sum(file.stat().st_size for file in files),
        filename_template=template,
    )
    about = tfds.core.DatasetIdentity(
        name=_DATASET, version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    info = tfds.core.DatasetInfo(builder=about, features=_features())
    info.set_file_format("array_record")
    info.set_splits(tfds.core.SplitDict([split]))
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as part:
        info.write_to_directory(part)
        for name in ("features.json", "dataset_info.json"):
            Path(part, name).replace(folder / name)


def _pairs(store: Store, name: str, records: np.ndarray) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Key, extension of the picture, picture and text of pairs of a tar."""
    with read(lambda: store.open(name), lambda: store.path(name)) as file:
        for record in records.tolist():
            yield read(functools.partial(_pair, file, record, store.path(name)), lambda: store.path(name))


def _pair(file: BinaryIO, record: tuple[int, ...], where: str) -> tuple[str, str, bytes, bytes]:
    start = (record[0] - 1) * BLOCK
    try:
        key, extension = member_in(file, record)
        picture, text = pair_in(file, record)
    except DamagedRecord as error:
        raise DataError(f"{where}: the pair at byte {start:,}: {error}; download the tar again") from error
    except tarfile.HeaderError as error:
        raise DataError(f"{where}: no member at byte {start:,} ({error}); download the tar again") from error
    return key, extension, picture, text
