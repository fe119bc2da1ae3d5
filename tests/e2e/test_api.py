"""Models after training, by `visionfm_jax.load`."""

import errno
import io
import json
import os
import shutil
import tarfile
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from hotcoco import mask as rle
from PIL import Image
from runs import ROOT

import visionfm_jax as vfm
from visionfm_jax import index, parts, predict, storage
from visionfm_jax.api import Model
from visionfm_jax.config import Config, DataConfig, OptimConfig, TrainConfig
from visionfm_jax.config.load import load_file
from visionfm_jax.data.images import decode
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig, ClassMapsConfig, CocoConfig, ScenesConfig
from visionfm_jax.errors import CheckpointError, ConfigError, DataError, UserError
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.evals.kinds import InstancesConfig, PanopticConfig
from visionfm_jax.evals.run import measure
from visionfm_jax.evals.segmentation import confusion_of, score
from visionfm_jax.inference import Stored, encoded
from visionfm_jax.models.backbones.vit import ViTConfig, size_of, table_grid
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.predict import images_of
from visionfm_jax.tasks.eomt import EomtConfig
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

COUNT = 5
_FILE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)).save(_FILE, "PNG")
PNG = _FILE.getvalue()


@pytest.fixture(scope="module")
def images() -> list[np.ndarray]:
    source = open_source(BundledConfig(path="twemoji", split="test"))
    return [decode(source[i]["image"]) for i in range(COUNT)]


@pytest.fixture(scope="module")
def model(whole) -> vfm.Model:
    return vfm.load(whole)


def test_an_image_may_be_given_in_every_form(tmp_path, model, images):
    """All of them are one image; one alone is a row."""
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = [tmp_path / f"{i}.png" for i in range(COUNT)]
    expected = model.classify(images)
    assert expected.probability.shape == (COUNT, 9)
    np.testing.assert_allclose(expected.probability.sum(1), 1, rtol=1e-5)
    for given in (
        paths,
        [*map(str, paths)],
        [Image.open(p) for p in paths],
        np.stack(images),
        [*map(jax.numpy.array, images)],
        [path.read_bytes() for path in paths],
    ):
        np.testing.assert_array_equal(model.classify(given).probability, expected.probability)
    for alone in (paths[0], str(paths[0]), paths[0].read_bytes(), Image.open(paths[0]), images[0]):
        np.testing.assert_allclose(model.classify(alone).probability, expected.probability[:1], rtol=1e-5)
    assert expected.names[:2] == ("Smileys & Emotion", "People & Body")
    [first, *_], likeliest = expected.best(2)[0], int(expected.probability[0].argmax())
    assert first == (expected.names[likeliest], float(expected.probability[0].max()))


def test_an_opened_image_is_read_as_its_file_is(tmp_path, model):
    """16 bits of grey, colours behind transparency, and one that is stored turned."""
    random = np.random.default_rng(0)
    grey = Image.fromarray(random.integers(0, 2**16, (40, 30), np.uint16))
    clear = Image.fromarray(random.integers(0, 256, (30, 40, 4), np.uint8), "RGBA")
    turned = Image.fromarray(random.integers(0, 256, (30, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    paths = [tmp_path / name for name in ("grey.png", "clear.png", "turned.png")]
    grey.save(paths[0]), clear.save(paths[1]), turned.save(paths[2], exif=exif)
    np.testing.assert_array_equal(model.features([Image.open(path) for path in paths]), model.features(paths))


def test_storage_that_fails_for_a_moment_is_asked_again(tmp_path, model, images, monkeypatch):
    """A row of NaN would stand in an index for ever."""
    Image.fromarray(images[0]).save(tmp_path / "a.png")
    whole, failed = Path.read_bytes, []

    def read_bytes(path: Path) -> bytes:
        if path.name == "a.png" and not failed:
            failed.append(path)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return whole(path)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(storage, "WAITS", (0.01, 0.01))
    np.testing.assert_allclose(model.features(tmp_path / "a.png"), model.features(images[0]), rtol=1e-5, atol=1e-6)
    assert failed


def test_what_cannot_be_read_keeps_its_place(tmp_path, model, images, caplog):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    two_channels = np.zeros((9, 9, 2), np.uint8)
    with Image.open(io.BytesIO(PNG[: len(PNG) // 2])) as torn:
        given = [
            images[0],
            tmp_path / "torn.png",
            tmp_path / "none.png",
            images[1] / 255,
            two_channels,
            torn,
            "a\0b",
            images[1],
        ]
        found = model.features(given)
    assert np.isnan(found).all(1).tolist() == [False, True, True, True, True, True, True, False]
    np.testing.assert_allclose(found[[0, 7]], model.features(images[:2]), rtol=1e-5, atol=1e-6)
    assert [str(tmp_path / "torn.png") in caplog.text, "none.png" in caplog.text, "image 3" in caplog.text] == [
        True
    ] * 3
    assert model.classify([tmp_path / "none.png", images[0]]).best()[0] == []
    with pytest.raises(DataError, match="not one of the images could be read"):
        model.features(tmp_path / "none.png")
    with pytest.raises(DataError, match="no images given"):
        model.features([])


def test_any_number_of_images_gives_the_same_rows(model, images):
    """Batches of several sizes, the last one padded."""
    many = [images[i % COUNT] for i in range(8 * 32 + 70)]
    found = model.features(many)
    np.testing.assert_allclose(found, model.features(images)[np.arange(len(many)) % COUNT], rtol=1e-4, atol=1e-5)
    assert np.ptp(found[:COUNT], axis=0).max() > 0.1


def check_layers(model: vfm.Model, images: list[np.ndarray], layers: list[int]) -> None:
    """As the network itself gives them."""
    network, params = model.backbone
    pixels = model.normalize(np.stack([model.transform(image) for image in images]))
    found = network.apply({"params": params}, pixels, layers=tuple(range(layers[0] + 1)))
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(model.features(images), found.pooled, **close)
    np.testing.assert_allclose(model.features(images, pooled=False), found.normed, **close)
    last, first = model.features(images, layers, pooled=False)
    np.testing.assert_allclose(last, found.layers[layers[0]], **close)
    np.testing.assert_allclose(first, found.layers[layers[1]], **close)
    assert np.abs(first).max() > 0.01
    [mean] = model.features(images, layers[1:])
    np.testing.assert_allclose(mean, np.mean(first, (1, 2)), **close)


def test_the_pure_function_is_what_the_methods_use(model, images):
    """Under jit, grad and vmap, on weights that are sharded over the devices."""
    pixels = np.stack([model.transform(image) for image in images])
    out = jax.jit(model.apply)(model.params, pixels)
    assert out.keys() == {"features", "probabilities"}
    np.testing.assert_allclose(out["features"], model.features(images), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(out["probabilities"], model.classify(images).probability, rtol=1e-4, atol=1e-5)
    one = jax.vmap(lambda image: model.apply(model.params, image[None])["probabilities"][0])(pixels)
    np.testing.assert_allclose(one, out["probabilities"], rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: model.apply(params, pixels)["probabilities"][:, 0].mean()))(model.params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(gradient)) > 1e-4
    with pytest.raises(UserError, match="ClassificationConfig has no text tower"):
        model.apply(model.params, texts=np.zeros((1, 8), np.int32))


def test_layers_are_numbers(model, images):
    whole = model.features(images[:1], [0, 1])
    for given in (np.array([0, 1]), iter([0, 1]), range(2)):
        np.testing.assert_array_equal(model.features(images[:1], given), whole)
    for given in (["a"], [0.5], 0):
        with pytest.raises((UserError, TypeError), match=r"layers by number|not iterable"):
            model.features(images[:1], given)


def test_maps_of_layers(model, images):
    depth = size_of(model.config.model).depth
    check_layers(model, images, [depth - 1, 1])
    whole, last = model.features(images, pooled=False), model.features(images, [-1], pooled=False)[0]
    assert whole.shape == last.shape == (COUNT, *table_grid(model.config.model), size_of(model.config.model).width)
    with pytest.raises(UserError, match=rf"has layers 0 to {depth - 1}; not all of \[{depth}\]"):
        model.features(images, [depth])


def test_what_a_model_cannot_do_it_says(model, images):
    for call, what in (
        (lambda: model.embed_texts("a cat"), "has no text tower"),
        (lambda: model.embed_images(images), "has no embeddings"),
        (lambda: model.detect(images), "detects no objects"),
        (lambda: model.segment(images), "has no class for each pixel"),
        (lambda: model.caption(images), "writes no captions"),
        (lambda: model.classify(images, ["cat", "dog"]), "has classes of its own"),
        (lambda: model.segments(images), "finds no segments"),
    ):
        with pytest.raises(UserError, match=what):
            call()


def test_a_folder_that_is_no_run(tmp_path, whole):
    with pytest.raises(ConfigError, match="there is no such folder"):
        vfm.load(tmp_path / "none")
    with pytest.raises(ConfigError, match=r"it has no config\.json"):
        vfm.load(tmp_path)
    folder = tmp_path / "run"
    folder.mkdir()
    saved = json.loads((whole / "config.json").read_text())
    for damage, what in (
        ("{", "is damaged"),
        (json.dumps({"config": {**saved["config"], "newer": 1}}), "Config has no newer"),
        (
            json.dumps({"config": saved["config"] | {"task": {"kind": "Mine"}}}),
            "import the module of a class of your own",
        ),
    ):
        (folder / "config.json").write_text(damage)
        with pytest.raises(ConfigError, match=what):
            vfm.load(folder)
    shutil.copy(whole / "config.json", folder / "config.json")
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        vfm.load(folder)


@pytest.mark.parametrize("name", ["vit_huge_coco", "vit_huge_ade20k"])
def test_objects_and_maps_are_those_of_the_eval(tmp_path, name):
    """On random weights: where an eval counts them on images of another size than the model's."""
    config = load_file(f"{ROOT}/configs/{name}.py:tiny")
    config.train.precision, config.evals[0].source.size, config.evals[0].source.scenes = "fp32", 80, 24
    if name.endswith("coco"):
        config.evals[0].source.truth = "boxes"
    trainer = Trainer(config, make_mesh(1, jax.devices()[:2]))
    random = np.random.default_rng(0)  # heads begin with zeros
    params = jax.tree.map(lambda p: p + 0.05 * random.standard_normal(p.shape, np.float32), trainer.init().params)
    evals = make_evals(config, 0, 1)
    scores = measure(trainer, evals, params, {}, lambda n: None)
    source = evals["held_out"].source
    model = Model(trainer, params, source.class_names)
    images = [source[i]["image"] for i in range(len(source))]
    if name.endswith("ade20k"):
        maps = model.segment(images)
        assert len(np.unique(np.concatenate([found.ravel() for found in maps]))) > 2
        confusion = sum(confusion_of(source[i]["class_map"], found, 10) for i, found in enumerate(maps))
        assert score(confusion)["pixel_accuracy"] == pytest.approx(scores["held_out/pixel_accuracy"], abs=1e-4)
        check_written_maps(tmp_path, model, images, maps)
    else:
        found = model.detect(images, least_score=0)
        shown = {entry["key"]: entry["found"] for entry in evals["held_out"].pictured["boxes"]}
        assert len(shown) > 4
        for i, one in enumerate(found):
            expected = shown.get(source.key(i), {"boxes": np.zeros((0, 4))})
            count = len(expected["boxes"])
            np.testing.assert_allclose(one.boxes[:count], expected["boxes"], atol=0.02)
            assert one.names == tuple(source.class_names[k] for k in one.labels)
            assert (np.diff(one.scores) <= 0).all()
        assert model.detect(images, least_score=1.1)[0].boxes.shape == (0, 4)
        check_written_objects(tmp_path, model, images, found)


@pytest.mark.parametrize("truth", ["instance", "panoptic"])
def test_masks_are_those_of_the_eval(tmp_path, truth, monkeypatch):
    """On random weights, on images of another size than the model's."""
    source = ScenesConfig(path="twemoji", split="test", size=64, scenes=8, truth="masks")
    kind = {"instance": InstancesConfig, "panoptic": PanopticConfig}[truth]
    less = {"least_score": 0.1, "least_visible": 0.1} if truth == "panoptic" else {}
    config = Config(
        name="masks",
        model=ViTConfig(width=32, depth=2, heads=2, mlp=64, patch_size=8, image_size=48),
        task=EomtConfig(truth=truth, num_classes=9, queries=6, most_masks=4, blocks=1, detections=5),
        data=DataConfig(train=(source,), num_examples=8),
        optim=OptimConfig(warmup_steps=0),
        train=TrainConfig(batch_size=8, steps=1, precision="fp32"),
        evals=(kind(name="held_out", source=source, **less),),
    )
    trainer = Trainer(config, make_mesh(1, jax.devices()[:2]))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda p: p + 0.3 * random.standard_normal(p.shape, np.float32), trainer.init().params)
    evals, seen = make_evals(config, 0, 1), []
    name = {"instance": "_one", "panoptic": "_compare"}[truth]
    whole = getattr(type(evals["held_out"]), name)
    monkeypatch.setattr(type(evals["held_out"]), name, lambda *given: seen.append(whole(*given)) or seen[-1])
    measure(trainer, evals, params, {}, lambda batches: None)
    opened = evals["held_out"].source
    model, seen = Model(trainer, params, opened.class_names), sorted(seen, key=lambda one: one[0])
    images = [opened[i]["image"] for i in range(len(opened))]
    if truth == "panoptic":
        with pytest.raises(UserError, match="detects no objects"):
            model.detect(images)
        found, classes = model.segments(images), model.segment(images)
        assert sum(len(one.labels) for one in found) > 8
        for one, of_pixels, expected in zip(found, classes, seen, strict=True):
            labels = expected.guess.labels[np.maximum(expected.guess.map - 1, 0)] if len(one.labels) else 0
            of_eval = np.where(expected.guess.map > 0, labels, -1)
            assert (of_pixels == of_eval).mean() > 0.999
            assert (np.array([-1, *one.labels])[one.map + 1] == of_pixels).all()
            assert one.names == tuple(opened.class_names[k] for k in one.labels)
        return
    found = model.detect(images, least_score=0)
    assert sum(len(one.scores) for one in found) > 8
    for i, (one, (_, _, expected, _)) in enumerate(zip(found, seen, strict=True)):
        order = np.argsort(-expected.scores, kind="stable")
        np.testing.assert_allclose(one.scores, expected.scores[order], rtol=1e-4)
        np.testing.assert_allclose(one.boxes, expected.boxes[order], atol=1)
        assert one.boxes[0, 2] <= images[i].shape[1] if isinstance(images[i], np.ndarray) else True
        assert one.mask(0).shape == one.size
        assert one.mask(0).sum() == pytest.approx(rle.area(expected.masks[order[0]]), rel=0.02)
    names = written(tmp_path / "images", images)
    to = arguments("detect", tmp_path / "found.json", tmp_path / "found.png")
    predict.detect(model, images_of([str(tmp_path / "images")], ""), to)
    read_back = open_source(
        CocoConfig(path=str(tmp_path), split="", annotations="found.json", images="images", masks=True)
    )
    for i in range(len(read_back)):
        one = found[names.index(str(tmp_path / "images" / read_back.key(i)))]
        record = read_back[i]
        assert record["masks"].shape[1:] == one.size
        assert sorted(record["masks"].sum((1, 2)).tolist()) == sorted(one.mask(k).sum() for k in range(len(one.scores)))


def test_parts_are_continued_and_shared(tmp_path, model, images, monkeypatch):
    """Of a folder one of whose parts has no image that can be read."""
    monkeypatch.setattr(parts, "ROWS", 2)
    names = written(tmp_path / "images", [np.asarray(image) for image in images[:3]])
    for i in (1, 2):
        (tmp_path / f"images/even/torn{i}.png").write_bytes(b"torn")
    given = images_of([str(tmp_path / "images")], "")  # even: 0, 2, torn, torn1, torn2; odd: 1
    assert [Path(name).name for name in given] == ["0.png", "2.png", "torn.png", "torn1.png", "torn2.png", "1.png"]

    def run(command: str, process: str, **more) -> list[dict]:
        out = tmp_path / command
        values = {
            "out": str(out),
            "process": process,
            "names": "",
            "prompts": "",
            "count": 2,
            "features": True,
            "texts": "",
        }
        getattr(predict, command)(model, given, Namespace(command=command, **values | more))
        lines = [line for path in sorted(out.glob("*.jsonl")) for line in path.read_text().splitlines()]
        return [json.loads(line) for line in lines]

    assert [one["image"] for one in run("classify", "1/2")] == [*given][2:4]
    records = run("classify", "0/2")
    assert [one["image"] for one in records] == [*given]
    assert [one["classes"] is None for one in records] == [False, False, True, True, True, False]
    best = dict(model.classify(names[0]).best(2)[0])
    assert records[0]["classes"] == pytest.approx(best, rel=1e-4)
    with pytest.raises(ConfigError, match="differs in count"):
        run("classify", "0/1", count=3)
    run("embed", "0/1")
    _, found = index.open_index(str(tmp_path / "embed"))
    rows = np.concatenate([part.rows for part in found])
    assert np.isnan(rows).all(1).tolist() == [False, False, True, True, True, False]
    np.testing.assert_allclose(rows[0], model.features(names[0])[0], rtol=1e-4, atol=1e-5)


def test_images_are_those_of_files_folders_patterns_and_datasets(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("a/1.png", "a/2.png", "3.png"):
        (tmp_path / name).write_bytes(PNG)
    with tarfile.open(tmp_path / "a/00000.tar", "w") as tar:
        tar.add(tmp_path / "3.png", "key.png")
    found = images_of([str(tmp_path / "a"), str(tmp_path / "?.png"), "bundled:digits"], "test")
    names = [*found]
    assert sum(isinstance(image, Stored) for image in found.values()) == 1 + 1000
    assert [name for name in names if not isinstance(found[name], Stored)] == [
        str(tmp_path / name) for name in ("a/1.png", "a/2.png", "3.png")
    ]
    for image in (found[names[0]], found[names[-1]]):
        assert decode(encoded(predict._again(str(image)))).shape[2] == 3


def test_a_pipe_is_no_image(tmp_path, model, images):
    os.mkfifo(tmp_path / "pipe.png")
    assert np.isnan(model.features([images[0], tmp_path / "pipe.png"])[1]).all()


def test_a_map_is_never_written_outside_its_folder():
    stored = Stored("tars:x#0 a/../../b", lambda: b"")
    with pytest.raises(DataError, match=r"its map a/\.\./\.\./b\.png would be outside --out"):
        predict._map_names({stored.name: stored})


def written(folder: Path, images: list) -> list[str]:
    """As PNGs below a folder, one of which cannot be read."""
    for i, image in enumerate(images):
        path = folder / f"{'odd' if i % 2 else 'even'}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(image)).save(path)
    (folder / "even/torn.png").write_bytes(b"torn")
    return [str(folder / f"{'odd' if i % 2 else 'even'}/{i}.png") for i in range(len(images))]


def arguments(command: str, out: Path, picture: Path) -> Namespace:
    return Namespace(command=command, out=str(out), picture=str(picture), least_score=0.0, process="0/1")


def check_written_objects(folder: Path, model: vfm.Model, images: list, found: list[vfm.api.Detected]) -> None:
    """As training reads COCO's files."""
    names = written(folder / "images", images[:6])
    predict.detect(
        model, images_of([str(folder / "images")], ""), arguments("detect", folder / "found.json", folder / "found.png")
    )
    source = open_source(
        CocoConfig(path=str(folder), split="", annotations="found.json", images="images"),
    )
    assert (len(source), source.class_names) == (6, model.class_names)
    for i in range(6):
        expected = found[names.index(str(folder / "images" / source.key(i)))]
        np.testing.assert_allclose(source[i]["boxes"], expected.boxes, atol=0.05)
        assert source[i]["box_labels"].tolist() == expected.labels.tolist()
    assert (folder / "found.png").stat().st_size > 5000


def check_written_maps(folder: Path, model: vfm.Model, images: list, maps: list[np.ndarray]) -> None:
    """As training reads folders of maps."""
    names = written(folder / "images", images[:6])
    predict.segment(
        model, images_of([str(folder / "images")], ""), arguments("segment", folder / "maps", folder / "maps.png")
    )
    source = open_source(
        ClassMapsConfig(
            path=str(folder),
            split="",
            images="images",
            maps="maps",
            map_suffix=".png",
            names="maps/names.txt",
            ignore=(),
        )
    )
    assert (len(source), source.class_names) == (6, model.class_names)
    for i in range(6):
        expected = maps[names.index(str(folder / "images" / source.key(i)))]
        assert (source[i]["class_map"] == expected).mean() > 0.999
    assert (folder / "maps.png").stat().st_size > 5000
    (folder / "images/odd/1.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=r"1\.jpg and .*1\.png would share the map odd/1\.png"):
        predict.segment(
            model, images_of([str(folder / "images")], ""), arguments("segment", folder / "maps", folder / "maps.png")
        )
