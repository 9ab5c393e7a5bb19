"""Settings of Sphinx: ``python -m sphinx -W -b html docs build/docs``."""

import re

import multistep_triton

project = "multistep_triton"
author = "The multistep_triton authors"
version = release = multistep_triton.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_heading_anchors = 3
html_theme = "furo"

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_use_rtype = False


def link_as_downloads(app, name, source):
    """Markdown outside of this folder is a file, and no page of this documentation."""
    source[0] = re.sub(r"\]\((\.\./[^)#]+\.md)", r"](path:\1", source[0])


def setup(app):
    app.connect("source-read", link_as_downloads)
