"""Compute how well the image and the caption of each pair fit, by a CLIP: the cosine of their embeddings.

    visionfm data score --path=FOLDER --model=RUN --out=scores/
    visionfm data select --path=FOLDER --columns=scores/ --where='similarity >= 0.28' --out=good.pairs

--path is a folder or URL of tars, as img2dataset writes them. --model is the folder of a run, or of a CLIP or SigLIP of
OpenCLIP or Hugging Face; with one that was fine-tuned on pairs that are trusted, the scores are those of a data
filtering network (Fang et al. 2023, https://arxiv.org/abs/2309.17425). --out gets a Parquet file for each tar, with
`key` and `similarity`; with --embeddings also `image_embedding` and `text_embedding`, float16. What cannot be read has
no value, and is counted and named in --out/report.json.

The model runs on all devices of this machine; with --engine=ray on those of a cluster, a GPU to a worker. When the
command is stopped and started again, the tars that are done are kept.

Exit codes: 0 all pairs have a score · 2 the input is wrong · 3 some images could not be read, and are named · 71
storage failed for too long, or workers die again and again: run the same command again · 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa

from visionfm_jax.api import Model, NothingRead, load
from visionfm_jax.config.arguments import Parser
from visionfm_jax.data import column_folder
from visionfm_jax.data.column_folder import ColumnFolder
from visionfm_jax.data.shards import Engine, Here, Local, Ray, add_arguments, engine_of, map_shards
from visionfm_jax.data.sources import tar_index
from visionfm_jax.data.sources.store import Store
from visionfm_jax.data.sources.tar_index import Shard
from visionfm_jax.data.sources.tars import TarPairs, add_keys, caption_suffix, read_pair
from visionfm_jax.errors import LEFT_OUT, ConfigError, DataError, UserError, count, entry_point, printable
from visionfm_jax.inference import Stored
from visionfm_jax.logs import quiet_logs
from visionfm_jax.storage import read, remove_unfinished, write_text, writing

COLUMN = "similarity"
NAMED = 5  # keys of pairs that cannot be read, of each tar
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)


@dataclass(frozen=True)
class Scorer:
    """Writes the scores of tars, of which it is called with one at a time, in any process.

    Attributes:
      run: of the model; `precision`: of its products.
      store: the folder of the tars.
      out: where the scores go.
      embeddings: whether embeddings are kept, too.
      caption_part: of a caption file, as of `tar_index.captions_of`; of several captions the first is scored.
    """

    run: str
    precision: str
    store: Store
    out: ColumnFolder
    embeddings: bool
    caption_part: str = ""

    def __call__(self, shard: Shard) -> dict[str, Any]:
        """Write the columns of a tar, unless they are there; what the report says of it."""
        if not self.out.is_whole(shard.tar):
            keys = read(lambda: tar_index.keys(self.store, shard.tar["name"], shard.records), lambda: str(shard))
            self.out.write(shard.tar, keys, self._columns(shard))
        table = self.out.read(shard.tar, [column_folder.KEY, COLUMN])
        scores = table[COLUMN].to_numpy()
        lost = np.flatnonzero(np.isnan(scores))
        folder = str(shard).removesuffix(".tar")
        first = [printable(f"{folder}/{table[column_folder.KEY][int(i)].as_py()}") for i in lost[:NAMED]]
        return {"name": str(shard), "pairs": len(scores), "unreadable": len(lost), "first": first} | _sums(scores)

    def _columns(self, shard: Shard) -> dict[str, pa.Array]:
        model = _model(self.run, self.precision)
        captions = [""] * len(shard.records)

        def image(i: int) -> bytes:
            """The picture; its caption is kept for afterwards, as both are read at once."""
            picture, text = read(lambda: read_pair(self.store, shard.tar, shard.records[i]), lambda: str(shard))
            captions[i] = tar_index.captions_of(text, self.caption_part)[0]
            return picture

        stored = [Stored(f"{shard}[{i}]", functools.partial(image, i)) for i in range(len(shard.records))]
        try:
            images = model.embed_images(stored)
        except NothingRead:
            images = np.full((len(stored), model.config.model.embed_dim), np.nan, np.float32)
        texts = model.embed_texts(captions) if captions else images
        known = ~np.isnan(images).any(1)
        scores = np.einsum("ne,ne->n", images, texts, dtype=np.float32)
        columns = {COLUMN: pa.array(scores, mask=~known)}
        if self.embeddings:
            columns |= {"image_embedding": _rows(images, known), "text_embedding": _rows(texts, known)}
        return columns


@functools.lru_cache(maxsize=1)
def _model(run: str, precision: str) -> Model:
    """Loaded once in each process."""
    model = load(run, precision=precision)
    if "embeddings" not in model.config.task.predictions:
        kind = type(model.config.task).__name__
        raise UserError(f"--model={printable(run)}: {kind} has no embeddings of images and texts; name a CLIP")
    return model


def _rows(rows: np.ndarray, known: np.ndarray) -> pa.Array:
    """float16 (N, E) as a column of lists; null where nothing is known."""
    flat = pa.array(np.ascontiguousarray(rows, np.float16).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, rows.shape[1], mask=pa.array(~known))


EDGES = np.linspace(-1, 1, 201)  # of the histogram of the report


def _sums(scores: np.ndarray) -> dict[str, Any]:
    """What the scores of all tars are added up from."""
    known = scores[~np.isnan(scores)]
    return {"histogram": np.histogram(np.clip(known, -1, 1), EDGES)[0].tolist()}


def score(
    path: str,
    run: str,
    out: Path,
    *,
    caption_key: str = "txt",
    image_key: str = "",
    precision: str = "",
    embeddings: bool = False,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the scores of all pairs of a folder of tars, and the report, which is returned.

    Args:
      path: folder or URL of the tars.
      run: folder of the model.
      out: folder for the scores.
      caption_key: suffix of the members with captions, as for `TarPairs`.
      image_key: suffix of the pictures; empty: any of an image.
      precision: of the model's products, as for `api.load`.
      embeddings: keep embeddings, too.
      engine: that does the work; None: this process.

    Raises:
      UserError: one line: the tars or the model cannot be used, or `out` cannot be written.
    """
    caption_key = caption_suffix(caption_key)
    if not caption_key:
        raise ConfigError("--caption_key: is empty, but captions are scored; name the suffix of their files")
    source = TarPairs(path, caption_key=caption_key, image_key=image_key)
    if not len(source):
        raise DataError(
            f"{source.name}: has no image with a caption .{caption_key}; set --caption_key, --image_key or --path"
        )
    model = _model(run, precision)
    if isinstance(engine, Local) and jax.default_backend() != "cpu":
        raise ConfigError(f"--jobs={engine.jobs}: processes would share the accelerator; leave it out")
    about = {
        "command": "data score", "model": model.digest, "preprocess": model.transform.settings,
        "precision": model.config.train.precision, "embeddings": embeddings,
        "caption_key": caption_key,
    }  # fmt: skip
    folder = column_folder.create(out, about)
    scorer = Scorer(run, precision, source.store, folder, embeddings, caption_key.partition(":")[2])
    tars = list(map_shards(scorer, source.index.shards, engine or Here(), title="scoring", unit=" tars"))
    report = _report(source, about, tars)
    with writing(f"--out={printable(str(out))}"):
        remove_unfinished(out / "report.json")
        write_text(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    if report["unreadable"] == report["pairs"]:
        first = next(key for tar in tars for key in tar["first"])
        raise DataError(f"{source.name}: none of {count(report['pairs'], 'image')} can be read, such as {first}")
    return report


def _report(source: TarPairs, about: dict[str, Any], tars: list[dict[str, Any]]) -> dict[str, Any]:
    pairs, lost = (sum(tar[key] for tar in tars) for key in ("pairs", "unreadable"))
    histogram = np.sum([tar.pop("histogram") for tar in tars], axis=0)
    below = np.cumsum(histogram) / histogram.sum() if lost < pairs else np.ones(len(histogram))
    quantiles = {f"{q:.0%}": round(float(EDGES[1 + np.searchsorted(below, q)]), 2) for q in QUANTILES}
    head = {"path": source.store.url, "pairs": pairs, "unreadable": lost}
    return (
        head
        | {"quantiles": quantiles, "histogram": histogram.tolist(), "source": source.report()}
        | about
        | {"tars": tars}
    )


def main(argv: Sequence[str], program: str = "python -m visionfm_jax.curation.score") -> int:
    """Parse, score, print; returns the exit code."""
    parser = Parser(program, __doc__)
    parser.add_argument("--path", required=True, help="folder or URL of tars")
    parser.add_argument("--model", required=True, metavar="RUN", help="folder of a CLIP")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    add_keys(parser)
    parser.add_argument("--precision", default="", help="of matrix products: fp32, bf16 or fp16 (as it was trained)")
    parser.add_argument("--embeddings", action="store_true", help="keep embeddings, too")
    add_arguments(parser)
    arguments = parser.parse_args(argv)
    quiet_logs()
    engine = engine_of(arguments, gpus=True)
    if isinstance(engine, Ray):  # whose workers have the accelerators, also those of this machine
        jax.config.update("jax_platforms", "cpu")
    report = score(
        arguments.path,
        arguments.model,
        arguments.out.expanduser(),
        caption_key=arguments.caption_key,
        image_key=arguments.image_key,
        precision=arguments.precision,
        embeddings=arguments.embeddings,
        engine=engine,
    )
    known = report["pairs"] - report["unreadable"]
    print(f"{count(known, 'pair')} of {len(report['tars']):,} tars have a similarity: {arguments.out}")
    print("of these lie: " + ", ".join(f"{share} below {value:.2f}" for share, value in report["quantiles"].items()))
    if report["unreadable"]:
        first = [key for tar in report["tars"] for key in tar["first"]][:NAMED]
        print(f"{count(report['unreadable'], 'image')} cannot be read, such as {', '.join(first)}")
    return LEFT_OUT if report["unreadable"] else 0


if __name__ == "__main__":
    # That of the package, whose `Scorer` other processes find; they know nothing of __main__.
    main = importlib.import_module("visionfm_jax.curation.score").main
    sys.exit(entry_point(main)(sys.argv[1:]))
