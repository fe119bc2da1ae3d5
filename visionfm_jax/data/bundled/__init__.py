"""Real pictures that come with the package, one archive per set; made by `tools/curate.py`, see CREDITS.md."""
