"""Models after training, by `visionfm_jax.load`."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from runs import ROOT

import visionfm_jax as vfm
from visionfm_jax import predict
from visionfm_jax.api import Model
from visionfm_jax.config.load import load_file
from visionfm_jax.data.images import decode
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import BundledConfig, ClassMapsConfig, CocoConfig
from visionfm_jax.errors import CheckpointError, ConfigError, DataError, UserError
from visionfm_jax.evals.eval import make_evals
from visionfm_jax.evals.run import measure
from visionfm_jax.evals.segmentation import confusion_of, score
from visionfm_jax.models.backbones.vit import size_of, table_grid
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.predict import images_of
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

COUNT = 5


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
    ):
        np.testing.assert_array_equal(model.classify(given).probability, expected.probability)
    for alone in (paths[0], str(paths[0]), Image.open(paths[0]), images[0]):
        np.testing.assert_allclose(model.classify(alone).probability, expected.probability[:1], rtol=1e-5)
    assert expected.names[:2] == ("Smileys & Emotion", "People & Body")
    [first, *_], likeliest = expected.best(2)[0], int(expected.probability[0].argmax())
    assert first == (expected.names[likeliest], float(expected.probability[0].max()))


def test_what_cannot_be_read_keeps_its_place(tmp_path, model, images, caplog):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    found = model.features([images[0], tmp_path / "torn.png", tmp_path / "none.png", images[1] / 255, images[1]])
    assert np.isnan(found).all(1).tolist() == [False, True, True, True, False]
    np.testing.assert_allclose(found[[0, 4]], model.features(images[:2]), rtol=1e-5, atol=1e-6)
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


def written(folder: Path, images: list) -> list[str]:
    """As PNGs below a folder, one of which cannot be read."""
    for i, image in enumerate(images):
        path = folder / f"{'odd' if i % 2 else 'even'}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(decode(image)).save(path)
    (folder / "even/torn.png").write_bytes(b"torn")
    return [str(folder / f"{'odd' if i % 2 else 'even'}/{i}.png") for i in range(len(images))]


def arguments(out: Path, picture: Path) -> Namespace:
    return Namespace(out=str(out), picture=str(picture), least_score=0.0)


def check_written_objects(folder: Path, model: vfm.Model, images: list, found: list[vfm.api.Detected]) -> None:
    """As training reads COCO's files."""
    names = written(folder / "images", images[:6])
    predict.detect(
        model, images_of([str(folder / "images")], ""), arguments(folder / "found.json", folder / "found.png")
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
    predict.segment(model, images_of([str(folder / "images")], ""), arguments(folder / "maps", folder / "maps.png"))
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
        predict.segment(model, images_of([str(folder / "images")], ""), arguments(folder / "maps", folder / "maps.png"))
