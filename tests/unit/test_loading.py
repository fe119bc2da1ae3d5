"""Models of other libraries, loaded from their folders alone: what they compute, and what is refused."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import visionfm_jax as vfm
from tests.unit.test_export import CASES, FORMS, HAS, NAMES, config_of, model_of
from visionfm_jax.data.tokenizer.files import require_same_texts
from visionfm_jax.errors import ConfigError, DataError, UserError
from visionfm_jax.export import export, trained_of
from visionfm_jax.interop.described import by_name
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.predict import main as predict
from visionfm_jax.train.initialise import untrained

pytestmark = pytest.mark.usefixtures("quick_compiles")

PICTURES = [np.random.default_rng(i).integers(0, 256, (50 + 9 * i, 61, 3), np.uint8) for i in range(2)]
EXACT = 3e-6


def close(found, expected):
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= EXACT * np.abs(expected).max()


def outputs(model, of_texts):
    found = {"features": model.features(PICTURES)}
    if of_texts:
        found |= {"images": model.embed_images(PICTURES), "texts": model.embed_texts(["a red bird", "two cats"])}
    elif "labels" in model.config.task.predictions:
        found["probabilities"] = model.classify(PICTURES).probability
    return found


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_loaded(tmp_path, name):
    model = model_of(config_of(name))
    first = True
    for to in (to for to, letter in zip(FORMS, HAS[name], strict=False) if letter != "-"):
        export(model, to, tmp_path / to)
        loaded = vfm.load(tmp_path / to, devices=jax.devices()[:1])
        expected, found = flatten(trained_of(model, to)[0].params), flatten(loaded.params)
        if name == "vit_registers" and to == "timm":  # which has rows for registers, which are zero
            expected.pop("pos_embed"), found.pop("pos_embed")
        assert found.keys() == expected.keys()
        for path, value in found.items():
            assert np.asarray(value).tobytes() == np.asarray(expected[path]).tobytes(), path
        two = "clip" in name.split("_")[0] and to != "timm"
        assert loaded.class_names == (NAMES if model.class_names and not two and "head/bias" in found else ())
        if first:
            mine, theirs = (outputs(m, two) for m in (loaded, model))
            for what in mine:
                close(mine[what], theirs[what])
        first = False


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A classifier as timm's and transformers' folder, and two towers as OpenCLIP's."""
    base = tmp_path_factory.mktemp("exported")
    classifier = model_of(config_of("vit_cls"))
    for to in ("timm", "transformers"):
        export(classifier, to, base / to)
    export(model_of(config_of("clip")), "open_clip", base / "open_clip")
    return base


def changed(exported, tmp_path, to, file, change):
    """A copy of one of the folders, with a JSON file changed."""
    folder = tmp_path / to
    shutil.copytree(exported / to, folder)
    about = json.loads((folder / file).read_text())
    change(about)
    (folder / file).write_text(json.dumps(about))
    return folder


@pytest.mark.parametrize(
    ("to", "file", "change", "says"),
    [
        ("timm", "config.json", lambda a: a.update(architecture="vit_of_mine"), "timm's architecture 'vit_of_mine'"),
        ("timm", "config.json", lambda a: a["pretrained_cfg"].update(crop_mode="border"), "crop_mode = 'border'"),
        ("timm", "config.json", lambda a: a["pretrained_cfg"].pop("mean"), "nothing says how its images are norm"),
        ("timm", "config.json", lambda a: a["pretrained_cfg"].update(interpolation="random"), "resized by 'random'"),
        ("transformers", "config.json", lambda a: a.update(model_type="bert"), "model_type = 'bert' is none of"),
        ("transformers", "config.json", lambda a: a.update(num_attention_heads=5), "heads"),
        ("transformers", "preprocessor_config.json", lambda a: a.update(resample=0), "resample = 0"),
        ("transformers", "preprocessor_config.json", lambda a: a.update(do_resize=False), "do_resize = False"),
        ("open_clip", "open_clip_config.json", lambda a: a["preprocess_cfg"].update(resize_mode="longest"),
         "not known here"),
        ("open_clip", "open_clip_config.json", lambda a: a["model_cfg"]["text_cfg"].update(hf_model_name="bert"),
         "hf_model_name"),
        ("open_clip", "open_clip_config.json", lambda a: a["model_cfg"]["vision_cfg"].update(timm_model_name="x"),
         "image tower is timm's x"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(exported, tmp_path, to, file, change, says):
    with pytest.raises(UserError) as error:
        vfm.load(changed(exported, tmp_path, to, file, change))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_preprocessors_of_older_versions(exported, tmp_path):
    """One number is the shorter edge where a centre is cut out, and else both edges."""

    def older(crop):
        def change(about):
            about.update(size=40, do_center_crop=crop, crop_size=32)
            del about["image_processor_type"]

        return change

    for crop, resize, size in ((True, "crop", 32), (False, "squash", 40)):
        folder = changed(exported, tmp_path / str(crop), "transformers", "preprocessor_config.json", older(crop))
        model = vfm.load(folder, devices=jax.devices()[:1])
        assert (model.transform.preprocess.resize, model.transform.size) == (resize, size)
        assert int(size / model.transform.preprocess.crop) == 40


def tokenizer_json(folder, end, pad):
    """A tokenizer of four words, whose texts end by `end` tokens of an end and are padded by `pad`."""
    words = {"[PAD]": 0, "<s>": 1, "</s>": 2, "two": 3, "cats": 4, "on": 5, "a": 6, "sofa": 7, "<unk>": 8}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    single = " ".join(["<s> $A", *["</s>"] * end])
    core.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    core.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": pad}))
    return str(folder / "tokenizer.json")


def test_texts_that_another_library_reads_otherwise_are_refused(tmp_path):
    require_same_texts(tokenizer_json(tmp_path, 1, {"content": "[PAD]"}), True)
    require_same_texts(tokenizer_json(tmp_path, 1, "</s>"), False)
    for end, pad, says in ((1, "</s>", "padded by '</s>'"), (2, "[PAD]", r"reads 'two cats on a sofa' as \[1, 3")):
        with pytest.raises(UserError, match=says):
            require_same_texts(tokenizer_json(tmp_path, end, pad), True)


def test_what_is_no_model(exported, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"it has no config\.json; name the folder of a run"):
        vfm.load(tmp_path / "empty")
    with pytest.raises(ConfigError, match="there is no such folder"):
        vfm.load(tmp_path / "none")
    (tmp_path / "cat.txt").write_text("cat")
    with pytest.raises(UserError, match="is not a weights file by its name"):
        vfm.load(tmp_path / "cat.txt")
    shutil.copytree(exported / "timm", tmp_path / "half")
    file = tmp_path / "half/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is not a complete safetensors file"):
        vfm.load(tmp_path / "half")
    shutil.copytree(exported / "timm", tmp_path / "alone")
    (tmp_path / "alone/config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        vfm.load(tmp_path / "alone")
    shutil.copytree(exported / "transformers", tmp_path / "blind")
    (tmp_path / "blind/preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no preprocessor_config\.json beside it"):
        vfm.load(tmp_path / "blind")


def test_what_it_cannot_do_is_said(exported):
    model = vfm.load(exported / "timm")
    with pytest.raises(UserError, match="has no text tower"):
        model.embed_texts("a cat")
    with pytest.raises(UserError, match="has no embeddings"):
        model.embed_images(PICTURES)
    assert model.features(PICTURES).shape == (2, 48)


def test_names_of_networks():
    names = vfm.list_models()
    assert {"vit_base_patch16_224", "swinv2_tiny_window8_256", "vit_small_patch16_dinov3", "ViT-B-32"} <= set(names)
    assert vfm.list_models("ViT-L-14*")[0] == "ViT-L-14"
    for name in names:
        said = by_name(name)
        config = untrained(name, said)
        config.validate_model()
        assert said.preprocess.problems("preprocess") == []
        assert config.task.predictions == {"features"} | ({"embeddings"} if name.startswith("ViT-") else set())


def test_a_network_by_its_name(exported, tmp_path):
    devices = jax.devices()[:1]
    one, other, again = (vfm.create("vit_tiny_patch16_224", seed=seed, devices=devices) for seed in (0, 1, 0))
    kernel = "blocks/mlp/fc1/kernel"
    first, second, third = (np.asarray(flatten(model.params)[kernel]) for model in (one, other, again))
    assert first.shape == (12, 192, 768)
    assert first.std() > 0.01
    assert (first == third).all()
    assert (first != second).mean() > 0.99
    export(one, "timm", tmp_path / "timm")
    file = tmp_path / "timm/model.safetensors"
    read = vfm.create("vit_tiny_patch16_224", weights=file, devices=devices)
    for path, value in flatten(read.params).items():
        assert np.asarray(value).tobytes() == np.asarray(flatten(one.params)[path]).tobytes(), path
    assert read.transform == one.transform
    with pytest.raises(UserError, match=r"do not fit the model|is no timm ViT"):
        vfm.create("vit_small_patch16_224", weights=file, devices=devices)
    with pytest.raises(ConfigError, match=r"leave .*head.* untrained"):
        vfm.create("vit_tiny_patch16_224", weights=file, num_classes=10, devices=devices)
    for words, says in (
        (
            {"name": "vit_bass_patch16_224"},
            r"there is no model 'vit_bass_patch16_224'; did you mean vit_base_patch16_224",
        ),
        ({"name": "?"}, r"list_models\(\) has the names"),
        ({"name": "ViT-B-32", "num_classes": 3}, "has two towers"),
        ({"name": "vit_tiny_patch16_224", "num_classes": 1}, "two classes or more"),
        ({"name": "vit_tiny_patch16_224", "weights": "none"}, "there is no such folder or file"),
    ):
        with pytest.raises(UserError, match=says):
            vfm.create(**words)


def test_another_library_s_folder_is_written_again(exported, tmp_path):
    """From transformers to timm, and back to the bit; the card says whose the weights are."""
    export(exported / "transformers", "timm", tmp_path / "timm")
    export(tmp_path / "timm", "transformers", tmp_path / "transformers")
    files = [folder / "transformers/model.safetensors" for folder in (exported, tmp_path)]
    assert files[0].read_bytes() == files[1].read_bytes()
    card = (tmp_path / "timm/README.md").read_text()
    assert "converted with visionfm_jax" in card
    assert "| weights | converted from transformers |" in card
    assert "learning rate" not in card


def test_the_command(exported, tmp_path, capsys):
    Image.fromarray(PICTURES[0]).save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("cat\ncrane, the bird\n")
    run = [str(exported / "open_clip"), str(tmp_path / "a.png"), "--prompts=a {}"]
    predict([*run, "--names=cat,dog"], mode="classify")
    assert "cat" in capsys.readouterr().out
    predict([*run, f"--names={tmp_path / 'names.txt'}"], mode="classify")
    assert "crane, the bird" in capsys.readouterr().out
    parts = [*run, f"--out={tmp_path / 'parts'}"]
    predict([*parts, "--names=cat,dog"], mode="classify")
    with pytest.raises(ConfigError, match=r"holds an index that differs in classes"):
        predict([*parts, "--names=cat,bird"], mode="classify")
    for names, what in (("cat,", "a blank name"), ("a,b,a", "a twice"), ("cat", "has no comma and is no list")):
        with pytest.raises(ConfigError, match=what):
            predict([*run, f"--names={names}"], mode="classify")
    with pytest.raises(UserError, match=r"a\.png/x\.npz"):
        predict([*run[:2], f"--out={tmp_path / 'a.png/x.npz'}"], mode="embed")
    with pytest.raises(ConfigError, match=r"--least_score=nan: must be from 0 to 1"):
        predict([*run[:2], "--least_score=nan"], mode="detect")
    with pytest.raises(ConfigError, match=r"no argument '--least_score'"):  # which is of detect
        predict([*run, "--least_score=1"], mode="classify")
    with pytest.raises(ConfigError, match=r"--process=1/2|is no folder of parts"):
        predict([*run, "--names=cat,dog", "--process=1/2"], mode="classify")


def test_what_is_computed_in_16_bit_may_be_computed_in_32(exported):
    half, whole = (vfm.load(exported / "timm", precision=name) for name in ("bf16", "fp32"))
    ours = vfm.load(exported / "timm").features(PICTURES)
    np.testing.assert_array_equal(whole.features(PICTURES), ours)
    assert 1e-4 < np.abs(half.features(PICTURES) - ours).max() < 0.1 * np.abs(ours).max()
    assert repr(half).endswith("px, 5 classes, bf16, after step 0>")
    with pytest.raises(UserError, match="precision = 'fp8': there are bf16, fp16, fp32"):
        vfm.load(exported / "timm", precision="fp8")


def test_a_network_that_is_not_known_is_no_matter_of_a_configuration(exported, tmp_path):
    """Here is none whose fields could be set."""
    shutil.copytree(exported / "timm", tmp_path / "timm")
    path = tmp_path / "timm/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architecture": "vit_unheard_of"}))
    with pytest.raises(UserError, match=r"'vit_unheard_of' is none of .*; name the folder of a model") as error:
        vfm.load(tmp_path / "timm")
    assert "config.checkpoint" not in str(error.value)


def test_search_finds_what_can_be_read_by_an_index_of_the_same_model(exported, tmp_path, capsys):
    clip, photos = str(exported / "open_clip"), tmp_path / "photos"
    photos.mkdir()
    for i, picture in enumerate(PICTURES):
        Image.fromarray(picture).save(photos / f"{i}.png")
    (photos / "torn.png").write_bytes(b"torn")
    out = [f"--out={tmp_path / 'found.json'}", f"--picture={tmp_path / 'found.png'}"]
    predict([clip, str(photos), "--text=a red bird", *out], mode="search")
    found = json.loads((tmp_path / "found.json").read_text())
    assert sorted(one["image"] for one in found) == [str(photos / "0.png"), str(photos / "1.png")]
    predict([clip, str(photos), f"--out={tmp_path / 'index.npz'}"], mode="embed")
    capsys.readouterr()
    predict([clip, f"--index={tmp_path / 'index.npz'}", f"--image={photos / '1.png'}", *out], mode="search")
    assert f"1   1.000  {photos / '1.png'}" in capsys.readouterr().out
    (photos / "1.png").unlink()  # a picture of what is left
    predict([clip, f"--index={tmp_path / 'index.npz'}", "--text=a red bird", *out], mode="search")
    assert "1.png is not drawn" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"--image=.*torn\.png: cannot be read"):
        predict([clip, f"--index={tmp_path / 'index.npz'}", f"--image={photos / 'torn.png'}"], mode="search")
    vit = str(exported / "timm")
    with pytest.raises(DataError, match=r"was made otherwise \(model, features\)"):
        predict([vit, f"--index={tmp_path / 'index.npz'}", f"--image={photos / '0.png'}"], mode="search")
    capsys.readouterr()
    predict([vit, str(photos), f"--out={tmp_path / 'vit.npz'}"], mode="embed")
    assert capsys.readouterr().out.startswith("2 images (1 of them could not be read: NaN): ")
    predict([vit, f"--index={tmp_path / 'vit.npz'}", f"--image={photos / '0.png'}"], mode="search")
    predict([vit, str(photos), f"--image={photos / '0.png'}"], mode="search")  # by features
    assert f"1   1.000  {photos / '0.png'}" in capsys.readouterr().out


def test_classes_after_the_sigmoid_loss_have_chances_of_their_own():
    """sigmoid(s cos + b), as the loss has it (Zhai et al. 2023)."""
    model = model_of(config_of("siglip"))
    found = model.classify(PICTURES, ["cat", "dog", "bird"], "a {}").probability
    cosines = model.embed_images(PICTURES) @ model.embed_texts(["a cat", "a dog", "a bird"]).T
    logits = np.exp(model.params["scale"]) * cosines + model.params["bias"]
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-logits)), rtol=1e-4)
    with pytest.raises(UserError, match="needs a list of names, not 'cat,dog'"):
        model.classify(PICTURES, "cat,dog")
    with pytest.raises(UserError, match="give their names"):
        model.classify(PICTURES, [])
