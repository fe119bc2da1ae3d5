"""Exported folders: read back to the bit, what they say, what is refused. The libraries: `tests/parity/README.md`."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import SafetensorError, safe_open

from visionfm_jax.api import Model
from visionfm_jax.config import PreprocessConfig
from visionfm_jax.config.load import load_file
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.data.tokenizer.files import huggingface_files
from visionfm_jax.errors import ConfigError, OutputError, UserError
from visionfm_jax.export import export, main, trained_of
from visionfm_jax.interop.files import read_weights
from visionfm_jax.interop.hub import parts_of
from visionfm_jax.interop.leaves import flatten
from visionfm_jax.parallel.mesh import make_mesh
from visionfm_jax.train.initialise import find_weights
from visionfm_jax.train.step import Trainer

pytestmark = pytest.mark.usefixtures("quick_compiles")

ROOT = Path(__file__).parents[2]
CHECK = runpy.run_path(f"{ROOT}/tests/parity/check_exports.py")
CASES = {name: (task, network, more) for name, task, network, more in CHECK["cases"]()}
FORMS = ("timm", "transformers", "open_clip")
# Which forms the cases have, by the first letter.
HAS = {
    "vit_cls": "tt", "vit_gap": "t", "vit_norm_gap": "t", "vit_map": "t", "vit_patches": "t", "vit_registers": "t",
    "vit_clip": "t", "vit_swiglu": "t", "vit_not_square": "tt", "vit_resized": "tt", "vit_evaluated_larger": "tt",
    "vit_rope": "t", "vit_rope_gap": "t", "swin": "tt", "swin_pretrained": "tt", "swin_roll_first": "t",
    "swin_evaluated_larger": "tt", "dinov2": "-t", "dinov2_swiglu": "-t", "dinov2_registers": "-t",
    "backbone_vit": "tt", "backbone_dinov2": "tt", "backbone_rope": "tt", "backbone_rope_swiglu": "tt",
    "backbone_siglip": "tt", "backbone_clip": "tt", "backbone_swin": "tt", "clip": "tto", "clip_quick": "tto",
    "clip_no_pre": "--o", "siglip": "tt",
}  # fmt: skip
NAMES = ("cat", "dog, or puppy", "ñandú", "3", "4")


def config_of(name: str, **changed: Any) -> Any:
    task, network, more = CASES[name]
    return CHECK["made"](task, copy.deepcopy(network), {**more, **changed})


def on_one(config: Any) -> Trainer:
    return Trainer(config, make_mesh(1, jax.devices()[:1]))


def model_of(config: Any) -> Model:
    trainer = on_one(config)
    names = NAMES if hasattr(config.task, "num_classes") else ()
    return Model(trainer, CHECK["random_like"](trainer.shapes.params), names, 7)


def read_back(model: Model, to: str, folder: Path) -> dict[str, np.ndarray]:
    """By `config.checkpoint.weights`, in a run whose model is what was exported."""
    trained, _ = trained_of(model, to)
    config = copy.deepcopy(model.config)
    config.checkpoint.weights = str(folder)
    tower = to == "timm" and hasattr(config.model, "text")
    if tower:
        config.model.image, config.checkpoint.weights_into = trained.config, "image"
    else:
        config.model = trained.config
    if not tower and not trained.names and not hasattr(config.model, "text"):
        config.checkpoint.skip = ("image_head", "patch_head", "mask_token")
    found = find_weights(on_one(config))
    assert not found.fit.resampled
    return {path.removeprefix("image/" if tower else ""): value for path, value in found.arrays.items()}


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_read_back_to_the_bit(tmp_path, name):
    model = model_of(config_of(name))
    has = HAS[name].ljust(3, "-")
    for to, letter in zip(FORMS, has, strict=True):
        if letter == "-":
            with pytest.raises(UserError, match=f"--to={to}: .*(works|keep the run)") as error:
                export(model, to, tmp_path / to)
            assert "\n" not in str(error.value)
            assert not (tmp_path / to).exists()
            continue
        export(model, to, tmp_path / to)
        if name == "vit_registers":  # timm has rows for registers, which are zero
            model.config.model.pos_embed = "all"
            table = model.params["pos_embed"]
            model.params["pos_embed"] = np.concatenate([table[:1], np.zeros_like(table[:4]), table[1:]])
        expected = flatten(trained_of(model, to)[0].params)
        found = read_back(model, to, tmp_path / to)
        assert found.keys() == expected.keys()
        for path, value in found.items():
            assert np.asarray(expected[path]).tobytes() == value.tobytes(), path


def test_what_timm_is_told(tmp_path):
    config = config_of("vit_gap", crop=0.875, interpolation="bilinear")
    export(model_of(config), "timm", tmp_path / "out")
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["architecture"] == "vit_base_patch16_224"
    assert (about["num_classes"], about["num_features"], about["global_pool"]) == (5, 48, "avg")
    assert about["label_names"] == list(NAMES)
    given = about["model_args"]
    assert (given["img_size"], given["patch_size"], given["embed_dim"], given["depth"]) == (32, 8, 48, 3)
    assert int(48 * given["mlp_ratio"]) == 100
    assert (given["fc_norm"], given["class_token"], given["act_layer"]) == (True, False, "gelu_tanh")
    said = about["pretrained_cfg"]
    assert (said["input_size"], said["mean"], said["std"]) == ([3, 32, 32], [0.48, 0.45, 0.4], [0.26, 0.27, 0.28])
    assert (said["crop_pct"], said["crop_mode"], said["interpolation"]) == (0.875, "center", "bilinear")


def test_what_transformers_is_told(tmp_path):
    export(model_of(config_of("dinov2_registers", crop=0.875)), "transformers", tmp_path / "out")
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["architectures"] == ["Dinov2WithRegistersForImageClassification"]
    assert (about["model_type"], about["num_register_tokens"]) == ("dinov2_with_registers", 4)
    assert about["id2label"] == {str(i): name for i, name in enumerate(NAMES)}
    assert about["label2id"] == {name: i for i, name in enumerate(NAMES)}
    said = json.loads((tmp_path / "out/preprocessor_config.json").read_text())
    assert (said["size"], said["crop_size"], said["resample"]) == (
        {"shortest_edge": 36}, {"height": 32, "width": 32}, 3,
    )  # fmt: skip
    assert (said["image_mean"], said["image_std"]) == ([0.48, 0.45, 0.4], [0.26, 0.27, 0.28])
    with safe_open(tmp_path / "out/model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_open_clip_is_told(tmp_path):
    notes = export(model_of(config_of("clip_no_pre", crop=0.875)), "open_clip", tmp_path / "out")
    about = json.loads((tmp_path / "out/open_clip_config.json").read_text())
    cfg = about["model_cfg"]
    assert (cfg["embed_dim"], cfg["init_logit_bias"]) == (24, -10)
    assert (cfg["vision_cfg"]["head_width"], cfg["vision_cfg"]["no_ln_pre"]) == (16, True)
    assert (cfg["text_cfg"]["pool_type"], cfg["text_cfg"]["eos_id"], cfg["text_cfg"]["heads"]) == ("eos", 40, 2)
    assert about["preprocess_cfg"]["size"] == 32
    assert [note for note in notes if "kept 0.875 of each side" in note]
    assert (tmp_path / "out/tokenizer.model").is_file()


@pytest.mark.parametrize("name", ["vit_huge_coco", "vit_huge_ade20k", "aurora_xl"])
def test_the_backbone_of_other_tasks(tmp_path, name):
    config = load_file(f"{ROOT}/configs/{name}.py:tiny")
    trainer = on_one(config)
    zeros = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), trainer.shapes.params)
    export(Model(trainer, zeros, ()), "timm", tmp_path / "out")
    about = json.loads((tmp_path / "out/config.json").read_text())
    assert about["num_classes"] == 0
    assert "label_names" not in about
    tensors = read_weights(tmp_path / "out/model.safetensors").tensors
    assert not [key for key in tensors if key.startswith("head")]
    assert "image-feature-extraction" in (tmp_path / "out/README.md").read_text()


def test_several_files_with_an_index(tmp_path):
    model = model_of(config_of("vit_cls"))
    export(model, "transformers", tmp_path / "whole")
    export(model, "transformers", tmp_path / "parts", largest=50_000)
    names = sorted(path.name for path in (tmp_path / "parts").glob("model-*.safetensors"))
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    assert len(names) > 3
    assert not (tmp_path / "parts/model.safetensors").exists()
    whole = read_weights(tmp_path / "whole/model.safetensors").tensors
    parts = read_weights(tmp_path / "parts/model.safetensors.index.json").tensors
    assert {k: v.tobytes() for k, v in whole.items()} == {k: v.tobytes() for k, v in parts.items()}
    for path, value in read_back(model, "transformers", tmp_path / "parts").items():
        assert flatten(model.params)[path].tobytes() == value.tobytes()
    export(model, "timm", tmp_path / "timm", largest=50_000)  # which reads no index
    assert (tmp_path / "timm/model.safetensors").is_file()
    tensors = {"a": np.zeros(3, np.float32), "b": np.zeros(5, np.float32), "c": np.zeros(1, np.float32)}
    assert list(parts_of(tensors, "m.safetensors", 16).values()) == [["a"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("name", "to", "changed", "says"),
    [
        ("vit_cls", "timm", {"window": 2, "global_blocks": 1}, r"model\.window = 2, there all blocks attend glob"),
        ("vit_cls", "timm", {"norm_eps": 1e-4}, r"config\.model\.norm_eps = 0\.0001, there 1e-06 or 1e-05; --to=trans"),
        ("dinov2", "timm", {}, r"config\.model\.pool = 'cls_gap', there cls or gap .*; --to=transformers works"),
        ("vit_gap", "transformers", {}, r"config\.model\.pool = 'gap', there cls.*; --to=timm works \(transformers op"),
        ("swin", "timm", {"size": "G", "depths": (0, 0, 0, 0), "heads": (0, 0, 0, 0), "width": 0},
         r"config\.model\.size = 'G', with norms of the main branch every 6 blocks, there none; no other library"),
        ("swin", "timm", {"image_size": 52}, r"roll_first = False, there True; --to=transformers works"),
        ("vit_cls", "open_clip", {}, "it has models of an image and a text tower; --to=timm or --to=transformers"),
        ("clip", "open_clip", {"norm_eps": 1e-6}, r"config\.model\.image\.norm_eps = 1e-06, there 1e-05; --to=timm or"),
        ("clip_no_pre", "transformers", {}, r"config\.task\.loss = 'sigmoid', there 'softmax'; --to=open_clip works"),
    ],
)  # fmt: skip
def test_a_network_that_a_library_does_not_have(tmp_path, name, to, changed, says):
    config = config_of(name)
    network = getattr(config.model, "image", config.model)
    for field, value in changed.items():
        setattr(network, field, value)
    trainer = on_one(config)
    shapes = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), trainer.shapes.params)
    with pytest.raises(UserError, match=says) as error:
        export(Model(trainer, shapes, NAMES), to, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    model = model_of(config_of("vit_cls"))

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("visionfm_jax.export.save_file", full)
        with pytest.raises(OutputError, match=r"--out=.*out: I/O error: No space left .*; free space there"):
            export(model, "timm", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=r"--to=torch: there are timm, transformers, open_clip, stablehlo"):
        export(model, "torch", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/a").touch()
    for name, what in (("full", "a folder that is not empty"), ("full/a", "a file")):
        with pytest.raises(ConfigError, match=f"{name}: is {what}; name a new one"):
            export(model, "timm", tmp_path / name)
    with pytest.raises(UserError, match=r"--out=.*: (Not a directory|File exists); name a place that can be written"):
        export(model, "timm", tmp_path / "full/a/b")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("visionfm_jax.export.save_file", full)
        with pytest.raises(OutputError, match="No space left on device; free space there"):
            export(model, "timm", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    export(model, "timm", tmp_path / "empty")
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "empty").iterdir()}
    assert modes == {(tmp_path / "full/a").stat().st_mode & 0o777}
    export(model, "timm", tmp_path / "a/b/c")
    assert sorted(path.name for path in (tmp_path / "a/b/c").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip


def test_the_model_card(tmp_path):
    model = model_of(config_of("vit_cls"))
    run = tmp_path / "run"
    run.mkdir()
    model.config.workdir, model.config.data.train[0].path = str(run), "/secret/place/digits"
    source = {"records": 4000, "classes": list("abcde"), "parts": {}}
    kept = {"order": [], "grain": "0", "tokenizer": "", "sources": [source]}
    (run / "data.json").write_text(json.dumps(kept))
    found = {"step": 6, "metrics": {"top1": 0.75, "note": "x"}, "protocol": "26dd70c9"}
    (run / "eval_digits.json").write_text(json.dumps(found))
    export(model, "timm", tmp_path / "out", license="cc-by-4.0")
    text = (tmp_path / "out/README.md").read_text()
    header, _, body = text.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(header)["recipe"]["objective"] == "ClassificationConfig"
    read = ModelCard.load(tmp_path / "out/README.md").data  # as a hub reads it
    assert (read.license, read.library_name, read.pipeline_tag) == ("cc-by-4.0", "timm", "image-classification")
    assert (read.tags, read.datasets) == (["image-classification", "timm", "visionfm_jax"], ["digits"])
    [result] = read.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == ("image-classification", "bundled", "digits")
    assert (result.metric_type, result.metric_name, result.metric_value) == ("accuracy", "top1", 0.75)
    assert result.metric_args == {"protocol": "26dd70c9", "step": 6, "eval": "digits"}
    for said in (
        'timm.create_model("local-dir:FOLDER", pretrained=True)', "(1, 5), logits", "after step 7 of 2,000",
        "digits (bundled): split train, 4,000 records, 5 classes", "| digits | 6 | 26dd70c9 | top1 | 0.75 |",
        "(value / 255 - (0.48, 0.45, 0.4)) / (0.26, 0.27, 0.28)",
    ):  # fmt: skip
        assert said in body, said
    assert "secret" not in text
    assert re.search(r"ViTConfig, [\d,]+ parameters, images of 32 x 32 pixels", body)


def test_preprocessing_that_no_library_has_is_noted(tmp_path):
    config = config_of("vit_cls")
    config.evals[0].preprocess = PreprocessConfig(crop=1.0, resize="pad")
    [note] = export(model_of(config), "timm", tmp_path / "out")
    assert "adds grey borders" in note
    assert note in (tmp_path / "out/README.md").read_text()
    [note] = export(model_of(config_of("vit_resized")), "timm", tmp_path / "resized")
    assert "resized from 8 x 8 to 4 x 4 patches (bicubic)" in note


def test_the_tokenizer_that_comes_with_two_towers(tmp_path):
    """Of the same ids; transformers itself is asked by `check_exports.py`."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    files = huggingface_files("clip", 77)
    vocabulary = json.loads(files["vocab.json"])
    clip = open_tokenizer("clip")
    assert (len(vocabulary), vocabulary["<|startoftext|>"], vocabulary["<|endoftext|>"]) == (
        49408,
        clip.begin,
        clip.end,
    )
    assert [vocabulary[word] for word in ("a</w>", "cat</w>")] == clip.encode("a cat")
    core = Tokenizer(models.BPE({"[CLS]": 0, "[SEP]": 1, "a": 2, "b": 3}, []))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.save(str(tmp_path / "tokenizer.json"))
    own = open_tokenizer(str(tmp_path / "tokenizer.json"))
    files = huggingface_files(str(tmp_path / "tokenizer.json"), 5)
    theirs = Tokenizer.from_str(files["tokenizer.json"].decode())
    assert theirs.encode("a b").ids == own("a b", 4).tolist() == [0, 2, 3, 1]
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 5
    assert huggingface_files("emoji", 8).keys() == {"tokenizer.model"}


def test_the_command(tmp_path, capsys, monkeypatch):
    model = model_of(config_of("clip"))
    monkeypatch.setattr("visionfm_jax.export.load", lambda run: model)
    main(["run", "--to=open_clip", f"--out={tmp_path}/out", "--license=mit"])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "note: Texts are read by CLIP's tokenizer, OpenCLIP's default"
    assert out[1].startswith("open_clip folder of ")
    assert "license: mit\n" in (tmp_path / "out/README.md").read_text()
    with pytest.raises(ConfigError, match="required: --to"):
        main(["run", f"--out={tmp_path}/new"])
