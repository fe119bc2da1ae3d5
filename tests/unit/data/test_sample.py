"""Transforms of whole samples: what lies on an image moves with it; and what is decoded, how often, how small."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from visionfm_jax.config import DataConfig, PreprocessConfig, Transform, load
from visionfm_jax.config.schema import to_dict
from visionfm_jax.data.chain import Chain, EvalTransform
from visionfm_jax.data.fields import Labels, Objects
from visionfm_jax.data.images import DamagedImage
from visionfm_jax.data.loader import train_loader
from visionfm_jax.data.sample import FILL
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import TfdsConfig
from visionfm_jax.data.sources.record import DamagedRecord, ignored
from visionfm_jax.data.transforms import (
    CenterCrop,
    Flip,
    MultiCrop,
    Pad,
    RandAugment,
    RandomCrop,
    RandomResizedCrop,
    Resize,
    Views,
    random_box,
)
from visionfm_jax.errors import ConfigError, DataError

SIZE = 48, 64
CHAINS = {
    "classification": (RandomResizedCrop(scale=(0.2, 1.0)), Flip()),
    "large scale jitter": (Resize(to="longer", scale=(0.1, 2.0)), Flip(), RandomCrop()),
    "covers": (Resize(to="shorter", scale=(1.0, 1.6)), RandomCrop(), Flip()),
    "fits": (Flip(chance=1.0), Resize(to="longer"), Pad()),
    "padded crop": (Resize(), RandomCrop(padding=9)),
    "five in one": (
        RandomResizedCrop(scale=(0.5, 1.0)), Resize(size=(30, 30)), CenterCrop(size=(40, 36)), Flip(), Resize(),
    ),
}  # fmt: skip
EVALS = [PreprocessConfig(crop=1.0, resize=how) for how in ("crop", "squash", "pad")]


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rectangles(seed: int) -> dict:
    """A record of bright rectangles on black, each of one channel, with all that can lie on an image."""
    draw, count = rng(seed), 3
    height, width = draw.integers(30, 120, 2)
    image, masks = np.zeros((height, width, 3), np.uint8), np.zeros((count, height, width), bool)
    boxes, areas = [], np.zeros((height, width), np.uint8)
    for k in range(count):
        top, left = draw.integers(0, height - 6), draw.integers(0, width - 6)
        bottom, right = draw.integers(top + 6, height + 1), draw.integers(left + 6, width + 1)
        image[top:bottom, left:right, k] = 255
        masks[k, top:bottom, left:right], areas[top:bottom, left:right] = True, k + 1
        boxes.append((left, top, right, bottom))
    names = [f"object {k}" for k in range(count)]
    return {
        "image": image, "boxes": np.array(boxes), "box_labels": np.arange(count), "box_texts": names, "masks": masks,
        "class_map": areas, "caption": "rectangles",
    }  # fmt: skip


def box_of(mask: np.ndarray) -> np.ndarray | None:
    ys, xs = np.nonzero(mask)
    return np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) if len(ys) else None


def check_objects(out: dict) -> None:
    """Boxes are those of the masks, and what is bright in an object's channel, all to a pixel."""
    assert len(out["boxes"]) == len(out["masks"]) == len(out["box_labels"]) == len(out["box_texts"])
    assert [f"object {k}" for k in out["box_labels"]] == list(out["box_texts"])
    for box, mask, label in zip(out["boxes"], out["masks"], out["box_labels"], strict=True):
        if (from_mask := box_of(mask)) is None:
            assert min(box[2] - box[0], box[3] - box[1]) < 1
            continue
        assert np.abs(from_mask - box).max() <= 0.501
        assert set(np.unique(out["class_map"][mask])) <= {*range(label + 1, 4), 255}  # later ones lie above it
        inner = mask[:-2, :-2] & mask[2:, 2:] & mask[:-2, 2:] & mask[2:, :-2]  # with a pixel around
        assert (out["image"][1:-1, 1:-1, label][inner] > 100).all()
    padding = out["class_map"] == 255
    assert (out["image"][padding] == FILL).all()
    assert not out["masks"][:, padding].any()
    np.testing.assert_array_equal(out["size"], np.argwhere(~padding).max(0) + 1)


@pytest.mark.parametrize("name", CHAINS)
def test_boxes_masks_maps_and_pixels_stay_together(name):
    for seed in range(25):
        for exact in (False, True):
            out = Chain(CHAINS[name], SIZE, exact=exact)(rectangles(seed), rng(seed))
            assert out["image"].shape == (*SIZE, 3)
            assert out["masks"].shape[1:] == out["class_map"].shape == SIZE
            assert out["caption"] == "rectangles"
            check_objects(out)


@pytest.mark.parametrize("preprocess", EVALS, ids=lambda p: p.resize)
def test_evaluation_moves_objects_too(preprocess):
    for seed in range(10):
        check_objects(EvalTransform(SIZE, preprocess).record(rectangles(seed)))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_exif_orientation_turns_what_lies_on_the_image(kind, orientation):
    record, exif, file = rectangles(3), Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(record["image"]).save(file, kind, exif=exif, **({"quality": 95} if kind == "JPEG" else {}))
    height, width = record["class_map"].shape
    size = (width, height) if orientation > 4 else (height, width)
    out = Chain((Resize(),), size)({**record, "image": file.getvalue()}, rng())
    for box, mask in zip(out["boxes"], out["masks"], strict=True):
        np.testing.assert_array_equal(box_of(mask), box)
    for k, mask in enumerate(out["masks"]):
        bright = out["image"][..., k] > 128
        assert (bright == mask).mean() > 0.98


def test_objects_of_which_too_little_is_left_are_dropped_with_all_that_belongs_to_them():
    record = {
        "image": np.zeros((100, 100, 3), np.uint8), "box_labels": np.arange(3), "box_texts": ["a", "b", "c"],
        "boxes": np.array([(0, 0, 20, 20), (45, 0, 65, 20), (90, 90, 100, 100)]), "masks": np.ones((3, 100, 100), bool),
    }  # fmt: skip
    for share, kept in ((0.0, [0, 1]), (0.2, [0, 1]), (0.3, [0])):  # a quarter of the second is left
        out = Chain((CenterCrop(size=(100, 100)), RandomCrop(size=(50, 50), min_visible=share)), 50)
        draws = type("Corner", (), {"random": staticmethod(lambda *shape: np.zeros(shape))})()
        out = out(record, draws)
        assert out["box_labels"].tolist() == kept
        assert out["box_texts"] == [record["box_texts"][k] for k in kept]
        assert out["masks"].shape == (len(kept), 50, 50)
        assert out["boxes"].tolist() == [[0, 0, 20, 20], [45, 0, 50, 20]][: len(kept)]


def test_boxes_without_an_area_on_the_image_are_dropped():
    boxes = [(2, 2, 2, 8), (-9, 0, 0, 5), (1, 1, 40, 3), (12, 0, 15, 9)]
    out = Chain((), (9, 12))(
        {"image": np.zeros((9, 12, 3), np.uint8), "boxes": boxes, "box_labels": (4, 5, 6, 7)}, rng()
    )
    assert out["boxes"].tolist() == [[1, 1, 12, 3]]
    assert out["box_labels"] == (6,)


def test_no_objects_are_no_special_case():
    record = {"image": np.zeros((9, 12, 3), np.uint8), "boxes": [], "box_labels": np.zeros(0, int)}
    record["masks"] = np.zeros((0, 9, 12), bool)
    for masks in (record["masks"], []):
        out = Chain(CHAINS["large scale jitter"], 16)({**record, "masks": masks}, rng())
        assert out["boxes"].shape == (0, 4)
        assert out["masks"].shape == (0, 16, 16)


def test_what_does_not_fit_its_image_is_a_damaged_record():
    record = rectangles(0)
    for name, wrong, words in (
        ("box_labels", np.arange(2), "its objects are 3 boxes, 3 masks, 2 box_labels"),
        ("class_map", np.zeros((4, 5), np.uint8), "its class_map have 4 x 5 pixels, its image"),
        ("masks", np.zeros((3, 4, 5), bool), "its masks have 4 x 5 pixels"),
        ("boxes", np.zeros((4, 3)), r"its boxes are of shape \(4, 3\), and must be finite numbers \(N, 4\)"),
        ("boxes", np.zeros(12), r"its boxes are float64 of shape \(12,\), and must be numbers \(N, 4\)"),
        ("boxes", np.full((3, 4), np.nan), "its boxes are not finite"),
        ("boxes", [(0, 0, 1, 1), (0, 0, 1), (0, 0, 1, 1)], r"its boxes are no array, and must be \(N, 4\)"),
        ("boxes", [["a"] * 4] * 3, r"its boxes are str32 of shape \(3, 4\)"),
        ("boxes", 7, r"its boxes are int64 of shape \(\)"),
        ("masks", record["masks"][0], r"its masks are bool of shape .*, and must be numbers \(N, H, W\)"),
        ("masks", record["masks"][..., None], r"its masks are bool of shape .*, and must be numbers \(N, H, W\)"),
        ("masks", [], "its objects are 3 boxes, 0 masks"),
        ("masks", [b"RLE"] * 3, r"its masks are bytes24 of shape \(3,\)"),
        ("class_map", record["class_map"][..., None], r"its class_map are uint8 of shape .* numbers \(H, W\)"),
        ("class_map", b"PNG", r"its class_map are bytes24 of shape \(\)"),
        ("box_labels", 3, "its box_labels are of type int, and are one for each object"),
        ("box_texts", "abc", "its box_texts are of type str, and are one for each object"),
        ("box_labels", None, "its box_labels are of type NoneType"),
    ):
        with pytest.raises(DamagedRecord, match=words):
            Chain((), SIZE)({**record, name: wrong}, rng())


def test_what_is_no_image_is_damaged():
    for record, kind in (({}, "NoneType"), ({"image": "a.jpg"}, "str"), ({"image": [[1]]}, "list")):
        with pytest.raises(DamagedImage, match=f"an image is of type {kind}, and must be bytes or an array"):
            Chain((), SIZE)(record, rng())


def test_padding_is_ignored_in_maps_of_every_kind():
    for dtype, value in ((np.uint8, 255), (np.uint16, 65535), (np.int32, -1), (np.float32, -1)):
        record = {"image": np.zeros((4, 8, 3), np.uint8), "depth_map": np.ones((4, 8), dtype)}
        out = Chain((Pad(size=(8, 8)),), 8)(record, rng())["depth_map"]
        assert out.dtype == dtype
        assert (out[:4] == 1).all()
        assert (out[4:] == value).all()
        assert ignored(np.dtype(dtype)) == value


EVERY = [
    RandomResizedCrop(), Resize(scale=(0.5, 2.0)), CenterCrop(), RandomCrop(padding=3), Pad(), Flip(), RandAugment(),
    MultiCrop(views=(Views(size=8), Views(name="local", size=4, count=3))), PreprocessConfig(),
]  # fmt: skip


@pytest.mark.parametrize("transform", EVERY, ids=lambda t: type(t).__name__)
def test_every_transform_draws_as_much_whatever_the_sample(transform):
    states = set()
    for height, width in ((5, 9), (40, 3), (16, 16), (90, 120)):
        generator = rng(7)
        Chain((transform,), 16)({"image": np.zeros((height, width, 3), np.uint8)}, generator)
        states.add(generator.random())
    assert len(states) == 1


@pytest.mark.parametrize("transform", EVERY[:2] + EVERY[3:4] + EVERY[5:8], ids=lambda t: type(t).__name__)
def test_what_is_random_differs_from_sample_to_sample_and_is_the_same_again(transform):
    image = rng().integers(0, 256, (40, 50, 3), np.uint8)
    results = []
    for seed in (*range(12), *range(12)):
        out = Chain((transform,), 16)({"image": image}, rng(seed))
        results.append(b"".join(out[name].tobytes() for name in sorted(out)))
    assert results[:12] == results[12:]
    assert len(set(results)) >= (2 if isinstance(transform, Flip) else 9)


def test_a_flip_mirrors_half_of_the_samples():
    image = rng().integers(0, 256, (6, 8, 3), np.uint8)
    out = [Chain((Flip(),), (6, 8))({"image": image}, rng(seed))["image"] for seed in range(200)]
    mirrored = sum((o == image[:, ::-1]).all() for o in out)
    assert sum((o == image).all() for o in out) + mirrored == 200
    assert 70 < mirrored < 130


@pytest.fixture
def decodes(monkeypatch):
    """The shapes of what libjpeg-turbo decodes."""
    shapes, original = [], simplejpeg.decode_jpeg

    def decode(*args, **options):
        pixels = original(*args, **options)
        shapes.append(pixels.shape[:2])
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", decode)
    return shapes


def photo(height: int = 768, width: int = 1024) -> bytes:
    y, x = np.mgrid[:height, :width] / 40.0
    waves = 127 + 100 * np.stack([np.sin(x + y), np.cos(x - y / 2), np.sin(y) * np.cos(x / 3)], -1)
    return simplejpeg.encode_jpeg(waves.astype(np.uint8), 95)


VIEWS = MultiCrop(
    views=(
        Views(count=1, size=112), Views(count=1, size=112), Views(name="local", count=8, size=48, scale=(0.05, 0.32)),
    )
)  # fmt: skip


@pytest.mark.parametrize(
    ("chain", "shape"),
    [
        ((RandomResizedCrop(scale=(0.9, 1.0)), Flip(), RandAugment()), (192, 256)),  # of 768 x 1024
        ((Resize(to="shorter"), RandomCrop(), Flip()), (192, 256)),
        ((Flip(), Resize(to="longer"), Pad()), (96, 128)),
        ((Resize(size=(400, 400)), RandomResizedCrop(scale=(0.9, 1.0))), (192, 256)),
    ],
)
def test_however_many_transforms_a_jpeg_is_decoded_once_as_small_as_the_result_allows(decodes, chain, shape):
    out = Chain(chain, 112)({"image": photo()}, rng())
    assert decodes == [shape]
    whole = Chain(chain, 112, exact=True)({"image": photo()}, rng())["image"]
    assert decodes[1:] == [(768, 1024)]
    if not any(isinstance(t, RandAugment) for t in chain):
        assert np.abs(out["image"].astype(int) - whole).mean() < 6


def test_views_are_of_one_decode_and_each_a_crop_of_its_own(decodes):
    chain = Chain((VIEWS,), 112)
    out = chain({"image": photo(), "label": 3}, rng())
    assert len(decodes) == 1
    assert {k: v.shape for k, v in out.items() if k != "label"} == {k: shape for k, (shape, _) in chain.spec.items()}
    assert chain.spec["global"][0] == (2, 112, 112, 3)
    assert chain.spec["local"][0] == (8, 48, 48, 3)
    assert out["label"] == 3
    assert len({view.tobytes() for view in (*out["global"], *out["local"])}) == 10


def test_a_view_is_a_random_resized_crop():
    image = rng().integers(0, 256, (60, 80, 3), np.uint8)
    (view,) = Chain((MultiCrop(views=(Views(count=1, size=32, flip=0.0),)),), 32)({"image": image}, rng(5))["global"]
    draws = type("Draws", (), {"random": staticmethod(lambda shape: rng(5).random((1, 41))[0, :40].reshape(shape))})()
    crop = RandomResizedCrop(scale=(0.32, 1.0))
    np.testing.assert_array_equal(view, Chain((crop,), 32)({"image": image}, draws)["image"])


def test_colours_may_follow_the_views():
    image = rng().integers(0, 256, (60, 80, 3), np.uint8)
    plain = Chain((VIEWS,), 112)({"image": image}, rng(1))
    varied = Chain((VIEWS, RandAugment()), 112)({"image": image}, rng(1))
    assert sum((a != b).any() for a, b in zip(plain["local"], varied["local"], strict=True)) >= 6
    with pytest.raises(ValueError, match="come before the transform that makes several views"):
        Chain((VIEWS, Flip(chance=1.0)), 112)({"image": image}, rng(1))


def test_a_chain_that_ends_at_another_size_is_refused_before_training():
    Chain((RandomResizedCrop(),), SIZE).check()
    with pytest.raises(ConfigError, match=r"data.transforms = \['Resize', 'Flip'\]: .* of an image of 90 x 50 pixels"):
        Chain((Resize(to="shorter"), Flip()), SIZE).check()


@dataclass(kw_only=True)
class Scaled(Transform):
    """Pixels in [0, 1], as other libraries have them."""

    def __call__(self, sample, rng):
        return sample.map_pixels(lambda pixels: pixels / 255)


@pytest.mark.parametrize(
    ("transforms", "says"),
    [
        ((Resize(), Scaled()), "float64; pixels are uint8"),
        ((MultiCrop(views=(Views(name="global", size=32),)), Scaled()), "float64; pixels are uint8"),
        ((Resize(scale=(100, 100), size=(4096, 4096)), RandomCrop(size=(4096, 4096))) * 2, "OpenCV.*; mend or reorder"),
        ((MultiCrop(views=(Views(name="global", size=32),)), Flip()), "flip come before the transform that makes"),
    ],
)
def test_transforms_that_cannot_work_are_refused_before_training(transforms, says):
    with pytest.raises(ConfigError, match=rf"config\.data\.transforms = \[.*{says}"):
        Chain(transforms, 32).check()


def test_a_run_says_what_it_does_to_images():
    said = str(Chain((RandomResizedCrop(), Flip()), 224))
    assert said.startswith("RandomResizedCrop, Flip; JPEGs are decoded at 1/8")
    assert "resized once by OpenCV" in said
    assert "evaluation decodes at full size and resizes by Pillow" in said


def test_images_need_not_be_square():
    for size in ((32, 96), (96, 32)):
        for preprocess in EVALS:
            assert EvalTransform(size, preprocess)(photo(60, 90)).shape == (*size, 3)
        assert EvalTransform(size, PreprocessConfig()).settings["image_size"] == size
    wide = EvalTransform((30, 60), PreprocessConfig(crop=1.0))(np.tile(np.arange(90, dtype=np.uint8)[:, None], (1, 60)))
    assert abs(int(wide[0].mean()) - 30) <= 1  # the middle third of the rows
    assert abs(int(wide[-1].mean()) - 59) <= 1


def test_crops_have_the_ratio_of_the_images_that_they_become():
    """Nothing is stretched by more than `ratio` says, whatever the model's sides."""
    ratios = []
    for seed in range(200):
        top, left, height, width = random_box(
            rng(seed).random((10, 4)), (0.1, 1.0), (3 / 4, 4 / 3), (300, 900), (32, 96)
        )
        assert 0 <= top <= 300 - height
        assert 0 <= left <= 900 - width
        ratios.append(width / height / 3)
    assert 0.74 < min(ratios) < 0.8
    assert 1.25 < max(ratios) < 1.35
    crop = MultiCrop(views=(Views(size=(16, 32), flip=1.0), Views(name="local", size=8, count=3)))
    assert crop.shapes == {"global": (2, 16, 32, 3), "local": (3, 8, 8, 3)}
    views = Chain((crop,), (16, 32))({"image": np.zeros((60, 90, 3), np.uint8)}, rng())
    assert {name: views[name].shape for name in crop.shapes} == crop.shapes


class Scenes:
    """Record i: rectangles, as `rectangles(i)`."""

    class_names, name, num_classes = None, "scenes", 3

    def __len__(self) -> int:
        return 11

    def key(self, index: int) -> str:
        return str(index)

    def __getitem__(self, index: int) -> dict:
        return rectangles(index) | {"label": index % 3}


def batches(fields, chain, **changes) -> list[dict]:
    arguments = {"batch_size": 8, "host": 0, "hosts": 1, "threads": 2, "workers": 0} | changes
    data = DataConfig(
        train=(TfdsConfig(path="x"),), transforms=chain, threads=arguments.pop("threads"),
        workers=arguments.pop("workers"), shuffle=False,
    )  # fmt: skip
    with train_loader(
        data, image_size=(16, 24), seed=0, start_step=0, sources=[Scenes()], fields=fields, **arguments
    ) as loader:
        return [next(loader) for _ in range(2)]


def same(a: list[dict], b: list[dict]) -> bool:
    return all((x[k] == y[k]).all() for x, y in zip(a, b, strict=True) for k in x | y)


SMALL = MultiCrop(views=(Views(size=16), Views(name="local", count=3, size=8, scale=(0.05, 0.32))))


@pytest.mark.parametrize(
    ("fields", "chain"), [(Objects(3, 2), CHAINS["large scale jitter"]), (Labels(3), (SMALL, RandAugment()))]
)
def test_batches_are_the_same_for_any_number_of_hosts_and_threads(fields, chain):
    whole = batches(fields, chain)
    assert same(whole, batches(fields, chain, threads=1))
    halves = [batches(fields, chain, host=host, hosts=2) for host in (0, 1)]
    assert same(whole, [{k: np.concatenate([h[i][k] for h in halves]) for k in whole[0]} for i in (0, 1)])


def test_batches_of_views_have_the_promised_arrays():
    (batch, _) = batches(Labels(3), (SMALL,))
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items() if k in ("image", "global", "local", "label")} == {
        "global": ("uint8", (8, 2, 16, 16, 3)),
        "local": ("uint8", (8, 3, 8, 8, 3)),
        "label": ("int32", (8,)),
    }


def test_objects_are_padded_to_one_number_and_counted():
    (batch, _) = batches(Objects(3, 5), (Flip(chance=1.0), Resize(to="longer"), Pad()))
    assert batch["image"].shape == (8, 16, 24, 3)
    assert batch["boxes"].shape == (8, 5, 4)
    assert batch["objects"].tolist() == [3] * 8
    assert (batch["size"].max(1) > 15).all()
    assert (batch["size"] <= (16, 24)).all()
    assert batch["box_labels"][:, :3].tolist() == [[0, 1, 2]] * 8
    assert not batch["boxes"][:, 3:].any()
    assert (batch["boxes"][:, :3, 2:] > batch["boxes"][:, :3, :2]).all()
    (few, _) = batches(Objects(3, 2), (Flip(chance=1.0), Resize(to="longer"), Pad()))
    assert few["objects"].tolist() == [3] * 8  # more than fit
    np.testing.assert_array_equal(few["boxes"], batch["boxes"][:, :2])
    with pytest.raises(DataError, match=r"its labels of boxes are \[0, 1, 2\], not integers from 0 to 1"):
        batches(Objects(2, 5), (Resize(),))


OWN = """
from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from visionfm_jax.config import *
from visionfm_jax.config.limits import Limits, Range
from visionfm_jax.data.sources.kinds import BundledConfig
from visionfm_jax.data.transforms import RandomResizedCrop
from visionfm_jax.models.backbones.vit import ViTConfig
from visionfm_jax.tasks.classification import ClassificationConfig


@dataclass(kw_only=True)
class Darken(Transform):
    low: float = 0.25  # factor, drawn between this and 1

    limits: ClassVar[Limits] = {"low": Range(0, 1)}

    def __call__(self, sample, rng: np.random.Generator):
        factor = self.low + (1 - self.low) * rng.random()
        return sample.map_pixels(lambda pixels: (pixels * factor).astype(np.uint8))


def get_config(variant=""):
    return Config(
        name="own",
        model=ViTConfig(size="Ti", patch_size=16, image_size=32),
        task=ClassificationConfig(num_classes=3),
        data=DataConfig(
            train=(BundledConfig(path="digits"),), transforms=(RandomResizedCrop(), Darken(low=0.5))
        ),
        optim=OptimConfig(warmup_steps=2),
        train=TrainConfig(batch_size=8, steps=10),
    )
"""


def test_a_transform_of_ones_own_needs_no_change_of_the_package(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    config, _ = load.from_arguments([f"--config={path}", "--config.data.transforms[1].low=0.25"])
    assert to_dict(config)["data"]["transforms"][1] == {"kind": "Darken", "low": 0.25}
    with pytest.raises(ConfigError, match=r"config.data.transforms\[1\].low = 2.0: must lie in \[0, 1\]"):
        load.from_arguments([f"--config={path}", "--config.data.transforms[1].low=2"])
    dark = batches(Labels(3), config.data.transforms, workers=1)  # which cannot import the file
    light = batches(Labels(3), config.data.transforms[:1])
    pairs = zip(*(np.concatenate([batch["image"] for batch in rows]) for rows in (dark, light)), strict=True)
    ratios = [d.sum() / b.sum() for d, b in pairs if b.any()]
    assert 0.2 < min(ratios) < 0.6 < max(ratios) < 1


def test_a_scan_looks_the_same_in_training_and_evaluation():
    """Colours and position in the tiny run of self-distillation, by a transform of its configuration file."""
    config, _ = load.from_arguments(["--config=vit_huge_dino:tiny"])
    source, size = open_source(config.data.train[0]), config.model.image_size
    train = Chain(config.data.transforms[:1], size)
    first, again, other = (train(source[i], rng(seed))["image"] for i, seed in ((0, 0), (0, 1), (1, 0)))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, EvalTransform(size, config.evals[0].preprocess)(source[0]["image"]))
    assert first.shape == (size, size, 3)
    assert (first[0, 0] != other[0, 0]).any()
