"""A CLIP that embeds in a moment."""

import runpy
from pathlib import Path

from visionfm_jax.export import export


def small_clip(folder: Path) -> Path:
    """A folder as OpenCLIP has it, of a small model with random weights."""
    made = runpy.run_path(str(Path(__file__).parent / "unit/test_export.py"))
    export(made["model_of"](made["config_of"]("clip")), "open_clip", folder)
    return folder
