"""Write board.npz, the frozen references of `test_board_parity.py`: what OpenCLIP's own evaluation finds.

    peers/bin/python tests/parity/make_board.py

needs torch, open_clip_torch and this project. The model is exported, opened by OpenCLIP, and evaluated there with
OpenCLIP's preprocessing, tokenizer, `build_zero_shot_classifier` and `get_clip_metrics`, in fp32. The file
holds for each set of labels NAME/cosines (N, C), NAME/top1 and NAME/top5; for pairs NAME/METRIC.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

if __name__ == "__main__":  # before torch, which takes seconds to import, where it is installed
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()

import numpy as np
import open_clip
import torch
from board_sets import CIFAR10, TEMPLATES, TEXTURES, clip, write_sets
from open_clip_train.train import get_clip_metrics
from PIL import Image

from visionfm_jax.data.text_lists import read_lines
from visionfm_jax.export import export

HERE = Path(__file__).parent


def of_tars(folder: Path) -> list[tuple[Image.Image, str]]:
    """Images and texts, in the order of the tars."""
    out = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            members = {m.name: tar.extractfile(m).read() for m in tar}
        for name in (n for n in members if n.endswith(".png")):
            text = next(members[n] for n in members if n.startswith(name[:-3]) and n != name)
            out.append((Image.open(io.BytesIO(members[name])), text.decode()))
    return out


def main() -> None:
    """Write the file."""
    found: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
        folder = Path(temporary)
        write_sets(folder)
        export(clip(), "open_clip", folder / "exported")
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder / 'exported'}")
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'exported'}")
        model.eval()

        def zero_shot(name: str, images: list, labels: list[int], names: tuple, prompts: tuple) -> None:
            templates = [lambda c, p=p: p.replace("{c}", c).replace("{}", c) for p in prompts]
            classifier = open_clip.build_zero_shot_classifier(model, tokenizer, names, templates)
            features = model.encode_image(torch.stack([transform(i) for i in images]), normalize=True)
            cosines = features @ classifier
            found[f"{name}/cosines"] = cosines.numpy()
            # As `open_clip_train.zero_shot.accuracy`, which fails under numpy 2.4.
            right = cosines.topk(5, 1).indices == torch.tensor(labels)[:, None]
            for k in (1, 5):
                found[f"{name}/top{k}"] = right[:, :k].any(1).double().mean().numpy()

        samples = of_tars(folder / "wds_vtab-cifar10/test")
        zero_shot("cifar10", [i for i, _ in samples], [int(c) for _, c in samples], CIFAR10, TEMPLATES)
        files = [(c, f) for c, n in enumerate(TEXTURES) for f in sorted((folder / "dtd/test" / n).iterdir())]
        zero_shot("dtd", [Image.open(f) for _, f in files], [c for c, _ in files], TEXTURES, read_lines("dtd_prompts"))
        samples = of_tars(folder / "wds_flickr8k/test")
        images = model.encode_image(torch.stack([transform(i) for i, _ in samples]), normalize=True)
        texts = model.encode_text(tokenizer([t for _, t in samples]), normalize=True)
        for name, value in get_clip_metrics(images, texts, 1.0).items():
            found[f"flickr8k/{name}"] = np.asarray(value)
    np.savez_compressed(HERE / "board.npz", **found)
    print({name: value.tolist() for name, value in found.items() if value.ndim == 0})


if __name__ == "__main__":
    main()
