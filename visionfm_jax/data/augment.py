"""Colours varied on the device, each sample by its own key: equal for any number of devices or micro-batches.

What moves pixels is done on the host (`data.transforms`), where boxes and masks move with them. Shapes: B batch, H W
image, V views.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from visionfm_jax.config import AugmentConfig, PhotometricConfig, Transform

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_TO_YIQ = np.array([_GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def normalize(images: jax.Array, config: AugmentConfig) -> jax.Array:
    """uint8 (B, H, W, 3) to zero-mean, unit-variance fp32 by the configured statistics."""
    return (images.astype(jnp.float32) / 255 - jnp.array(config.mean)) / jnp.array(config.std)


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Vary the colours of uint8 images (B, H, W, 3) with keys (B,), and normalise; fp32 (B, H, W, 3)."""
    x = jax.vmap(lambda image, key: photometric(image.astype(jnp.float32) / 255, key, config))(images, keys)
    return (x - jnp.array(config.mean)) / jnp.array(config.std)


def augment_views(
    batch: Mapping[str, jax.Array], keys: jax.Array, crop: Transform, config: AugmentConfig
) -> dict[str, jax.Array]:
    """As `augment`, of several views of each image, each varied as its `Views` say, by a key of its own.

    Args:
      batch: uint8 (B, V, H, W, 3) by the names of the views.
      keys: (B,), one for each sample.
      crop: which made the views.
      config: of which the mean and the standard deviation are taken.

    Returns:
      fp32 (B, V, H, W, 3) by name.
    """
    out: dict[str, list[jax.Array]] = {name: [] for name in crop.shapes}
    for number, views in enumerate(group for group in crop.views for _ in range(group.count)):
        image = batch[views.name][:, len(out[views.name])]
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        colours = AugmentConfig(**dataclasses.asdict(views.photometric), mean=config.mean, std=config.std)
        out[views.name].append(augment(image, own, colours))
    return {name: jnp.stack(views, 1) for name, views in out.items()}


def photometric(image: jax.Array, key: jax.Array, config: PhotometricConfig) -> jax.Array:
    """Jitter, grey, blur, solarise, in that order, as DINOv2 does (Oquab et al. 2023); (H, W, 3) in [0, 1]."""
    grey_key, jitter_key, blur_key, solarize_key = jax.random.split(key, 4)
    x = image
    if any(config.jitter) and config.jitter_chance:
        use_key, factors_key = jax.random.split(jitter_key)
        x = _perhaps(use_key, config.jitter_chance, color_jitter(x, factors_key, config.jitter), x)
    if config.grey_chance:
        x = _perhaps(grey_key, config.grey_chance, jnp.broadcast_to((x @ jnp.array(_GREY))[..., None], x.shape), x)
    if config.blur_chance:
        use_key, sigma_key = jax.random.split(blur_key)
        low, high = config.blur_sigma
        sigma = jax.random.uniform(sigma_key, minval=low, maxval=high)
        x = _perhaps(use_key, config.blur_chance, gaussian_blur(x, sigma, 2 * high), x)
    if config.solarize_chance:
        x = _perhaps(solarize_key, config.solarize_chance, jnp.where(x >= 128 / 255, 1 - x, x), x)
    return x


def _perhaps(key: jax.Array, chance: float, changed: jax.Array, same: jax.Array) -> jax.Array:
    return changed if chance == 1 else jnp.where(jax.random.bernoulli(key, chance), changed, same)


def gaussian_blur(image: jax.Array, sigma: jax.Array, reach: float) -> jax.Array:
    """(H, W, C) blurred by a Gaussian of standard deviation `sigma`, cut off at `reach` pixels; edges mirror."""
    radius = math.ceil(reach)
    weights = jnp.exp(-((jnp.arange(-radius, radius + 1) / sigma) ** 2) / 2)
    weights /= weights.sum()
    for axis in (0, 1):
        length = image.shape[axis]
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(image.ndim)]
        padded = jnp.pad(image, padding, "reflect")
        image = sum(weight * jax.lax.slice_in_dim(padded, k, k + length, axis=axis) for k, weight in enumerate(weights))
    return image


def color_jitter(image: jax.Array, key: jax.Array, strength: tuple[float, float, float, float]) -> jax.Array:
    """Brightness, contrast, saturation and hue by random factors, in that order.

    The factors are those of torchvision's ColorJitter: 1 ± strength, and a hue turn of ± strength of the circle.
    The order is fixed where torchvision draws it: one compiled program instead of 24. Hue turns the chroma plane
    of YIQ, which is linear, where torchvision goes through HSV, in its direction: from red over green to blue.

    Args:
      image: (H, W, 3) in [0, 1].
      key: of this sample.
      strength: of brightness, contrast, saturation (>= 0) and hue (<= 0.5).
    """
    low = jnp.maximum(0.0, 1 - jnp.array(strength[:3]))
    high = 1 + jnp.array(strength[:3])
    factor_key, hue_key = jax.random.split(key)
    brightness, contrast, saturation = jax.random.uniform(factor_key, (3,), minval=low, maxval=high)
    grey = jnp.array(_GREY)
    x = jnp.clip(image * brightness, 0, 1)
    x = jnp.clip(contrast * x + (1 - contrast) * (x @ grey).mean(), 0, 1)
    x = jnp.clip(saturation * x + (1 - saturation) * (x @ grey)[..., None], 0, 1)
    if not strength[3]:
        return x
    angle = 2 * jnp.pi * jax.random.uniform(hue_key, minval=-strength[3], maxval=strength[3])
    return jnp.clip(x @ _hue_rotation(angle), 0, 1)


def _hue_rotation(angle: jax.Array) -> jax.Array:
    """The (3, 3) matrix that turns RGB rows by `angle` about the grey axis, from red to green; luma unchanged."""
    c, s = jnp.cos(angle), jnp.sin(angle)
    turn = jnp.array([[1.0, 0, 0], [0, c, s], [0, -s, c]])
    return (_FROM_YIQ @ turn @ _TO_YIQ).T


def swap_pairs(x: jax.Array) -> jax.Array:
    """(B, …) with rows 2 k and 2 k + 1 in each other's place.

    Neighbours are strangers, as samples come shuffled and interleaved from their sources, and they are on one device
    and in one micro-batch, as tasks that mix images ask for batches of pairs (`TaskConfig.rows`).
    """
    return rearrange(rearrange(x, "(p two) ... -> p two ...", two=2)[:, ::-1], "p two ... -> (p two) ...")
