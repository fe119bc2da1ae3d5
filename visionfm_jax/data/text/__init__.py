"""Text that comes with the package: CLIP's vocabulary, prompts and names of classes, one a line; see CREDITS.md."""
