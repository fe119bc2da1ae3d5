"""The site of the documents: `python -m sphinx -W -c docs . site`, from the root of the repository.

The pages are the same files that are read in the repository, so that links work in both.
"""

import visionfm_jax

project = "visionfm_jax"
release = visionfm_jax.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/cards/*.md", "benchmarks/*.md"]
exclude_patterns = ["docs/upstream", ".*"]
myst_heading_anchors = 4
napoleon_use_ivar = True  # attributes are described once
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
default_role = "code"  # `name` in docstrings
html_theme = "furo"
html_title = f"visionfm_jax {release}"
