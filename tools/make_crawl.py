"""Make a small crawl of image-text pairs with known faults: `python tools/make_crawl.py --out=FOLDER`.

The folder is as img2dataset writes it, in tars: NNNNN.tar of KEY.jpg, KEY.txt, KEY.json, and NNNNN.parquet and
NNNNN_stats.json. A picture is a bundled emoji on a coloured ground, of a random size at a random place; its caption is
one of several phrases with the emoji's name, keywords and group. Of the rows:

- a quarter of the captions belong to other pictures;
- copies of pictures: the same file, another JPEG quality, another size, the edges cut off, brighter or darker; half of
  them with the caption of the original, half with one of their own;
- captions of others in other case, white space or punctuation, with another picture of the same emoji;
- pictures of a held-out set, changed as copies are;
- failed downloads; pictures without a caption, or with an empty one; pictures whose file was renamed, so that neither
  they nor their captions belong to a pair; one tar is cut short.

truth.parquet says what was done to each row; a row that is no pair of the folder has the reason in `lost`. Pairs of one
`image_group` have the same picture, but for the changes above; those of one `caption_group` have the same words.

The held-out set, of drawings that no other picture shows, is written twice beside the folder: heldout/GROUP/FILE.jpg,
and with captions heldout_pairs/00000.tar. All follows from the seed.
"""

from __future__ import annotations

import argparse
import colorsys
import hashlib
import io
import json
import re
import sys
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visionfm_jax.data import images
from visionfm_jax.data.sources.bundled import BundledSource
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.errors import UserError, entry_point

IMAGE_COPY, CAPTION_COPY, CONTAMINATED = "image copy", "caption copy", "contaminated"
FAILED, NO_CAPTION, EMPTY_CAPTION, RENAMED, CUT = "failed", "no caption", "empty caption", "renamed", "cut"
SHARES = {  # of the rows; the others are pictures and captions of their own
    IMAGE_COPY: 0.10, CAPTION_COPY: 0.04, CONTAMINATED: 0.03,
    FAILED: 0.03, NO_CAPTION: 0.01, EMPTY_CAPTION: 0.01, RENAMED: 0.01,
}  # fmt: skip
MISLABELLED = 0.25  # of the captions that are no copies
HELD_OUT = 0.05  # pictures, for each row of the crawl
CHANGES = ("none", "quality", "size", "edges", "brightness")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "grey")
_HUES = (0.0, 0.08, 0.15, 0.35, 0.6, 0.75, 0.9)
PHRASES = (
    "{name}",
    "a drawing of {name}",
    "{name}, {keyword}",
    "{keyword} and {other}: {name}",
    "{name} on a {colour} background",
    "{name} clip art, {colour} background",
    "free {keyword} icon - {name}",
    "{group} | {name}",
    "picture of {name} ({keyword}, {other})",
    "how to draw {name}",
    "{name} sticker, {colour}",
    "buy {name} {keyword} poster",
)
_TIME = 1700000000.25  # with a fraction, as WebDataset's writer has it, which takes a header of its own


@cache
def drawings() -> list[tuple[BundledSource, int, dict[str, Any]]]:
    """All emoji of both hands: source, number in it, and what is known of it."""
    sources = [
        BundledSource(BundledConfig(path=hand, split=split))
        for hand in ("twemoji", "noto")
        for split in ("train", "test", "combinations")
    ]
    return [(source, i, source.record(i)) for source in sources for i in range(len(source))]


def make_crawl(
    out: Path, *, shards: int = 20, pairs: int = 300, mislabelled: float = MISLABELLED, seed: int = 0
) -> pa.Table:
    """Write the crawl to `out`, and the held-out set beside it.

    Args:
      out: a folder; it is made.
      shards: tars.
      pairs: rows of a tar.
      mislabelled: share of the captions that belong to other pictures.
      seed: of all choices.

    Returns:
      The truth, a row for each row of the parquets.

    Raises:
      UserError: the folder is there already.
    """
    for folder in (out, out.parent / "heldout", out.parent / "heldout_pairs"):
        if folder.exists():
            raise UserError(f"--out={out}: {folder} is there already; remove it, or name another folder")
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(drawings()))
    held, pool = np.split(order, [min(max(2, int(shards * pairs * HELD_OUT)), len(order) // 10)])
    held_rows = [_original(rng, drawing) | {"key": f"{i:09d}"} for i, drawing in enumerate(held.tolist())]
    for row in held_rows:
        about = drawings()[row["drawing"]][2]
        row["file"] = f"{about['group']}/{row['drawing']:05d}.jpg"
        path = out.parent / "heldout" / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(row))
    _write_shard(out.parent / "heldout_pairs" / "00000", held_rows, cut=False)

    rows = _rows(rng, pool, held_rows, shards * pairs, mislabelled)
    digits = len(str(pairs - 1))
    for i, row in enumerate(rows):
        row["tar"], row["key"] = f"{i // pairs:05d}", f"{i // pairs:05d}{i % pairs:0{digits}d}"
    for s in range(shards):
        name, part = f"{s:05d}", rows[s * pairs : (s + 1) * pairs]
        _write_shard(out / name, part, cut=shards > 1 and s == shards // 2)
    truth = _truth(rows)
    pq.write_table(truth, out / "truth.parquet")
    return truth


def _original(rng: np.random.Generator, drawing: int, colour: int | None = None) -> dict[str, Any]:
    """A picture of its own, with a caption that fits."""
    colour = int(rng.integers(len(COLOURS))) if colour is None else colour
    row = {"drawing": drawing, "colour": colour, "look": int(rng.integers(2**32)), "change": "", "lost": ""}
    return row | {"says": drawing, "caption": _phrase(rng, row)}


def _phrase(rng: np.random.Generator, row: dict[str, Any]) -> str:
    about = drawings()[row["drawing"]][2]
    words = [word.replace("_", " ") for word in rng.permutation(about["keywords"])[:2].tolist()]
    phrase = PHRASES[rng.integers(len(PHRASES))]
    return phrase.format(
        name=about["name"], group=about["group"], keyword=words[0], other=words[-1], colour=COLOURS[row["colour"]]
    )


def _rows(
    rng: np.random.Generator, pool: np.ndarray, held: list[dict[str, Any]], count: int, mislabelled: float
) -> list[dict[str, Any]]:
    """What each row shows and says."""
    roles = np.full(count, "", object)
    places, start = rng.permutation(count), 0
    for role, share in SHARES.items():
        stop = start + max(1, round(share * count))
        roles[places[start:stop]], start = role, stop
    rows = [_original(rng, int(drawing)) for drawing in rng.choice(pool, count)]
    for row, role in zip(rows, roles, strict=True):
        row["lost"] = role if role in (FAILED, NO_CAPTION, EMPTY_CAPTION, RENAMED) else ""
    originals = np.flatnonzero(roles == "")
    shuffled = rng.permutation(originals)[: int(len(originals) * mislabelled)].tolist()
    said = [(rows[i]["says"], rows[i]["caption"]) for i in shuffled]
    for i, (says, caption) in zip(shuffled, said[1:] + said[:1], strict=True):
        rows[i] |= {"says": says, "caption": caption}
    by_name: dict[str, list[int]] = {}
    for drawing in pool.tolist():
        by_name.setdefault(drawings()[drawing][2]["name"], []).append(drawing)

    for n, i in enumerate(np.flatnonzero(roles == IMAGE_COPY)):
        original = int(rng.choice(originals))
        rows[i] |= {k: rows[original][k] for k in ("drawing", "colour", "look")}
        rows[i] |= {"change": CHANGES[n % len(CHANGES)], "image_of": original, "says": rows[i]["drawing"]}
        kept = {k: rows[original][k] for k in ("says", "caption")}
        rows[i] |= kept if rng.random() < 0.5 else {"caption": _phrase(rng, rows[i])}
    for i in np.flatnonzero(roles == CAPTION_COPY):
        original = rows[int(rng.choice(originals))]
        alike = by_name[drawings()[original["says"]][2]["name"]]
        rows[i] |= _original(rng, int(rng.choice(alike)), original["colour"])
        rows[i] |= {"says": original["says"], "caption": _respelled(rng, original["caption"])}
    for n, i in enumerate(np.flatnonzero(roles == CONTAMINATED)):
        original = held[int(rng.integers(len(held)))]
        rows[i] |= {k: original[k] for k in ("drawing", "colour", "look", "says")}
        rows[i] |= {"change": CHANGES[n % len(CHANGES)], "heldout": original["file"]}
        rows[i]["caption"] = _phrase(rng, rows[i])
    return rows


def _respelled(rng: np.random.Generator, caption: str) -> str:
    """The same words in another spelling."""
    return [caption.upper(), caption.replace(" ", "  ") + " ", f"{caption}!", f"“{caption.title()}”..."][
        rng.integers(4)
    ]


def words(caption: str) -> str:
    """What is left of a caption without case, white space and punctuation."""
    return " ".join(re.findall(r"\w+", caption.casefold()))


def picture(row: dict[str, Any]) -> bytes:
    """The JPEG file of a row."""
    rng = np.random.default_rng(row["look"])
    source, i, _ = drawings()[row["drawing"]]
    drawn = Image.fromarray(images.decode(source[i]["image"]))
    width, height, side = (int(n) for n in rng.integers([80, 80, 56], [113, 113, 81]))
    hue, turn = row["colour"], rng.uniform(0, 2 * np.pi)
    ends = [colorsys.hsv_to_rgb(_HUES[hue], s, 1) if hue < len(_HUES) else (1 - s / 2,) * 3 for s in (0.05, 0.4)]
    across, down = np.linspace(-0.5, 0.5, width), np.linspace(-0.5, 0.5, height)[:, None]
    ramp = np.clip(0.5 + (across * np.cos(turn) + down * np.sin(turn)), 0, 1)[..., None]
    ground = ramp * ends[0] + (1 - ramp) * ends[1]  # [H, W, 3] in [0, 1]
    x, y = int(rng.integers(width - side + 1)), int(rng.integers(height - side + 1))
    ground[y : y + side, x : x + side] *= np.asarray(drawn.resize((side, side)), float) / 255  # drawn on white
    image = Image.fromarray(np.round(ground * 255).astype(np.uint8))
    quality = 90
    match row["change"]:
        case "quality":
            quality = 40
        case "size":
            image = image.resize((width * 3 // 4, height * 3 // 4), Image.Resampling.BICUBIC)
        case "edges":
            image = image.crop((width // 30, height // 30, width - width // 30, height - height // 30))
        case "brightness":
            image = image.point(lambda value: value * 0.85)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write_shard(path: Path, rows: list[dict[str, Any]], *, cut: bool) -> None:
    """PATH.tar, PATH.parquet and PATH_stats.json; rows behind a cut are marked as lost."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table, ends = [], []
    with tarfile.open(f"{path}.tar", "w|") as tar:
        for row in rows:
            failed, image = row["lost"] == FAILED, picture(row)
            size = dict(zip(("width", "height"), Image.open(io.BytesIO(image)).size, strict=True))
            about = {
                "caption": {NO_CAPTION: None, EMPTY_CAPTION: " \n"}.get(row["lost"], row["caption"]),
                "url": f"https://example.com/{row['key']}.jpg",
                "key": row["key"],
                "status": "failed_to_download" if failed else "success",
                "error_message": "HTTP Error 404: Not Found" if failed else None,
                **{k: None if failed else v for k, v in size.items()},
                **{f"original_{k}": None if failed else v for k, v in size.items()},
                "exif": None if failed else "{}",
                "sha256": None if failed else hashlib.sha256(image).hexdigest(),
            }
            table.append(about)
            if not failed:
                renamed = "copy_of_" if row["lost"] == RENAMED else ""
                members = {f"{renamed}{row['key']}.jpg": image}
                if about["caption"] is not None:
                    members[f"{row['key']}.txt"] = about["caption"].encode()
                members[f"{row['key']}.json"] = json.dumps(about).encode()
                for name, content in members.items():
                    info = tarfile.TarInfo(name)
                    info.size, info.mtime = len(content), _TIME
                    tar.addfile(info, io.BytesIO(content))
            ends.append(tar.offset)
    if cut:
        last = max(i for i in range(1, len(rows)) if rows[i]["lost"] != FAILED and i <= max(1, len(rows) * 4 // 5))
        with open(f"{path}.tar", "r+b") as file:
            file.truncate(ends[last - 1] + 1600)  # within its picture
        for row in rows[last:]:
            row["lost"] = row["lost"] or CUT
    whole = ("width", "height", "original_width", "original_height")
    schema = pa.schema([(k, pa.int32() if k in whole else pa.string()) for k in table[0]])
    pq.write_table(pa.Table.from_pylist(table, schema), f"{path}.parquet")
    failures = sum(row["lost"] == FAILED for row in rows)
    stats = {"count": len(rows), "successes": len(rows) - failures, "failed_to_download": failures}
    Path(f"{path}_stats.json").write_text(json.dumps(stats, indent=4) + "\n")


def _truth(rows: list[dict[str, Any]]) -> pa.Table:
    """What was done to each row."""
    names = [f"{row['tar']}/{row['key']}" for row in rows]
    first: dict[str, str] = {}  # words -> the first row that says them
    table = []
    for name, row in zip(names, rows, strict=True):
        source, i, about = drawings()[row["drawing"]]
        says = drawings()[row["says"]][2]["name"]
        table.append(
            {
                "tar": row["tar"],
                "key": row["key"],
                "drawing": f"{source.name.split()[-1]}/{source.key(i)}",
                "name": about["name"],
                "concept": about["concept"],
                "caption": row["caption"],
                "mislabelled": says != about["name"],
                "change": row["change"] or None,
                "image_group": names[row["image_of"]] if "image_of" in row else row.get("heldout", name),
                "caption_group": first.setdefault(words(row["caption"]), name),
                "heldout": row.get("heldout"),
                "lost": row["lost"] or None,
            }
        )
    kinds = {"mislabelled": pa.bool_()}
    return pa.Table.from_pylist(table, pa.schema([(k, kinds.get(k, pa.string())) for k in table[0]]))


def main(argv: Sequence[str] | None = None) -> None:
    """Make, count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--shards", type=int, default=20, help="tars (%(default)s)")
    parser.add_argument("--pairs", type=int, default=300, help="rows of a tar, at least 20 (%(default)s)")
    parser.add_argument("--mislabelled", type=float, default=MISLABELLED, help="share of wrong captions (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of all choices (%(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.shards < 1 or arguments.pairs < 20 or not 0 <= arguments.mislabelled < 1:
        raise UserError("--shards must be at least 1, --pairs at least 20, and --mislabelled from 0 to less than 1")
    truth = make_crawl(**vars(arguments))
    left = [row for row in truth.to_pylist() if row["lost"] is None]
    print(
        f"{len(truth):,} rows, {len(left):,} pairs: {sum(row['mislabelled'] for row in left):,} mislabelled, "
        f"{len(left) - len({row['image_group'] for row in left}):,} copies of pictures, "
        f"{len(left) - len({row['caption_group'] for row in left}):,} captions that were said before, "
        f"{sum(row['heldout'] is not None for row in left):,} held-out pictures: {arguments.out}"
    )


if __name__ == "__main__":
    sys.exit(entry_point(main)())
