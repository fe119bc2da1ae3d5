"""Augmentation on the device, each sample by its own key: equal for any number of devices or micro-batches.

Shapes: B batch, H W image.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from visionfm_jax.config import AugmentConfig

_GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601 luma
_TO_YIQ = np.array([_GREY, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def normalize(images: jax.Array, config: AugmentConfig) -> jax.Array:
    """uint8 (B, H, W, 3) to zero-mean, unit-variance fp32 by the configured statistics."""
    return (images.astype(jnp.float32) / 255 - jnp.array(config.mean)) / jnp.array(config.std)


def augment(images: jax.Array, keys: jax.Array, config: AugmentConfig) -> jax.Array:
    """Flip, jitter and normalise uint8 images (B, H, W, 3) with keys (B,); fp32 (B, H, W, 3)."""

    def one(image: jax.Array, key: jax.Array) -> jax.Array:
        flip_key, jitter_key = jax.random.split(key)
        x = image.astype(jnp.float32) / 255
        if config.flip:
            x = jnp.where(jax.random.bernoulli(flip_key), x[:, ::-1], x)
        if any(config.jitter):
            x = color_jitter(x, jitter_key, config.jitter)
        return x

    x = jax.vmap(one)(images, keys)
    return (x - jnp.array(config.mean)) / jnp.array(config.std)


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
