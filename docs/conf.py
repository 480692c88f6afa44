"""Tell Sphinx how to build these pages; `make docs` runs it."""

from __future__ import annotations

import sys
from importlib.resources import files
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import fastdiv

sys.path.insert(0, str(Path(__file__).parent))
import losses  # docs/losses.py

project = "fastdiv"
copyright = "the fastdiv authors"
version = release = fastdiv.__version__

exclude_patterns = ["_build"]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_default_options = {"members": True, "member-order": "bysource"}
autodoc_typehints = "none"  # what the text says of an argument is more than Tensor
autodoc_preserve_defaults = True
autodoc_inherit_docstrings = False  # torch's, of what every module does
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"

# Links that lead nowhere are errors, but for names of other libraries.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|scipy|numpy)\..*")]

html_theme = "furo"
html_title = "fastdiv"
pygments_dark_style = "monokai"
MATHJAX = files("mathjax") / "static/mathjax/es5/tex-svg.js"  # one file, no other host
html_static_path = ["_static", str(MATHJAX)]
mathjax_path = MATHJAX.name
html_css_files = ["fastdiv.css"]
html_copy_source = False


class Losses(SphinxDirective):
    """``.. losses::`` is the table of all losses; with a kind, it documents those of the kind."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse what docs/losses.py makes."""
        self.env.note_dependency(losses.__file__)
        text = losses.entries(*self.arguments) if self.arguments else losses.table()
        return self.parse_text_to_nodes(text)


def setup(app: Sphinx) -> None:
    """Register the directive."""
    app.add_directive("losses", Losses)
