"""configs/vit_huge.py:tiny without the bounds that keep numbers from overflowing at once, for tests of overflows."""

from pathlib import Path

from visionfm_jax.config import limits, load, schema

schema.AugmentConfig.limits["std"] = limits.Range(0, 1, above=True)
schema.OptimConfig.limits["lr"] = limits.Range(0, 1e38)


def get_config(variant: str = "") -> schema.Config:
    return load.load_file(f"{Path(__file__).parents[2]}/configs/vit_huge.py:tiny")
