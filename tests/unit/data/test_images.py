"""Decoding, crops, resizing, and the odd images that real folders hold."""

import ast
import io
import struct
import threading
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import EpsImagePlugin, Image

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.data import images
from visionfm_jax.data.chain import Chain, EvalTransform
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.transforms import RandomResizedCrop, random_box
from visionfm_jax.errors import DataError

WHOLE = PreprocessConfig(crop=1.0)
RATIO = (3 / 4, 4 / 3)


def train_image(image, size: int, scale: tuple[float, float], generator: np.random.Generator, *most: int) -> np.ndarray:
    """A random resized crop; scale (1, 1): the whole image, whatever its ratio."""
    chain = () if tuple(scale) == (1, 1) else (RandomResizedCrop(scale=scale),)
    return Chain(chain, size, *most)({"image": image}, generator)["image"]


def smooth(height: int, width: int) -> np.ndarray:
    """(height, width, 3): gradients and a few waves, so that every filter gives nearly the same."""
    y, x = np.mgrid[:height, :width] / 40.0
    channels = [np.sin(x + y), np.cos(x - y / 2), np.sin(y) * np.cos(x / 3)]
    return (127 + 100 * np.stack(channels, -1)).astype(np.uint8)


def encoded(image: Image.Image | np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).mean())


@pytest.mark.parametrize("form", ["png", "hw", "hw1", "hw3"])
def test_an_image_of_the_target_size_passes_bit_exact(form):
    digit = rng().integers(0, 256, (28, 28), dtype=np.uint8)
    image = {
        "png": encoded(digit, "PNG"),
        "hw": digit,
        "hw1": digit[..., None],
        "hw3": np.repeat(digit[..., None], 3, -1),
    }[form]
    for result in (train_image(image, 28, (1, 1), rng()), EvalTransform(28, WHOLE)(image)):
        assert result.shape == (28, 28, 3)
        assert result.dtype == np.uint8
        assert (result == digit[..., None]).all()


def test_crop_scale_one_resizes_the_whole_image():
    image = smooth(300, 400)
    expected = cv2.resize(image, (200, 200), interpolation=cv2.INTER_LINEAR)
    assert difference(train_image(image, 200, (1.0, 1.0), rng()), expected) < 1


def test_random_boxes_fit_and_are_spread_as_asked():
    areas, ratios = [], []
    for seed in range(2000):
        top, left, h, w = random_box(rng(seed).random((10, 4)), (0.08, 1.0), RATIO, (375, 500), (1, 1))
        assert 0 <= top <= 375 - h
        assert 0 <= left <= 500 - w
        areas.append(h * w / (375 * 500))
        ratios.append(w / h)
    assert min(areas) > 0.078
    assert max(areas) <= 1
    assert 0.74 < min(ratios) < 0.76
    assert 1.32 < max(ratios) < 1.35
    small = np.log(np.array(ratios)[np.array(areas) < 0.5])  # where every ratio fits: symmetric in the logarithm
    assert abs(small.mean()) < 0.02
    assert 0.24 < np.mean(np.array(areas) < 0.3) < 0.36  # 0.24 if uniform, but large areas often need another try


@pytest.mark.parametrize(("shape", "box"), [((10, 1000), (0, 493, 10, 13)), ((1000, 10), (493, 0, 13, 10))])
def test_a_box_that_never_fits_becomes_the_centre(shape, box):
    assert random_box(rng().random((10, 4)), (0.9, 1.0), RATIO, shape, (1, 1)) == box


def test_the_generator_advances_equally_whatever_the_image():
    states = []
    for image in (smooth(40, 50), encoded(smooth(400, 10), "JPEG"), encoded(smooth(9, 9), "PNG")):
        generator = rng(3)
        train_image(image, 16, (0.2, 1.0), generator)
        states.append(generator.random())
    assert len(set(states)) == 1


@pytest.mark.parametrize("seed", range(8))
def test_jpeg_is_decoded_no_smaller_than_the_crop_needs(monkeypatch, seed):
    image = smooth(768, 1024)
    data, seen = encoded(image, "JPEG", quality=95), []
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    result = train_image(data, 112, (0.08, 1.0), rng(seed))
    _, _, h, w = random_box(rng(seed).random((10, 4)), (0.08, 1.0), RATIO, (768, 1024), (1, 1))
    (decoded,) = seen
    scale = decoded.shape[0] / 768
    assert min(h, w) * scale >= 112 - 1
    half = min(h, w) * scale / 2 >= 112  # half of it would have covered the target as well
    assert not half
    assert difference(result, train_image(image, 112, (0.08, 1.0), rng(seed))) < 5  # whole pixels
    if min(h, w) > 2 * 112:
        assert scale <= 0.5


def test_resizing_shrinks_long_sides_and_enlarges_short_ones():
    for height, width in ((1, 1), (3, 900), (900, 3), (224, 900), (100, 224), (447, 449), (1, 300)):
        flat = train_image(np.full((height, width, 3), 77, np.uint8), 224, (1, 1), rng())
        assert flat.shape == (224, 224, 3)
        assert (flat == 77).all()
    stripes = np.zeros((50, 2000, 3), np.uint8)
    stripes[:, ::2] = 255  # sampled with gaps it would be black or white
    grey = train_image(stripes, 200, (1, 1), rng())
    assert 120 < grey.min() <= grey.max() < 135


def test_grey_cmyk_and_progressive_jpeg():
    image = Image.fromarray(smooth(60, 80))
    grey = images.decode(encoded(image.convert("L"), "JPEG", quality=95))
    assert grey.shape == (60, 80, 3)
    assert difference(grey, np.asarray(image.convert("L"))[..., None]) < 2
    cmyk = images.decode(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert difference(cmyk, np.asarray(image)) < 4
    assert difference(images.decode(encoded(image, "JPEG", quality=95, progressive=True)), np.asarray(image)) < 4


def test_junk_between_jpeg_markers_is_no_damage():
    data = encoded(smooth(60, 80), "JPEG")
    assert images.decode(data[:20] + b"\0\0\0" + data[20:]).shape == (60, 80, 3)


def test_transparency_is_composited_on_white_without_dark_rims():
    y, x = np.mgrid[:72, :72]
    alpha = np.clip(255 * (30 - np.hypot(y - 36, x - 36)) / 4, 0, 255).astype(np.uint8)
    red = np.zeros((72, 72, 4), np.uint8)  # black where transparent, as drawing programs leave it
    red[..., 3] = alpha
    red[alpha > 0, 0] = 255
    for image in (red, encoded(red, "PNG"), encoded(red, "WEBP", lossless=True, exact=True)):
        for pixels in (images.decode(image), EvalTransform(48, WHOLE)(image), EvalTransform(96, WHOLE)(image)):
            assert pixels[..., 0].min() > 250  # red stays full from the disc over its rim to the white
            assert tuple(pixels[0, 0]) == (255, 255, 255)
    half = np.array([[[10, 200, 0, 128]]], np.uint8)
    assert images.decode(half)[0, 0].tolist() == [132, 227, 127]


def test_palette_grey_alpha_bilevel_and_float():
    image = Image.fromarray(smooth(20, 30))
    palette = image.quantize(16)
    assert (images.decode(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    clear = encoded(Image.new("P", (4, 4), 0), "PNG", transparency=0)
    assert (images.decode(clear) == 255).all()
    assert (images.decode(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == 255).all()
    assert (images.decode(encoded(Image.new("1", (4, 4), 1), "PNG")) == 255).all()
    assert (images.decode(encoded(Image.new("F", (4, 4), 99.0), "TIFF")) == 99).all()
    for mode, value in (("F", 0.5), ("F", -1.0), ("F", 300.0), ("F", float("nan")), ("I", 70_000), ("I", -1)):
        with pytest.raises(DamagedImage, match="store it in 8 or 16 bits"):
            images.decode(encoded(Image.new(mode, (4, 4), value), "TIFF"))


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert images.decode(encoded(values, "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert images.decode(encoded(Image.fromarray(values.astype(np.int32)), "TIFF"))[0, :, 2].tolist() == [
        0, 1, 128, 255,
    ]  # fmt: skip


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_of_class_maps_are_those_of_the_file_however_few_their_bits(bits):
    values = (np.arange(16) % 2**bits).astype(np.uint8).reshape(4, 4)
    packed = np.packbits(np.unpackbits(values[..., None], axis=-1)[..., 8 - bits :].reshape(4, -1), axis=1)
    rows = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", 4, 4, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + a + b + struct.pack(">I", zlib.crc32(a + b)) for a, b in chunks]
    np.testing.assert_array_equal(images.decode_map(b"\x89PNG\r\n\x1a\n" + b"".join(parts)), values)


def test_webp_and_the_first_frame_of_an_animation():
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        red, _, blue = images.decode(data)[4, 4].tolist()
        assert red > 240
        assert blue < 15


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# What the stored rows and columns become, by the EXIF standard.
UPRIGHT = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).swapaxes(0, 1),
    8: np.rot90,
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_images_are_turned_upright_by_every_decoder(kind):
    image = Image.fromarray(smooth(20, 30))
    options = {"quality": 95} if kind in ("JPEG", "AVIF") else {"lossless": True} if kind == "WEBP" else {}
    for orientation, upright in UPRIGHT.items():
        data = encoded(image, kind, exif=turned(orientation), **options)
        expected = upright(images.decode(encoded(image, kind, **options)))
        assert difference(images.decode(data), expected) < 1, orientation
        assert difference(EvalTransform(16, WHOLE)(data), EvalTransform(16, WHOLE)(expected)) < 1, orientation


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_random_crop_is_one_of_the_upright_image(kind, orientation):
    image = Image.fromarray(smooth(300, 400))
    data = encoded(image, kind, exif=turned(orientation), **({"quality": 95} if kind == "JPEG" else {}))
    for seed in range(3):
        expected = train_image(images.decode(data), 48, (0.08, 0.5), rng(seed))
        assert difference(train_image(data, 48, (0.08, 0.5), rng(seed)), expected) < 5, seed  # whole pixels


@pytest.mark.parametrize("block", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9])
def test_a_damaged_exif_block_is_no_damaged_image(block):
    image = smooth(20, 30)
    for kind in ("JPEG", "PNG", "WEBP"):
        assert images.decode(encoded(image, kind, exif=b"Exif\0\0" + block)).shape == (20, 30, 3)
    data = encoded(image, "JPEG")
    for cut in (b"\xff\xe1", b"\xff\xe1\0", b"\xff\xe1\0\x10Exif\0\0"):
        images._jpeg_orientation(b"\xff\xd8" + cut)
    assert images._jpeg_orientation(data[:2] + b"\xff\xe1\0\x02" + data[2:]) == 1


def test_postscript_starts_no_program(tmp_path, monkeypatch):
    """Pillow gives a file of that format to Ghostscript, whatever its name says."""
    ran = tmp_path / "ran"
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {ran}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # else what an earlier search has found
    page = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
    with Image.open(io.BytesIO(page)) as image, pytest.raises(OSError):  # noqa: PT011
        image.load()
    assert ran.exists()  # the danger is real
    ran.unlink()
    with pytest.raises(DamagedImage, match=r"none of AVIF, BMP, .* \(\d+ bytes\)"):
        images.decode(page)
    assert not ran.exists()


@pytest.mark.parametrize("kind", ["PPM", "TGA", "PCX", "SGI", "ICO", "DDS", "IM", "MSP"])
def test_formats_that_are_rare_among_pictures_are_not_opened(kind):
    with pytest.raises(DamagedImage, match="none of"):
        images.decode(encoded(Image.new("1" if kind == "MSP" else "RGB", (16, 16)), kind))


def test_pillow_is_never_left_to_choose_the_format():
    root = Path(images.__file__).parents[1]
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open"):
                assert "formats" in {word.arg for word in node.keywords}, f"{path}:{node.lineno}"


def test_avif_and_jpeg_2000_are_read_and_heic_is_named():
    image = smooth(20, 30)
    assert difference(images.decode(encoded(image, "AVIF", quality=95)), image) < 4
    assert (images.decode(encoded(image, "JPEG2000")) == image).all()
    with pytest.raises(DamagedImage, match="is HEIC, which is not read; convert it to JPEG, PNG or AVIF"):
        images.decode(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))


def test_pixel_bound_is_checked_in_the_header():
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 9) + b"IDAT" + bytes(13)
    jpeg = bytearray(encoded(smooth(16, 16), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 20_000, 20_000)
    for data in (png, bytes(jpeg)):
        with pytest.raises(DamagedImage, match=r"20000 x 20000 pixels are more than data.max_pixels|exceeds limit"):
            images.decode(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "JPEG2000", "AVIF", "array"])
def test_the_pixel_bound_is_a_setting_of_training_and_evaluation(kind):
    image = smooth(40, 50) if kind == "array" else encoded(smooth(40, 50), kind)
    assert train_image(image, 16, (0.08, 1.0), rng(), 2000).shape == (16, 16, 3)
    assert EvalTransform(16, WHOLE, 2000)(image).shape == (16, 16, 3)
    for read in (EvalTransform(16, WHOLE, 1999), lambda i: train_image(i, 16, (0.08, 1.0), rng(), 1999)):
        with pytest.raises(DamagedImage, match=r"50 x 40 pixels are more than data.max_pixels = 1,999"):
            read(image)


def test_a_tile_is_bounded_as_an_image_is():
    """A TIFF of 16 x 16 pixels in one tile of 16384 x 16384: Pillow takes 800 MB for it."""
    entries = {
        256: (4, 16), 257: (4, 16), 258: (3, 8), 259: (3, 8), 262: (3, 1), 277: (3, 1),
        322: (4, 16384), 323: (4, 16384), 324: (4, 134), 325: (4, 12),
    }  # fmt: skip
    ifd = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, (kind, value) in entries.items())
    data = b"II*\0" + struct.pack("<IH", 8, len(entries)) + ifd + bytes(4) + zlib.compress(bytes(2**20))
    with pytest.raises(DamagedImage, match="16384 x 16384 pixels are more than"):
        images.decode(data)


def test_a_jpeg_of_endless_scans_is_damaged():
    """Each scan is a pass over all pixels, and takes 50 bytes: half a megabyte would decode for half an hour."""
    usual = encoded(smooth(64, 64), "JPEG", progressive=True)
    assert images.decode(usual).shape == (64, 64, 3)
    last = usual[usual.rindex(b"\xff\xc4", 0, usual.rindex(b"\xff\xda")) : -2]
    for hidden in (b"", b"\xff\xfe\0\x04\xff\xd9"):  # a comment that looks like the end
        data = usual[:-2] + (hidden + last) * images.MAX_SCANS + b"\xff\xd9"
        with pytest.raises(DamagedImage, match="more than 64 scans"):
            images.decode(data)
    assert images.decode(usual + last * 100).shape == (64, 64, 3)  # after the end, as a phone's film


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_that_lacks_pixels_is_damaged(progressive):
    """Pillow fills them with grey, without a word, where the file ends as it should."""
    data = encoded(smooth(200, 200), "JPEG", progressive=progressive)
    cut = data[: len(data) * 2 // 3] + b"\xff\xd9"
    assert np.asarray(Image.open(io.BytesIO(cut))).shape == (200, 200, 3)
    with pytest.raises(DamagedImage, match=r"[Pp]remature end|Inconsistent progression"):
        images.decode(cut)


def test_a_flipped_bit_of_a_png_is_found():
    data = encoded(smooth(64, 64), "PNG")
    for place in range(20, len(data), len(data) // 40):
        flipped = bytearray(data)
        flipped[place] ^= 4
        with pytest.raises(DamagedImage):
            images.decode(bytes(flipped))


def test_large_images_are_composited_and_scaled_in_parts_as_small_ones():
    values = rng().integers(0, 2**16, (700, 800), np.uint16)  # three parts
    expected = ((values.astype(int) + 128) // 257)[..., None]
    assert (images.decode(encoded(values, "PNG")) == expected).all()
    rgba = rng().integers(0, 256, (700, 800, 4), np.uint8)
    alpha = rgba[..., 3:].astype(int)
    expected = (rgba[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
    for image in (rgba, encoded(rgba, "PNG")):
        assert (images.decode(image) == expected).all()


def test_threads_share_the_memory_of_one_image_of_the_largest_size(monkeypatch):
    """Eight threads, and a bound that lets in two of these images at a time, of JPEG (half as costly) four."""
    image, most = smooth(64, 64), 2 * 64 * 64
    for data, allowed in ((encoded(image, "PNG"), 2), (encoded(image, "JPEG"), 4)):
        inside, seen, lock, gate = [0], [], threading.Lock(), threading.Barrier(allowed, timeout=60)

        def resized(pixels, edges, size, inside=inside, seen=seen, lock=lock, gate=gate, **_):
            with lock:
                inside[0] += 1
                seen.append(inside[0])
            gate.wait()  # for as many as may be here
            with lock:
                inside[0] -= 1
            return pixels

        monkeypatch.setattr(images, "_resized", lambda pixels, *_, resized=resized: resized(pixels, None, None))

        def work(data=data):
            images.decode(data, most)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(seen) == 8
        assert max(seen) == allowed
    assert images._MEMORY._held == 0
    with pytest.raises(DamagedImage):
        images.decode(encoded(image, "PNG")[:200])
    assert images._MEMORY._held == 0  # what fails gives its share back


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_cut_off_files_are_damaged(kind):
    data = encoded(rng().integers(0, 256, (60, 80, 3), dtype=np.uint8), kind)
    for keep in (len(data) // 2, 20):
        with pytest.raises(DamagedImage):
            train_image(data[:keep], 32, (0.08, 1.0), rng())


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"junk", b"\x89PNG\r\n\x1a\n", b"\0" * 1000])
def test_what_is_no_image_is_damaged(data):
    with pytest.raises(DamagedImage, match=r"\d bytes"):
        EvalTransform(32, WHOLE)(data)


def test_arrays_of_another_kind_are_an_error_of_the_dataset():
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(DataError, match="must be uint8"):
            images.decode(array)
    with pytest.raises(DamagedImage, match="no pixel"):
        images.decode(np.zeros((0, 4, 3), np.uint8))
