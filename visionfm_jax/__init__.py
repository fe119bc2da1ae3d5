"""visionfm_jax: pretraining of large vision foundation models with JAX on meshes of GPUs."""

from typing import Any

__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """`visionfm_jax.load` and what else `api` has; loaded when it is asked for, as programs need only parts."""
    if name in ("Model", "create", "list_models", "load"):
        from visionfm_jax import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
