"""Real pictures that come with the package, one archive per set; made by `visionfm_jax.data.curate`, see CREDITS.md."""
