"""The model and the sets on which our board and OpenCLIP's own evaluation are compared: the same wherever made."""

from __future__ import annotations

import io
import runpy
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

CHECK = runpy.run_path(str(Path(__file__).with_name("check_exports.py")))
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
TEMPLATES = ("a photo of a {c}.", "a blurry photo of the {c}.", "my {c}")
TEXTURES = ("banded", "blotchy", "cracked", "dotted", "polka-dotted", "zigzagged")
PAIRS = 40


def clip() -> Any:
    """A loaded `Model` of ours, with CLIP's tokenizer and every number random."""
    import jax

    from visionfm_jax.api import Model
    from visionfm_jax.parallel.mesh import make_mesh
    from visionfm_jax.train.step import Trainer

    task, network, more = next(case[1:] for case in CHECK["cases"]() if case[0] == "clip")
    trainer = Trainer(CHECK["made"](task, network, more), make_mesh(1, jax.devices()[:1]))
    return Model(trainer, CHECK["random_like"](trainer.shapes.params), ())


def picture(number: int) -> bytes:
    """A PNG, smooth, of odd sizes; some grey. None with alpha: ours puts it on white, OpenCLIP drops the alpha."""
    random = np.random.default_rng(number)
    mode, channels = ("L", 1) if number % 4 == 2 else ("RGB", 3)
    small = random.integers(0, 256, (5, 6, channels), np.uint8).squeeze()
    size = tuple(random.integers(33, 97, 2).tolist())
    file = io.BytesIO()
    Image.fromarray(small, mode).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def write_sets(folder: Path) -> None:
    """cifar10 and pairs in tars, textures in class folders with a part to learn from."""
    labels = [number * 7 % 10 for number in range(60)]
    _tars(folder / "wds_vtab-cifar10/test", [(picture(i), ("cls", str(label))) for i, label in enumerate(labels)])
    (folder / "wds_vtab-cifar10/classnames.txt").write_text("\n".join(CIFAR10))
    (folder / "wds_vtab-cifar10/zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES))
    for split, count in (("test", 7), ("train", 5)):
        for label, name in enumerate(TEXTURES):
            (folder / "dtd" / split / name).mkdir(parents=True)
            for i in range(count):
                file = folder / "dtd" / split / name / f"{i}.png"
                file.write_bytes(picture(1000 + 100 * label + i + 50 * (split == "train")))
    pairs = [(picture(2000 + i), ("txt", f"picture {i} of a {CIFAR10[i % 10]}")) for i in range(PAIRS)]
    _tars(folder / "wds_flickr8k/test", pairs)


def _tars(folder: Path, samples: list[tuple[bytes, tuple[str, str]]]) -> None:
    folder.mkdir(parents=True)
    for shard in range(2):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for i, (image, (suffix, text)) in list(enumerate(samples))[shard::2]:
                for name, content in ((f"s{i:07}.png", image), (f"s{i:07}.{suffix}", text.encode())):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
