"""The error of reconstructed parts of images. Shapes: B batch, H W image, h w its units."""

from __future__ import annotations

import jax
import numpy as np

from visionfm_jax.config import Config
from visionfm_jax.data.fields import NoFields
from visionfm_jax.evals.base import OpenedEval
from visionfm_jax.evals.eval import Predict
from visionfm_jax.evals.kinds import ReconstructionConfig
from visionfm_jax.evals.sampling import image_of, sample

PICTURED = 8
SAMPLE = 64  # images that are reconstructed for the pictures, and compared with flat colour
GREY = 128


class ReconstructionEval(OpenedEval):
    """The `evals.eval.Eval` of images with hidden units: `pixel_error`, the mean |difference| over hidden pixels.

    Its unit is that of the loss, a channel's standard deviation (`data.augment.std`). On up to 64 images spread over
    the source, `mean_colour_error` is that of filling the mean colour of what is seen of an image, and `colour_gain`
    how many times larger it is than the model's own: above 1, more than a colour has been learned. What is hidden
    depends on the record's number alone.

    Attributes:
      pictured: `reconstructed`: `image`, `seen` (the image with its hidden units grey) and `reconstruction`, uint8
        (8, H, W, 3), and `error` (8,).
    """

    def __init__(self, config: ReconstructionConfig, run: Config, host: int, hosts: int):
        super().__init__(config, run, host, hosts)
        self.settings |= {
            "mask_unit": run.task.mask_unit,
            "mask_ratio": run.task.mask_ratio,
            "std": list(run.data.augment.std),
        }

    def run(self, predict: Predict) -> dict[str, float]:
        """Each image once, and the sample once more."""
        total, records = np.float64(0), []
        for batch in self.batches(self.source, NoFields()):
            out = predict(batch, "masked_image")
            keep = out["mask"] > 0
            total += out["pixel_error"][keep].sum(dtype=np.float64)
            records.append(out["record"][keep])
        images, out = self._reconstructed(predict, np.concatenate(records))
        flat = mean_colour_error(images, out["hidden"], self.run_config.data.augment.std)
        with np.errstate(all="ignore"):  # nothing hidden is no error: nan
            scores = {
                "pixel_error": float(total / sum(map(len, records))),
                "mean_colour_error": float(flat.mean()),
                "colour_gain": float(flat.mean() / out["pixel_error"].mean(dtype=np.float64)),
                "images": float(sum(map(len, records))),
            }
        self.describe()
        if self.host == 0:
            rows = sample(np.arange(len(images)), PICTURED)
            hidden = whole_units(out["hidden"][rows], images.shape[1])[..., None]
            self.pictured = {
                "reconstructed": {
                    "image": images[rows],
                    "seen": np.where(hidden, np.uint8(GREY), images[rows]),
                    "reconstruction": out["reconstruction"][rows],
                    "error": out["pixel_error"][rows],
                }
            }
        return scores

    def _reconstructed(self, predict: Predict, records: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The sample's images (B, H, W, 3) and their predictions; the same on every host, each of which computes its
        rows of one batch: small, as whole images come back.
        """
        devices = jax.device_count()
        size = min(self.batch_size, -(-SAMPLE // devices) * devices)
        chosen = sample(records, size)
        images = np.stack([image_of(self.source, int(r), self.transform) for r in chosen])
        own = slice(self.host * size // self.hosts, (self.host + 1) * size // self.hosts)
        fill = size - len(chosen)
        batch = {
            "image": np.pad(images, [(0, fill), (0, 0), (0, 0), (0, 0)])[own],
            "record": np.pad(chosen.astype(np.int32), (0, fill))[own],
        }
        out = predict(batch, "reconstruct")
        return images, {k: out[k][: len(chosen)] for k in ("reconstruction", "hidden", "pixel_error")}


def whole_units(hidden: np.ndarray, height: int) -> np.ndarray:
    """bool (B, h, w) of units to bool (B, H, W) of pixels."""
    unit = height // hidden.shape[1]
    return hidden.astype(bool).repeat(unit, 1).repeat(unit, 2)


def mean_colour_error(images: np.ndarray, hidden: np.ndarray, std: tuple[float, float, float]) -> np.ndarray:
    """The error (B,) of filling what is hidden in the mean colour of what is seen; nan where either is nothing.

    Args:
      images: uint8 (B, H, W, 3).
      hidden: bool (B, h, w).
      std: of a channel of values in [0, 1]: the unit.
    """
    errors = []
    for image, where in zip(images, whole_units(hidden, images.shape[1]), strict=True):
        seen, rest = image[~where] / (255 * np.array(std)), image[where] / (255 * np.array(std))
        errors.append(np.abs(rest - seen.mean(0)).mean() if len(seen) and len(rest) else np.nan)
    return np.array(errors)
