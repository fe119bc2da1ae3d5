"""Decoding, crops, resizing, and the odd images that real folders hold."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image

from visionfm_jax.data import transforms
from visionfm_jax.data.transforms import DamagedImage
from visionfm_jax.errors import DataError


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
    for result in (transforms.train_image(image, 28, (1, 1), rng()), transforms.eval_image(image, 28)):
        assert result.shape == (28, 28, 3)
        assert result.dtype == np.uint8
        assert (result == digit[..., None]).all()


def test_eval_is_resize_of_the_shorter_side_then_centre_crop():
    image = smooth(375, 500)
    resized = Image.fromarray(image).resize((341, 256), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((58, 16, 58 + 224, 16 + 224)))
    for data in (image, encoded(image, "PNG"), encoded(image, "JPEG", quality=95)):
        assert difference(transforms.eval_image(data, 224), expected) < 1.5
    assert transforms.centre_box(32, 32, 28) == (2, 2, 28, 28)  # no resizing at all
    assert transforms.eval_image(image[:5, :300], 224).shape == (224, 224, 3)


def test_crop_scale_one_resizes_the_whole_image():
    image = smooth(300, 400)
    expected = cv2.resize(image, (200, 200), interpolation=cv2.INTER_LINEAR)
    assert difference(transforms.train_image(image, 200, (1.0, 1.0), rng()), expected) < 1


def test_random_boxes_fit_and_are_spread_as_asked():
    areas, ratios = [], []
    for seed in range(2000):
        top, left, h, w = transforms.random_box(rng(seed).random((10, 4)), 375, 500, (0.08, 1.0))
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
    assert transforms.random_box(rng().random((10, 4)), *shape, (0.9, 1.0)) == box


def test_the_generator_advances_equally_whatever_the_image():
    states = []
    for image in (smooth(40, 50), encoded(smooth(400, 10), "JPEG"), b"junk"):
        generator = rng(3)
        try:
            transforms.train_image(image, 16, (0.2, 1.0), generator)
        except DamagedImage:
            assert image == b"junk"
        states.append(generator.random())
    assert len(set(states)) == 1


@pytest.mark.parametrize("seed", range(8))
def test_jpeg_is_decoded_no_smaller_than_the_crop_needs(monkeypatch, seed):
    image = smooth(768, 1024)
    data, seen = encoded(image, "JPEG", quality=95), []
    original = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: seen.append(original(*a, **k)) or seen[-1])
    result = transforms.train_image(data, 112, (0.08, 1.0), rng(seed))
    _, _, h, w = transforms.random_box(rng(seed).random((10, 4)), 768, 1024, (0.08, 1.0))
    (decoded,) = seen
    scale = decoded.shape[0] / 768
    assert min(h, w) * scale >= 112 - 1
    half = min(h, w) * scale / 2 >= 112  # half of it would have covered the target as well
    assert not half
    assert difference(result, transforms.train_image(image, 112, (0.08, 1.0), rng(seed))) < 5  # whole pixels
    if min(h, w) > 2 * 112:
        assert scale <= 0.5


def test_resizing_shrinks_long_sides_and_enlarges_short_ones():
    for height, width in ((1, 1), (3, 900), (900, 3), (224, 900), (100, 224), (447, 449), (1, 300)):
        flat = transforms.train_image(np.full((height, width, 3), 77, np.uint8), 224, (1, 1), rng())
        assert flat.shape == (224, 224, 3)
        assert (flat == 77).all()
    stripes = np.zeros((50, 2000, 3), np.uint8)
    stripes[:, ::2] = 255  # sampled with gaps it would be black or white
    grey = transforms.train_image(stripes, 200, (1, 1), rng())
    assert 120 < grey.min() <= grey.max() < 135


def test_grey_cmyk_and_progressive_jpeg():
    image = Image.fromarray(smooth(60, 80))
    grey = transforms.decode(encoded(image.convert("L"), "JPEG", quality=95))
    assert grey.shape == (60, 80, 3)
    assert difference(grey, np.asarray(image.convert("L"))[..., None]) < 2
    cmyk = transforms.decode(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert difference(cmyk, np.asarray(image)) < 4
    assert difference(transforms.decode(encoded(image, "JPEG", quality=95, progressive=True)), np.asarray(image)) < 4


def test_junk_between_jpeg_markers_is_no_damage():
    data = encoded(smooth(60, 80), "JPEG")
    assert transforms.decode(data[:20] + b"\0\0\0" + data[20:]).shape == (60, 80, 3)


def test_transparency_is_composited_on_white_without_dark_rims():
    y, x = np.mgrid[:72, :72]
    alpha = np.clip(255 * (30 - np.hypot(y - 36, x - 36)) / 4, 0, 255).astype(np.uint8)
    red = np.zeros((72, 72, 4), np.uint8)  # black where transparent, as drawing programs leave it
    red[..., 3] = alpha
    red[alpha > 0, 0] = 255
    for image in (red, encoded(red, "PNG"), encoded(red, "WEBP", lossless=True, exact=True)):
        for pixels in (transforms.decode(image), transforms.eval_image(image, 48), transforms.eval_image(image, 96)):
            assert pixels[..., 0].min() > 250  # red stays full from the disc over its rim to the white
            assert tuple(pixels[0, 0]) == (255, 255, 255)
    half = np.array([[[10, 200, 0, 128]]], np.uint8)
    assert transforms.decode(half)[0, 0].tolist() == [132, 227, 127]


def test_palette_grey_alpha_bilevel_and_float():
    image = Image.fromarray(smooth(20, 30))
    palette = image.quantize(16)
    assert (transforms.decode(encoded(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()
    clear = encoded(Image.new("P", (4, 4), 0), "PNG", transparency=0)
    assert (transforms.decode(clear) == 255).all()
    assert (transforms.decode(encoded(Image.new("LA", (4, 4), (0, 0)), "PNG")) == 255).all()
    assert (transforms.decode(encoded(Image.new("1", (4, 4), 1), "PNG")) == 255).all()
    assert (transforms.decode(encoded(Image.new("F", (4, 4), 99.0), "TIFF")) == 99).all()


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 257, 32896, 65535]], np.uint16)
    assert transforms.decode(encoded(values, "PNG"))[0, :, 0].tolist() == [0, 1, 128, 255]
    assert transforms.decode(encoded(Image.fromarray(values.astype(np.int32)), "TIFF"))[0, :, 2].tolist() == [
        0, 1, 128, 255,
    ]  # fmt: skip


def test_webp_and_the_first_frame_of_an_animation():
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    for kind in ("GIF", "WEBP", "PNG"):
        data = encoded(first, kind, save_all=True, append_images=[second])
        red, _, blue = transforms.decode(data)[4, 4].tolist()
        assert red > 240
        assert blue < 15


def test_exif_orientation_is_ignored_by_every_decoder():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    image = Image.fromarray(smooth(20, 30))
    for kind in ("JPEG", "PNG", "WEBP"):
        assert transforms.decode(encoded(image, kind, exif=exif)).shape == (20, 30, 3)


def test_pixel_bound_is_checked_in_the_header():
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 9) + b"IDAT" + bytes(13)
    jpeg = bytearray(encoded(smooth(16, 16), "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = struct.pack(">HH", 20_000, 20_000)
    for data in (png, bytes(jpeg)):
        with pytest.raises(DamagedImage, match=r"400 megapixels exceed 179|exceeds limit"):
            transforms.decode(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF"])
def test_cut_off_files_are_damaged(kind):
    data = encoded(rng().integers(0, 256, (60, 80, 3), dtype=np.uint8), kind)
    for keep in (len(data) // 2, 20):
        with pytest.raises(DamagedImage):
            transforms.train_image(data[:keep], 32, (0.08, 1.0), rng())


@pytest.mark.parametrize("data", [b"", b"\xff\xd8\xff", b"junk", b"\x89PNG\r\n\x1a\n", b"\0" * 1000])
def test_what_is_no_image_is_damaged(data):
    with pytest.raises(DamagedImage, match=r"\d bytes"):
        transforms.eval_image(data, 32)


def test_arrays_of_another_kind_are_an_error_of_the_dataset():
    for array in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(DataError, match="must be uint8"):
            transforms.decode(array)
    with pytest.raises(DamagedImage, match="no pixel"):
        transforms.decode(np.zeros((0, 4, 3), np.uint8))
