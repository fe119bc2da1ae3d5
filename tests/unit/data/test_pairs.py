"""Pairs of pictures and captions from each kind of source that has them."""

import io
import shutil
from collections import Counter
from pathlib import Path
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tar_sets import caption, members, picture, tar_bytes, write_parquet, write_tars

from visionfm_jax.config.schema import DataConfig
from visionfm_jax.data import select
from visionfm_jax.data.fields import Texts
from visionfm_jax.data.loader import train_loader
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import KINDS, TfdsConfig
from visionfm_jax.data.tokenizer import open_tokenizer
from visionfm_jax.errors import DataError

CAPTIONS = ("a red flag", "Tür \N{HEAVY BLACK HEART}", b"caf\xe9", "")
TEXTS = ("caption", "text", "alt")  # features; others are classes, or several captions


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Described(tfds.core.GeneratorBasedBuilder):
    """Pictures with the features that its name lists."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS: ClassVar = [
        tfds.core.BuilderConfig(name=name)
        for name in (
            "image+caption", "image+caption+label", "image+text+alt", "image+text+kind", "image", "image+several",
        )
    ]  # fmt: skip

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {"image": tfds.features.Image(encoding_format="png")}
        for name in self.builder_config.name.split("+")[1:]:
            features[name] = tfds.features.Text() if name in TEXTS else tfds.features.ClassLabel(names=["cat", "dog"])
            if name == "several":
                features[name] = tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i, text in enumerate(CAPTIONS):
            record = {name: text if name in TEXTS else i % 2 for name in self.builder_config.name.split("+")}
            if "several" in record:
                record["several"] = CAPTIONS[:i]
            yield i, record | {"image": io.BytesIO(picture(i))}


@pytest.fixture(scope="session")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("described")
    for config in Described.builder_configs.values():
        Described(config=config, data_dir=folder).download_and_prepare()
    return folder / "described"


def opened(kind: str, path: Path, **more):
    return open_source(KINDS[kind](path=str(path), **more))


def error_of(kind: str, path: Path, **more) -> str:
    with pytest.raises(DataError) as error:
        opened(kind, path, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- TFDS ---


def texts(source) -> dict[bytes, bytes]:
    return {record["image"]: record["caption"] for record in (source[i] for i in range(len(source)))}


EXPECTED = {picture(i): t if isinstance(t, bytes) else t.encode() for i, t in enumerate(CAPTIONS)}


def test_tfds_pairs_need_no_label(written):
    source = opened("tfds", written / "image+caption")
    assert (source.num_classes, source.class_names, source.has_captions) == (0, None, True)
    assert texts(source) == EXPECTED  # as stored, what is not UTF-8 too: the loader counts it among the damaged
    assert set(source[0]) == {"image", "caption"}


def test_tfds_records_may_have_both(written):
    source = opened("tfds", written / "image+caption+label")
    assert (source.num_classes, source.class_names, source.has_captions) == (2, ("cat", "dog"), True)
    assert texts(source) == EXPECTED
    assert Counter(source[i]["label"] for i in range(4)) == {0: 2, 1: 2}


def test_tfds_caption_key_chooses_the_text(written):
    assert texts(opened("tfds", written / "image+text+alt", caption_key="alt")) == EXPECTED
    source = opened("tfds", written / "image+text+kind", caption_key="text")
    assert (source.num_classes, source.has_captions) == (0, True)
    source = opened("tfds", written / "image+text+kind", label_key="kind")
    assert (source.num_classes, source.has_captions, set(source[0])) == (2, False, {"image", "label"})


def test_tfds_lists_of_captions(written):
    source = opened("tfds", written / "image+several", caption_key="several")
    assert (source.has_captions, source.most_captions) == (True, 3)
    expected = [t if isinstance(t, bytes) else t.encode() for t in CAPTIONS]
    assert {r["image"]: r["caption"] for r in source} == {picture(i): tuple(expected[:i]) for i in range(4)}


@pytest.mark.parametrize("name", ["image+caption", "image+caption+label", "image"])
def test_tfds_without_its_captions(written, name):
    source = opened("tfds", written / name, caption_key="")
    assert (source.has_captions, source.most_captions) == (False, 0)
    assert set(source[0]) == {"image"} | ({"label"} if "label" in name else set())


@pytest.mark.parametrize(
    ("name", "keys", "message"),
    [
        (
            "image+text+kind",
            {},
            "no feature 'label' of type ClassLabel and no feature 'caption' of type Text; "
            "set label_key to one of kind or caption_key to one of text",
        ),
        ("image+text+alt", {}, "of type Text; set caption_key to one of alt, text"),
        ("image", {}, "no feature 'caption' of type Text; use another dataset, or caption_key='' for its images alone"),
        # A key that was set must be there, though another would do.
        ("image+caption+label", {"label_key": "kind"}, "no feature 'kind' of type ClassLabel; set label_key to one of"),
        ("image+caption+label", {"caption_key": "label"}, "'label' of type Text; set caption_key to one of caption"),
        ("image+caption", {"label_key": "caption"}, "no feature 'caption' of type ClassLabel; use another dataset"),
        ("image+caption", {"image_key": "caption"}, "'caption' of type Image; set image_key to one of image"),
    ],
)
def test_tfds_without_what_is_asked_for(written, name, keys, message):
    assert message in error_of("tfds", written / name, **keys)


def test_tfds_captions_that_are_no_text_count_as_damaged(written):
    source, tokenizer = opened("tfds", written / "image+caption"), open_tokenizer("clip")
    good = [source[i]["caption"] not in (b"caf\xe9", b"") for i in range(4)]
    data = DataConfig(train=(TfdsConfig(path="-"),), shuffle=False, threads=1)
    with train_loader(
        data, image_size=8, batch_size=4, seed=0, start_step=0, host=0, hosts=1, sources=[source],
        fields=Texts(tokenizer, 12),
    ) as loader:  # fmt: skip
        batch = next(loader)
    stepped = [next(n for n in range(4) if good[(i + n) % 4]) for i in range(4)]
    assert batch["damaged"].tolist() == stepped
    for i, n in enumerate(stepped):
        np.testing.assert_array_equal(batch["text"][i], tokenizer(source[(i + n) % 4]["caption"].decode(), 12))


# --- tars ---


def test_tars_are_a_kind_of_source(tmp_path):
    source = opened("tars", write_tars(tmp_path / "tars"))
    assert len(source) == 12
    assert source[5] == {"image": picture(101), "caption": caption(101)}


def test_tars_take_a_selection_and_another_member(tmp_path):
    files = {"1.jpg": picture(1), "1.txt": b"alt", "1.long.txt": b"a long text", "2.jpg": picture(2), "2.txt": b"two"}
    (tmp_path / "00000.tar").write_bytes(tar_bytes(files))
    assert opened("tars", tmp_path)[1]["caption"] == "two"
    assert opened("tars", tmp_path, caption_key="long.txt")[0]["caption"] == "a long text"
    assert opened("tars", tmp_path, caption_key=".Long.txt")[0]["caption"] == "a long text"
    write_parquet(tmp_path / "00000.parquet", key=["1", "2"], status=["success"] * 2, similarity=[0.1, 0.4])
    select.select(str(tmp_path), "similarity > 0.3", tmp_path / "good.pairs")
    source = opened("tars", tmp_path, selection=str(tmp_path / "good.pairs"))
    assert [source[i] for i in range(len(source))] == [{"image": picture(2), "caption": "two"}]


def test_tars_without_their_captions(tmp_path):
    files = {"1.jpg": picture(1), "1.txt": b"alt", "2.jpg": picture(2), "3": b"no suffix", "4.txt": b"no picture"}
    (tmp_path / "00000.tar").write_bytes(tar_bytes(files))
    source = opened("tars", tmp_path, caption_key="")
    assert (source.has_captions, source.most_captions) == (False, 0)
    assert list(source) == [{"image": picture(1)}, {"image": picture(2)}]
    assert source.report()["skipped"] == {
        "files whose name begins with a dot or has no extension": {"count": 1, "first": ["00000/3"]},
        ".txt files, which are not read as images": {"count": 1, "first": ["00000/4"]},
    }
    assert len(opened("tars", tmp_path)) == 1  # an index of its own
    message = error_of("tars", tmp_path, caption_key="", selection="good.pairs")
    assert "a selection chooses among pairs, but caption_key is empty; set selection=''" in message
    (tmp_path / "00000.tar").write_bytes(tar_bytes({"4.txt": b"no picture"}))
    message = error_of("tars", tmp_path, caption_key="")
    assert message.endswith(
        "contains no image; left out: 1 .txt files, which are not read as images: 00000/4; set path"
    )


def test_tars_that_do_not_fit(tmp_path):
    folder = write_tars(tmp_path / "tars", tars=1)
    message = error_of("tars", folder, caption_key="long")
    assert "contains no image with a caption .long; left out: 4 images without a caption: 00000/0000" in message
    assert message.endswith("; set caption_key or path")
    assert "selection none.pairs: no such file; make it with" in error_of("tars", folder, selection="none.pairs")
    (folder / "00000.tar").write_bytes(tar_bytes(members(0, 2))[:100])
    assert "1 of 1 tars are truncated" in error_of("tars", folder)
    shutil.rmtree(folder)
    assert "the path does not exist" in error_of("tars", folder)


def test_tars_in_a_store(tmp_path):
    memory = fsspec.filesystem("memory")
    for path in write_tars(tmp_path / "tars").glob("*.tar"):
        memory.pipe(f"/kind/{path.name}", path.read_bytes())
    try:
        assert opened("tars", "memory://kind")[5]["caption"] == caption(101)
    finally:
        memory.rm("/kind", recursive=True)


# --- bundled ---


@pytest.mark.parametrize("name", ["twemoji", "noto"])
def test_the_caption_of_an_emoji_is_its_name_and_group(name):
    source = opened("bundled", name, split="combinations")
    captions = [source[i]["caption"] for i in range(len(source))]
    about = [source.record(i) for i in range(len(source))]
    assert captions == [f"{record['name']}, {record['group']}" for record in about]
    assert len(set(captions)) == len(captions)
    assert any(text.endswith(": dark skin tone, People & Body") for text in captions)


def test_emoji_without_their_captions():
    source = opened("bundled", "twemoji", caption_key="")
    assert (source.has_captions, source.most_captions, set(source[0])) == (False, 0, {"image", "label"})


def test_digits_have_no_captions():
    source = opened("bundled", "digits")
    assert not source.has_captions
    assert set(source[0]) == {"image", "label"}
