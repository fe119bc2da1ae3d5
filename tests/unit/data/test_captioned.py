"""COCO's captions and Visual Genome's region descriptions: what records hold, and the line that bad input gets."""

import json
import pickle
from pathlib import Path

import pytest
from absl import logging
from caption_sets import write_coco, write_json, write_visual_genome
from tar_sets import picture

from visionfm_jax.config.limits import types_of
from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.kinds import KINDS, CocoCaptionsConfig
from visionfm_jax.errors import DataError

CAPTIONS = [["A cat\n on  a mat. ", "Eine Tür \N{HEAVY BLACK HEART}", " "], ["one"], [], ["a", "b", "c", "a"]]
COCO = "annotations/captions_train2017.json"
REGIONS = "region_descriptions.json"


@pytest.fixture
def coco(tmp_path) -> Path:
    return write_coco(tmp_path / "coco", CAPTIONS)


@pytest.fixture
def genome(tmp_path) -> Path:
    return write_visual_genome(tmp_path / "genome", CAPTIONS)


def opened(kind: str, path: Path, split: str = "", **more):
    cls = KINDS[kind]
    parts = {"split": split} if "split" in types_of(cls) else {}
    return open_source(cls(path=str(path), **parts, **more))


def error_of(kind: str, path: Path, split: str = "", **more) -> str:
    with pytest.raises(DataError) as error:
        opened(kind, path, split, **more)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_coco_captions_in_the_order_of_their_ids(coco, caplog):
    logging.use_python_logging(quiet=True)
    source = opened("coco_captions", coco, "train2017")
    assert [source[i] for i in range(len(source))] == [
        {"image": picture(0), "caption": ("A cat on a mat.", "Eine Tür \N{HEAVY BLACK HEART}")},
        {"image": picture(1), "caption": ("one",)},
        {"image": picture(3), "caption": ("a", "b", "c", "a")},
    ]
    assert (source.has_captions, source.most_captions, source.num_classes, source.class_names) == (True, 4, 0, None)
    assert source.key(2) == "train2017/000000000003.jpg"
    assert [r.message for r in caplog.records if "left out" in r.message] == [
        f"coco_captions {coco} [train2017]: left out: 1 images without a caption: train2017/000000000002.jpg",
        f"coco_captions {coco} [train2017]: left out: 1 empty captions: train2017/000000000000.jpg",
    ]


def test_visual_genome_phrases_each_once(genome):
    source = opened("visual_genome", genome)
    assert [source.key(i) for i in range(3)] == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K_2/4.jpg"]
    assert source[1] == {"image": picture(1), "caption": ("one",)}
    assert source[2] == {"image": picture(3), "caption": ("a", "b", "c")}
    assert (source.has_captions, source.most_captions) == (True, 3)


@pytest.mark.parametrize("kind", ["coco_captions", "visual_genome"])
def test_without_captions_all_images_serve(coco, genome, kind):
    path, split = {"coco_captions": (coco, "train2017"), "visual_genome": (genome, "train")}[kind]
    source = opened(kind, path, split, caption_key="")
    assert [source[i] for i in range(len(source))] == [{"image": picture(i)} for i in range(4)]
    assert (source.has_captions, source.most_captions) == (False, 0)


def test_another_key_of_the_captions(coco, genome):
    for file in (coco / COCO, genome / REGIONS):
        file.write_text(file.read_text().replace('"caption":', '"raw":').replace('"phrase":', '"raw":'))
    assert opened("coco_captions", coco, "train2017", caption_key="raw")[1]["caption"] == ("one",)
    assert opened("visual_genome", genome, caption_key="raw")[1]["caption"] == ("one",)
    assert "lacks 'caption'; it needs images with id" in error_of("coco_captions", coco, "train2017")
    assert "lacks 'phrase'; it needs entries with id and regions, and regions with phrase" in error_of(
        "visual_genome", genome
    )


def test_entries_of_the_first_release_and_images_that_are_not_listed(coco, genome):
    write_json(genome / REGIONS, [{"image_id": 2, "regions": [{"phrase": "old"}]}])
    assert opened("visual_genome", genome)[0] == {"image": picture(1), "caption": ("old",)}
    content = json.loads((coco / COCO).read_text())
    write_json(coco / COCO, content | {"images": content["images"][1:2]})
    assert [r["caption"] for r in opened("coco_captions", coco, "train2017")] == [("one",)]


def test_it_travels_without_reading_the_json_again(coco):
    source = opened("coco_captions", coco, "train2017")
    expected = source[0]
    (coco / COCO).unlink()
    assert pickle.loads(pickle.dumps(source))[0] == expected


def test_index_outside_is_an_index_error(coco):
    source = opened("coco_captions", coco, "train2017")
    for index in (-1, 3):
        with pytest.raises(IndexError, match=f"record {index} of 3"):
            source[index]


def test_paths_that_hold_something_else(coco, genome, tmp_path):
    assert f"coco_captions {coco} [train]: no split 'train'; the splits are train2017" in error_of(
        "coco_captions", coco, "train"
    )
    found = "found COCO's captions; use CocoCaptionsConfig (by a flag: kind=coco_captions) with split one of train2017"
    assert f"expected PATH/region_descriptions.json, {found}" in error_of("visual_genome", coco)
    assert found in error_of("tfds", coco)
    message = error_of("coco_captions", genome)
    assert "expected PATH/annotations/captions_SPLIT.json, found Visual Genome; use VisualGenomeConfig (by" in message
    (tmp_path / "a.json").write_text("{}")
    assert "found a .json file" in error_of("coco_captions", tmp_path / "a.json")
    assert "does not exist" in error_of("visual_genome", tmp_path / "none")


@pytest.mark.parametrize("name", ["/etc/hostname", "../other/a.jpg", "a/../../b.jpg", "a\0.jpg", "\ud800.jpg"])
def test_a_list_names_no_file_outside_of_its_folder(coco, name):
    path = coco / "annotations/captions_train2017.json"
    content = json.loads(path.read_text())
    content["images"][0]["file_name"] = name
    path.write_text(json.dumps(content))
    message = error_of("coco_captions", coco, "train2017")
    assert message.endswith("is no file of this folder; fix the list of images")
    assert message.isprintable()


def test_captions_of_control_characters_alone_are_none(tmp_path, caplog):
    logging.get_absl_logger().propagate = True
    path = write_coco(tmp_path, [["a cat", "\0\0"], ["\0"], [" \u200b"]], "train")
    source = open_source(CocoCaptionsConfig(path=str(path)))
    assert [source[i].get("caption") for i in range(len(source))] == [("a cat",)]
    assert "left out: 2 images without a caption: train/000000000001.jpg, train/000000000002.jpg" in caplog.text
    assert "left out: 1 empty captions: train/000000000000.jpg" in caplog.text


def test_missing_images_are_told(coco, genome):
    (coco / "train2017/000000000003.jpg").unlink()
    message = error_of("coco_captions", coco, "train2017")
    assert f"1 of 3 images are missing, the first is {coco}/train2017/000000000003.jpg; unpack" in message
    (coco / "train2017/000000000003.jpg").symlink_to("nowhere")
    assert "1 of 3 images are missing" in error_of("coco_captions", coco, "train2017")
    for folder in (genome / "VG_100K", genome / "VG_100K_2"):
        folder.rename(folder.with_suffix(".zip"))
    assert f"3 of 3 images are missing, the first is {genome}/VG_100K/1.jpg" in error_of("visual_genome", genome)


@pytest.mark.parametrize(
    ("coco_has", "genome_has", "part"),
    [
        ("{", "[", "is not valid JSON (Expecting"),
        ("[3]", '{"regions": []}', "has another layout ("),
        ('{"images": [{"id": 1}], "annotations": []}', '[{"id": 1}]', "; it needs "),
        ('{"images": [{"id": "x", "file_name": "a"}]}', '[{"id": "x", "regions": []}]', "has another layout (invalid"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [{"id": 1, "image_id": 1, "caption": 3}]}',
            '[{"id": 1, "regions": [{"phrase": 5}]}]',
            "lacks '",
        ),
    ],
)
def test_other_json(coco, genome, coco_has, genome_has, part):
    (coco / COCO).write_text(coco_has)
    (genome / REGIONS).write_text(genome_has)
    for message, file in (
        (error_of("coco_captions", coco, "train2017"), coco / COCO),
        (error_of("visual_genome", genome), genome / REGIONS),
    ):
        assert f"{file} " in message
        assert part in message


def test_nothing_with_a_caption(coco, genome):
    write_json(genome / REGIONS, [{"id": 1, "regions": []}])
    assert "holds no record" in error_of("visual_genome", genome)
