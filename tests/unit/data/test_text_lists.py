"""Lists of prompts and names: those of the package, the user's own, and what a person reads when one is wrong."""

from pathlib import Path

import pytest

from visionfm_jax.data.text_lists import list_names, read_lines
from visionfm_jax.errors import DataError


def test_shipped_lists():
    of_imagenet = [name for name in list_names() if name.startswith("imagenet")]
    assert of_imagenet == ["imagenet_classes", "imagenet_prompts", "imagenet_prompts_short", "imagenet_synsets"]
    prompts, short, classes = (read_lines(f"imagenet_{n}") for n in ("prompts", "prompts_short", "classes"))
    assert (len(prompts), len(short), len(classes)) == (80, 7, 1000)
    assert all(p.count("{}") == p.count("{") == p.count("}") == 1 for p in prompts + short)
    assert len(set(prompts)) == 80
    assert set(short) <= set(prompts)
    assert (prompts[0], short[0]) == ("a bad photo of a {}.", "itap of a {}.")
    assert (classes[0], classes[1], classes[207], classes[999]) == (
        "tench", "goldfish", "Golden Retriever", "toilet paper",
    )  # fmt: skip


def test_own_file(tmp_path: Path):
    path = tmp_path / "names.txt"
    path.write_bytes("\ufeffcafé \r\nrôti\u2028à point".encode())
    assert read_lines(str(path)) == ("café", "rôti\u2028à point")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no text in it; every line is one entry"),
        (b"\n \n", "no text in it"),
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"cat\n\n", "line 2 is blank"),
        (b"caf\xe9\n", "cannot be read as UTF-8 text"),
    ],
)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes, message: str):
    path = tmp_path / "names.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_lines(str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["imagenet_names", "no/such/file.txt", ""])
def test_no_such_list(name: str):
    with pytest.raises(DataError, match=r"imagenet_classes|cannot be read"):
        read_lines(name)


def test_a_folder_is_no_list(tmp_path: Path):
    with pytest.raises(DataError, match="cannot be read"):
        read_lines(str(tmp_path))
