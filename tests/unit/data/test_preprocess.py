"""Evaluation sees the same of a drawing whatever size it is stored at, as Pillow, torchvision and timm would."""

import dataclasses
import io
import math

import numpy as np
import pytest
from PIL import Image

from visionfm_jax.config import PreprocessConfig
from visionfm_jax.data.chain import Chain, EvalTransform
from visionfm_jax.data.sources.bundled import read_set

BICUBIC = Image.Resampling.BICUBIC


def noise(height: int, width: int) -> np.ndarray:
    """Not so strong that bicubic overshoots are cut off, between passes whose order is Pillow's own affair."""
    return np.random.default_rng(height * width).integers(64, 192, (height, width, 3), np.uint8)


def encoded(pixels: np.ndarray, kind: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def apart(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a.astype(int) - b.astype(int))


def of_timm(pixels: np.ndarray, size: int, crop: float, resize: str, how: Image.Resampling) -> np.ndarray:
    """`timm.data.transforms_imagenet_eval`: torchvision's Resize of a PIL image, then CenterCrop."""
    image, scale = Image.fromarray(pixels), math.floor(size / crop)
    if resize == "squash":
        image = image.resize((scale, scale), how)
    else:
        short, long = sorted(image.size)
        sides = scale, int(scale * long / short)
        image = image.resize(sides if image.width <= image.height else sides[::-1], how)
    left, top = (round((side - size) / 2.0) for side in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


@pytest.mark.parametrize("resize", ["crop", "squash"])
@pytest.mark.parametrize(
    ("height", "width", "size", "crop"),
    [
        (375, 500, 224, 0.875), (500, 375, 64, 0.875), (72, 72, 64, 1.0), (64, 64, 64, 0.875), (57, 311, 48, 0.9),
        (311, 40, 96, 1.0), (5, 300, 64, 0.875), (1, 1, 16, 0.5),
    ],
)  # fmt: skip
def test_it_is_timms_evaluation_to_one_grey_level(height, width, size, crop, resize):
    pixels = noise(height, width)
    for name, how in (("bicubic", BICUBIC), ("bilinear", Image.Resampling.BILINEAR)):
        expected = of_timm(pixels, size, crop, resize, how)
        transform = EvalTransform(size, PreprocessConfig(crop=crop, resize=resize, interpolation=name))
        for image in (pixels, encoded(pixels, "PNG")):
            assert apart(transform(image), expected).max() <= 1


def test_a_jpeg_is_decoded_whole_and_as_pillow_does():
    y, x = np.mgrid[:600, :800] / 40.0
    waves = 127 + 100 * np.stack([np.sin(x + y), np.cos(x - y / 2), np.sin(y) * np.cos(x / 3)], -1)
    data = encoded(waves.astype(np.uint8), "JPEG", quality=90)
    expected = of_timm(np.asarray(Image.open(io.BytesIO(data))), 64, 0.875, "crop", BICUBIC)
    assert apart(EvalTransform(64, PreprocessConfig())(data), expected).max() <= 1


def test_a_fine_grating_vanishes():
    """Lines a pixel apart, shrunk 1.7 times: what remains of them is an alias."""
    grating = np.zeros((170, 170, 3), np.uint8)
    grating[:, ::2] = 255
    seen = EvalTransform(100, PreprocessConfig(crop=1.0))(grating)[:, 4:-4].astype(int)  # edges see half a filter
    assert seen.max() - seen.min() < 16
    assert abs(seen.mean() - 127.5) < 1


@pytest.mark.parametrize("size", [48, 64])
def test_the_stored_size_of_a_drawing_does_not_matter(size):
    """Emoji stored at 64 (the model's own size), 72, 96 and 128 pixels."""
    arrays, _ = read_set("twemoji")
    transform, whole = EvalTransform(size, PreprocessConfig()), EvalTransform(size, PreprocessConfig(crop=1.0))
    for first in range(0, 400, 20):
        data = arrays["blob"][arrays["offsets"][first] : arrays["offsets"][first + 1]].tobytes()
        drawing = Image.open(io.BytesIO(data)).convert("RGB").resize((512, 512), BICUBIC)
        for view in (transform, whole):
            seen = [view(np.asarray(drawing.resize((side, side), BICUBIC))) for side in (128, 96, 72, 64)]
            for other in seen[1:]:
                assert apart(seen[0], other).mean() < 3.0, first


def test_training_and_evaluation_see_the_same_kind_of_picture():
    """Their resizing differs (speed there, exactness here), but by less than a grey level on smooth pictures."""
    y, x = np.mgrid[:150, :150] / 25.0
    pixels = (127 + 100 * np.stack([np.sin(x + y), np.cos(x - y), np.sin(y)], -1)).astype(np.uint8)
    train = Chain((), 96)({"image": pixels}, np.random.default_rng(0))["image"]
    assert apart(train, EvalTransform(96, PreprocessConfig(crop=1.0))(pixels)).mean() < 1


def test_every_setting_is_part_of_what_the_protocol_hashes():
    others = [{}, {"crop": 1.0}, {"resize": "squash"}, {"interpolation": "bilinear"}]
    settings = [EvalTransform(64, PreprocessConfig(**other)).settings for other in others]
    assert set(settings[0]) == {"image_size", *(f.name for f in dataclasses.fields(PreprocessConfig))}
    assert len({str(s) for s in settings}) == len(others)
