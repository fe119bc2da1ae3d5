"""Sets of benchmarks: labels and captions in tars, class folders and the names that stand in prompts."""

from __future__ import annotations

import io
import pickle
import tarfile

import pytest
from PIL import Image

from visionfm_jax.data.sources import open_source
from visionfm_jax.data.sources.benchmark import set_name
from visionfm_jax.data.sources.kinds import BenchmarkConfig
from visionfm_jax.data.sources.record import DamagedRecord
from visionfm_jax.data.text_lists import benchmarks, list_names, read_lines
from visionfm_jax.errors import DataError


def png(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def write_folders(path, names) -> BenchmarkConfig:
    for name in names:
        (path / "test" / name).mkdir(parents=True)
        (path / "test" / name / "a.png").write_bytes(png())
    return BenchmarkConfig(path=str(path))


def test_labels_in_tars(tmp_path):
    (tmp_path / "classnames.txt").write_text("cat\nblack dog\n")
    labels = [b"1", b"0\n", b"2", b"x"]
    for shard in (0, 1):
        rows = {f"s{i}.png": png(i) for i in range(shard, 4, 2)} | {f"s{i}.cls": labels[i] for i in range(shard, 4, 2)}
        write_tar(tmp_path / f"test/{shard}.tar", rows)
    source = open_source(BenchmarkConfig(path=str(tmp_path)))
    assert (len(source), source.num_classes, source.class_names) == (4, 2, ("cat", "black dog"))
    assert not source.has_captions
    assert source[0] == {"image": png(0), "label": 1}
    assert pickle.loads(pickle.dumps(source))[2] == {"image": png(1), "label": 0}
    for record, label in ((1, "2"), (3, "x")):
        with pytest.raises(DamagedRecord, match=f"its label '{label}' is no number below 2"):
            source[record]


def test_captions_in_tars(tmp_path):
    texts = {"a.txt": b"a cat\nanother  cat\n\n", "b.txt": b"a dog"}
    write_tar(tmp_path / "test/0.tar", {"a.png": png(1), "b.png": png(2), **texts})
    source = open_source(BenchmarkConfig(path=str(tmp_path)))
    assert (source.num_classes, source.most_captions) == (0, 2)
    assert source[0] == {"image": png(1), "caption": ("a cat", "another cat")}
    assert source[1]["caption"] == ("a dog",)


def test_tars_with_neither(tmp_path):
    write_tar(tmp_path / "test/0.tar", {"a.png": png(), "a.cls": b"0"})
    with pytest.raises(DataError, match=r"no image has a caption, a member KEY\.txt .* write the names of the classes"):
        open_source(BenchmarkConfig(path=str(tmp_path)))
    (tmp_path / "classnames.txt").write_text("cat")
    write_tar(tmp_path / "test/0.tar", {"a.png": png(), "a.txt": b"a cat"})
    with pytest.raises(DataError, match=r"no image has a label, a member KEY\.cls"):
        open_source(BenchmarkConfig(path=str(tmp_path)))


def test_names_of_class_folders(tmp_path):
    def names(folder, classes):
        return open_source(write_folders(tmp_path / folder, classes)).class_names

    assert names("wds_dtd", ["polka-dotted", "red_and_blue"]) == ("polka-dotted", "red and blue")
    assert names("imagenet-r", ["n01443537", "n02099601"]) == ("goldfish", "Golden Retriever")
    # Sorted as text, 10 comes before 2: a label is the place of its folder, and its name that of the number.
    digits = names("svhn", map(str, range(10)))
    assert digits == tuple(benchmarks()["svhn"]["classes"])
    flowers = tuple(benchmarks()["flowers"]["classes"])
    found = names("flowers", map(str, range(1, 103)))
    assert found[:3] == (flowers[0], flowers[9], flowers[99])
    assert sorted(found) == sorted(flowers)
    imagenet = read_lines("imagenet_classes")
    assert names("imagenetv2", ["0", "10", "2"]) == (imagenet[0], imagenet[10], imagenet[2])


@pytest.mark.parametrize("classes", [("1", "2"), ("0", "102")])
def test_numbers_of_which_nobody_knows_what_they_mean(tmp_path, classes):
    with pytest.raises(DataError, match="the class folders are numbers, and which class is which is not known"):
        open_source(write_folders(tmp_path / "flowers", classes))
    with pytest.raises(DataError, match=r"write their names into classnames\.txt"):
        open_source(write_folders(tmp_path / "mine", classes))


def test_a_file_of_names_counts_more(tmp_path):
    config = write_folders(tmp_path / "flowers", ["1", "2"])
    (tmp_path / "flowers/classnames.txt").write_text("rose\ntulip\n")
    source = open_source(config)
    assert source.class_names == ("rose", "tulip")
    assert [source.key(i) for i in range(2)] == ["1/a.png", "2/a.png"]


def test_names_of_sets(tmp_path):
    found = [set_name(tmp_path / n) for n in ("wds_vtab-cifar10", "imagenet-a", "wds_fgvc_aircraft", "Food101")]
    assert found == ["cifar10", "imagenet_a", "fgvc_aircraft", "food101"]


def test_shipped_texts():
    assert len(read_lines("imagenet_synsets")) == len(set(read_lines("imagenet_synsets"))) == 1000
    assert {"food101_prompts", "gtsrb_classes", "imagenet_prompts"} <= set(list_names())
    for name, lists in benchmarks().items():
        assert all(prompt.count("{}") == 1 for prompt in lists["prompts"]), name
        assert read_lines(f"{name}_prompts") == tuple(lists["prompts"])
