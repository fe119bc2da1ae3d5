"""Decode hostile image files, and measure the time and memory of each.

    python tools/attack/images.py --megapixels=67 --damages=20000

Every file is decoded as in evaluation and as in training, each in its own process, whose peak memory is read from the
kernel. Then small valid files of every format are damaged at random: the result must be pixels or `DamagedImage`. Then
single bits are flipped; only a format with a checksum, PNG, can always detect this. Prints a line for each file; the
exit code is 1 if a limit was exceeded.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import os
import struct
import subprocess
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from visionfm_jax.config import DataConfig, PreprocessConfig
from visionfm_jax.data import images
from visionfm_jax.data.chain import Chain, EvalTransform
from visionfm_jax.data.transforms import RandomResizedCrop

Image.MAX_IMAGE_PIXELS = None  # of what this program itself makes
SIDE = 64


def saved(image: Image.Image, kind: str, **options) -> bytes:
    """A file of that format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def zeros(count: int) -> bytes:
    """A zlib stream of `count` zeros."""
    squeeze, parts = zlib.compressobj(9), []
    for _ in range(count >> 20):
        parts.append(squeeze.compress(bytes(2**20)))
    return b"".join([*parts, squeeze.compress(bytes(count & (2**20 - 1))), squeeze.flush()])


def png(
    width: int, height: int, colour: int = 2, bits: int = 8, extra: bytes = b"", data: bytes | None = None
) -> bytes:
    """A black PNG; the colour types are 0 grey, 2 RGB, 3 palette, 4 grey with alpha, 6 RGBA."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    if data is None:
        data = zeros(height * (1 + -(-width * samples * bits // 8)))
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    palette = chunk(b"PLTE", bytes(768)) + chunk(b"tRNS", bytes(256)) if colour == 3 else b""
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    return start + palette + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(entries: dict[int, tuple[int, list[int]]], blob: bytes = b"") -> bytes:
    """A little-endian TIFF: {tag: (type, values)}; values that do not fit into four bytes and `blob` follow the IFD."""
    sizes, codes = {3: 2, 4: 4}, {3: "H", 4: "I"}
    place = 8 + 2 + 12 * len(entries) + 4
    ifd, after = struct.pack("<H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"<{len(values)}{codes[kind]}", *values)
        if len(values) * sizes[kind] > 4:
            packed, after = struct.pack("<I", place + len(after)), after + packed
        ifd += struct.pack("<HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8) + ifd + bytes(4) + after + blob


def tiff_strip(width: int, height: int, rows: int, count: int, data: bytes, compression: int = 8) -> bytes:
    """RGB in one strip of `rows` rows that says it has `count` bytes."""
    entries = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8, 8, 8]), 259: (3, [compression]), 262: (3, [2]),
        273: (4, [0]), 277: (3, [3]), 278: (4, [rows]), 279: (4, [count]), 284: (3, [1]),
    }  # fmt: skip
    entries[273] = (4, [len(tiff(entries))])
    return tiff(entries, data)


def tiff_tile(width: int, height: int, tile: int, data: bytes) -> bytes:
    """RGB in one tile of (tile, tile)."""
    entries = {
        256: (4, [width]), 257: (4, [height]), 258: (3, [8, 8, 8]), 259: (3, [8]), 262: (3, [2]), 277: (3, [3]),
        284: (3, [1]), 322: (4, [tile]), 323: (4, [tile]), 324: (4, [0]), 325: (4, [len(data)]),
    }  # fmt: skip
    entries[324] = (4, [len(tiff(entries))])
    return tiff(entries, data)


def many_scans(jpeg: bytes, scans: int) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    starts = [i for i in range(len(jpeg) - 1) if jpeg[i : i + 2] == b"\xff\xda"]
    last = jpeg[starts[-1] : -2]
    tables = jpeg.rfind(b"\xff\xc4", 0, starts[-1])  # of its Huffman codes, which go before it
    last = jpeg[tables:-2] if tables > starts[-2] else last
    return jpeg[:-2] + last * scans + b"\xff\xd9"


def exif_of(count: int, kind: int = 3) -> bytes:
    """An EXIF block whose directory says that it has `count` entries."""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", count & 0xFFFF) + struct.pack("<HHII", 0x112, kind, 1, 6) * 5


def with_exif(jpeg: bytes, block: bytes) -> bytes:
    """A JPEG with an EXIF block in front."""
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def renumbered(data: bytes, old: bytes, new: bytes) -> bytes:
    """`old` replaced by `new`, which must change something."""
    assert old in data
    return data.replace(old, new)


def at_the_bound(pixels: int) -> dict[str, Callable[[], bytes]]:
    """Files that the bound lets in, as large as it allows: what they cost is what the budget is reckoned with."""
    side = int(pixels**0.5) // 64 * 64
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)

    def tiled(mode: str, of: int = side) -> Image.Image:
        return Image.fromarray(np.tile(noise, (of // 64, of // 64, 1))).convert(mode)

    def jpeg(**options) -> bytes:
        ImageFile.MAXBLOCK = 2**28
        return saved(tiled("RGB"), "JPEG", quality=50, **options)

    few = min(side, 16383 // 64 * 64)
    return {
        "PNG RGB": lambda: png(side, side, 2),
        "PNG RGBA": lambda: png(side, side, 6),
        "PNG palette with alpha": lambda: png(side, side, 3),
        "PNG grey with alpha": lambda: png(side, side, 4),
        "PNG RGBA of 16 bits": lambda: png(side, side, 6, 16),
        "PNG grey of 16 bits": lambda: png(side, side, 0, 16),
        "PNG of one bit": lambda: png(side, side, 0, 1),
        "JPEG 4:2:0": lambda: jpeg(subsampling=2),
        "JPEG 4:4:4": lambda: jpeg(subsampling=0),
        "JPEG 4:4:4 progressive": lambda: jpeg(subsampling=0, progressive=True),
        "JPEG 4:4:4 progressive, turned": lambda: with_exif(jpeg(subsampling=0, progressive=True), turned(6)),
        "JPEG CMYK": lambda: saved(tiled("CMYK"), "JPEG", quality=50),
        "WebP lossless with alpha": lambda: saved(tiled("RGBA", few), "WEBP", lossless=True, method=0, quality=0),
        "WebP lossy": lambda: saved(tiled("RGB", few), "WEBP", method=0),
        "GIF": lambda: saved(tiled("P"), "GIF"),
        "BMP": lambda: saved(tiled("RGB"), "BMP"),
        "TIFF RGBA": lambda: saved(tiled("RGBA"), "TIFF", compression="tiff_deflate"),
        "TIFF float": lambda: saved(Image.new("F", (side, side)), "TIFF", compression="tiff_deflate"),
        "TIFF of 32 bits, turned": lambda: saved(Image.new("I", (side, side)), "TIFF", exif=orientation_tag(6)),
        "JPEG 2000 RGBA": lambda: saved(Image.new("RGBA", (side, side)), "JPEG2000"),
        "AVIF with alpha": lambda: saved(Image.new("RGBA", (side, side)), "AVIF", speed=10),
    }


def orientation_tag(orientation: int) -> Image.Exif:
    """An EXIF block that holds an orientation."""
    exif = Image.Exif()
    exif[0x112] = orientation
    return exif


def turned(orientation: int) -> bytes:
    """The same, as a JPEG holds it."""
    return b"Exif\0\0" + orientation_tag(orientation).tobytes().removeprefix(b"Exif\0\0")


def attacks(pixels: int) -> dict[str, Callable[[], bytes]]:
    """Files that lie, or that are small and cost much."""
    side = int(pixels**0.5) // 64 * 64
    plain = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    small = saved(plain, "JPEG")
    scans = saved(Image.new("RGB", (side, side)), "JPEG", progressive=True)
    text = b"k\0\0" + zeros(2**30)
    bomb = b"k\0\0" + zeros(2**28)
    box = saved(plain, "JPEG2000")
    return {
        "PNG of 178 megapixels, RGBA": lambda: png(13377, 13377, 6),
        "PNG that says 65535 x 65535": lambda: png(65535, 65535, 6, data=zeros(2**20)),
        "PNG whose profile is 1 GB": lambda: png(SIDE, SIDE, extra=chunk(b"iCCP", text)),
        "PNG with a text of 1 GB": lambda: png(SIDE, SIDE, extra=chunk(b"zTXt", text)),
        "PNG with 400 texts of 256 MB": lambda: png(SIDE, SIDE, extra=chunk(b"zTXt", bomb) * 400),
        "PNG with 10^5 empty chunks": lambda: png(SIDE, SIDE, extra=chunk(b"tEXt", b"k\0v") * 10**5),
        "PNG with 1 GB of pixels too many": lambda: png(SIDE, SIDE, data=zeros(2**30)),
        "PNG, animated, 10^3 frames": lambda: saved(
            plain, "PNG", save_all=True, append_images=[plain.rotate(i) for i in range(1000)]
        ),
        "JPEG that says 65500 x 65500": lambda: renumbered(
            small, struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", 65500, 65500)
        ),
        "JPEG that says it is at the bound": lambda: renumbered(
            small, struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", side, side)
        ),
        "JPEG of 110 scans at the bound": lambda: many_scans(scans, 100),
        "JPEG of 10^4 scans at the bound": lambda: many_scans(scans, 10**4),
        "JPEG with an EXIF directory of 65535": lambda: with_exif(small, exif_of(65535)),
        "JPEG with EXIF of an unknown type": lambda: with_exif(small, exif_of(5, 99)),
        "JPEG with 10^4 comments": lambda: small[:2] + b"\xff\xfe\0\x02" * 10**4 + small[2:],
        "WebP of 16383 x 16383": lambda: saved(Image.new("RGB", (16383, 16383)), "WEBP", lossless=True, method=0),
        "WebP, animated, 10^3 frames": lambda: saved(
            plain, "WEBP", save_all=True, append_images=[plain.rotate(i) for i in range(1000)]
        ),
        "GIF that says 65535 x 65535": lambda: renumbered(
            saved(plain, "GIF"), struct.pack("<HH", SIDE, SIDE), struct.pack("<HH", 65535, 65535)
        ),
        "GIF, animated, 10^3 frames": lambda: saved(
            plain, "GIF", save_all=True, append_images=[plain.rotate(i) for i in range(1000)]
        ),
        "TIFF strip of 4 GB": lambda: tiff_strip(SIDE, SIDE, 2**32 - 1, 2**32 - 1, zeros(SIDE * SIDE * 3)),
        "TIFF strip that inflates to 1 GB": lambda: (lambda z: tiff_strip(SIDE, SIDE, SIDE, len(z), z))(zeros(2**30)),
        "JPEG cut, with an end": lambda: small[: len(small) // 2] + b"\xff\xd9",
        "TIFF with a tile of 32768 x 32768": lambda: tiff_tile(SIDE, SIDE, 32768, zeros(2**30)),
        "TIFF with a tile of 16384 x 16384": lambda: tiff_tile(SIDE, SIDE, 16384, zeros(3 * 2**28)),
        "TIFF that says 65535 x 65535": lambda: tiff_strip(65535, 65535, 65535, 100, bytes(100)),
        "TIFF, raw, at the bound, no data": lambda: tiff_strip(side, side, side, 100, bytes(100), 1),
        "JPEG 2000 whose box says 65535 x 65535": lambda: renumbered(
            box, b"ihdr" + struct.pack(">II", SIDE, SIDE), b"ihdr" + struct.pack(">II", 65535, 65535)
        ),
        "JPEG 2000 whose codestream says 30000": lambda: renumbered(
            box, struct.pack(">IIII", SIDE, SIDE, 0, 0), struct.pack(">IIII", 30000, 30000, 0, 0)
        ),
        "JPEG 2000, both say 8000": lambda: renumbered(
            renumbered(box, b"ihdr" + struct.pack(">II", SIDE, SIDE), b"ihdr" + struct.pack(">II", 8000, 8000)),
            struct.pack(">IIII", SIDE, SIDE, 0, 0),
            struct.pack(">IIII", 8000, 8000, 0, 0),
        ),
        "BMP that says 65535 x 65535": lambda: renumbered(
            saved(plain, "BMP"), struct.pack("<ii", SIDE, SIDE), struct.pack("<ii", 65535, 65535)
        ),
        "PostScript": lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "HEIC": lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64),
        "nothing": lambda: b"",
    }


def measure(path: str, way: str, pixels: int) -> dict:
    """In a process of its own: seconds, and bytes of memory beyond those of before."""
    warnings.simplefilter("ignore")
    data = Path(path).read_bytes()
    view = EvalTransform(224, PreprocessConfig(), pixels)
    view(np.zeros((300, 300, 3), np.uint8))
    with contextlib.suppress(images.DamagedImage):  # what is loaded at the first use of a format
        images.decode(data[:1000])
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory("VmRSS"), time.perf_counter()
    try:
        if way == "train":
            Chain((RandomResizedCrop(),), 224, pixels)({"image": data}, np.random.default_rng(0))
        else:
            view(data)
        result = "read"
    except images.DamagedImage as error:
        result = f"damaged: {error}"
    return {"seconds": time.perf_counter() - start, "bytes": memory("VmHWM") - before, "result": result}


def together(path: str, threads: int, pixels: int) -> dict:
    """The same file in several threads at once."""
    view, data = EvalTransform(224, PreprocessConfig(), pixels), Path(path).read_bytes()
    view(np.zeros((300, 300, 3), np.uint8))
    before, start = memory("VmRSS"), time.perf_counter()
    work = [threading.Thread(target=view, args=(data,)) for _ in range(threads)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    return {"seconds": time.perf_counter() - start, "bytes": memory("VmHWM") - before, "result": f"{threads} threads"}


def memory(field: str) -> int:
    """Bytes of this process, by a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def run(*words: str) -> dict:
    """What this program measures in a process of its own."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, timeout=3600)
    if done.returncode:
        return {"seconds": 0.0, "bytes": 0, "result": f"BROKEN: exit {done.returncode}: {done.stderr.strip()[-200:]}"}
    return json.loads(done.stdout)


def small_files(rng: np.random.Generator) -> dict[str, bytes]:
    """Valid ones of every format."""
    y, x = np.mgrid[:48, :64] / 9.0
    waves = 127 + 90 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(y), np.cos(x / 2)], -1)
    picture = Image.fromarray((waves + rng.normal(0, 9, waves.shape)).clip(0, 255).astype(np.uint8))
    plain, turn = picture.convert("RGB"), orientation_tag(6)
    out = {kind: saved(plain, kind, exif=turn) for kind in ("JPEG", "PNG", "WEBP", "AVIF")}
    out |= {kind: saved(picture.convert("P"), kind) for kind in ("GIF", "BMP")}
    out |= {f"{kind} alpha": saved(picture, kind) for kind in ("PNG", "WEBP", "TIFF", "JPEG2000", "AVIF")}
    out["JPEG progressive"] = saved(plain, "JPEG", progressive=True)
    out["TIFF deflate"] = saved(plain, "TIFF", compression="tiff_deflate")
    return out


def damage(count: int, seed: int) -> collections.Counter:
    """Valid files with some bytes changed, cut out or cut off: how many were read, how many were damaged."""
    rng = np.random.default_rng(seed)
    view, found, kinds = EvalTransform(16, PreprocessConfig()), collections.Counter(), small_files(rng)
    names = sorted(kinds)
    for number in range(count):
        data = bytearray(kinds[names[number % len(names)]])
        where = rng.integers(0, len(data), rng.integers(1, 9))
        data[where[0]] ^= 1 << rng.integers(8)
        if rng.random() < 0.5:
            for place in where[1:]:
                data[place] = rng.integers(256)
        if rng.random() < 0.2:
            del data[where[-1] :]
        if rng.random() < 0.1:
            del data[where[0] : where[0] + 8]
        try:
            if number & 1:
                view(bytes(data))
            else:
                Chain((RandomResizedCrop(),), 16)({"image": bytes(data)}, rng)
            found["read"] += 1
        except images.DamagedImage:
            found["damaged"] += 1
    return found


def flip(count: int, seed: int) -> dict[str, collections.Counter]:
    """Valid files with one bit flipped: how many were found damaged, gave the same pixels, gave others in silence."""
    rng = np.random.default_rng(seed)
    out = {}
    for name, whole in sorted(small_files(rng).items()):
        out[name] = collections.Counter()
        expected = images.decode(whole)
        for _ in range(count):
            data = bytearray(whole)
            data[rng.integers(len(data))] ^= 1 << rng.integers(8)
            try:
                out[name]["same" if np.array_equal(images.decode(bytes(data)), expected) else "silent"] += 1
            except images.DamagedImage:
                out[name]["damaged"] += 1
    return out


def main() -> int:
    """Print a line for each file; 1 if a bound was broken."""
    words = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    words.add_argument(
        "--megapixels", type=float, default=DataConfig.max_pixels / 1e6, help="data.max_pixels / 1e6 (%(default)s)"
    )
    words.add_argument("--seconds", type=float, default=30.0, help="time limit per file (%(default)s)")
    words.add_argument(
        "--damages", type=int, default=20_000, help="number of small files to damage at random (%(default)s)"
    )
    words.add_argument("--flips", type=int, default=1000, help="bits to flip in a file of each format (%(default)s)")
    words.add_argument(
        "--threads", type=int, default=8, help="threads that decode the costliest file at the same time (%(default)s)"
    )
    words.add_argument("--only", default="", help="only files whose name contains this")
    words.add_argument("--seed", type=int, default=0)
    words.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    words.add_argument("--together", help=argparse.SUPPRESS)
    given = words.parse_args()
    pixels = int(given.megapixels * 1e6)
    if given.measure:
        print(json.dumps(measure(*given.measure, pixels)))
        return 0
    if given.together:
        print(json.dumps(together(given.together, given.threads, pixels)))
        return 0
    warnings.simplefilter("ignore")
    broken = 0
    folder = Path(os.environ.get("TMPDIR", "/tmp")) / f"attack_images_{os.getpid()}"
    folder.mkdir()
    path, worst, costly = folder / "file", 0, folder / "costly"
    print(f"{'file':42} {'bytes':>11}  {'way':5} {'s':>6} {'MB':>6} {'B/px':>5}  result")
    for group in (at_the_bound, attacks):
        for name, make in group(pixels).items():
            if given.only.lower() not in name.lower():
                continue
            path.write_bytes(make())
            for way in ("eval", "train"):
                found = (
                    run(f"--measure={path}", way)
                    if False
                    else run(f"--megapixels={given.megapixels}", "--measure", str(path), way)
                )
                limit = images.OTHER_BYTES * pixels + 50e6
                bad = found["seconds"] > given.seconds or found["bytes"] > limit or "BROKEN" in found["result"]
                broken += bad
                cost = found["bytes"] / pixels
                print(
                    f"{name:42} {path.stat().st_size:11,}  {way:5} {found['seconds']:6.1f} {found['bytes'] / 1e6:6.0f} "
                    f"{cost:5.1f}  {found['result'][:90]}{'  <-- BOUND BROKEN' if bad else ''}",
                    flush=True,
                )
                if group is at_the_bound and found["bytes"] > worst:
                    worst = found["bytes"]
                    costly.write_bytes(path.read_bytes())
    if worst:
        found = run(f"--megapixels={given.megapixels}", f"--threads={given.threads}", "--together", str(costly))
        kept = 50e6 * given.threads  # by the allocator, for each thread, of what it has given back
        bad = found["bytes"] > images.OTHER_BYTES * pixels + kept
        broken += bad
        print(f"the costliest in {found['result']}: {found['seconds']:.1f} s, {found['bytes'] / 1e6:.0f} MB")
    print(f"{given.damages} damaged small files: {dict(damage(given.damages, given.seed))}; nothing else was raised")
    print(f"{given.flips} flipped bits: {'format':18} {'damaged':>8} {'same':>8} {'silent':>8}")
    for name, found in flip(given.flips, given.seed).items():
        print(f"{'':>20}{name:18} {found['damaged']:8} {found['same']:8} {found['silent']:8}")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    print("bounds broken:", broken)
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
