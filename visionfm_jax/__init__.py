"""visionfm_jax: pretraining of large vision foundation models with JAX on meshes of GPUs."""

__version__ = "0.1.0"
