"""Sphinx configuration; `make` in the folder above builds both languages."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "NetLoader"
author = "the NetLoader authors"
copyright = author

extensions = ["myst_parser", "sphinxcontrib.mermaid", "translatable_mermaid"]
exclude_patterns = ["locale"]

# A plain ```mermaid fence is a diagram here as it is on a code host.
myst_fence_as_directive = ["mermaid"]
myst_heading_anchors = 3

language = "en"
locale_dirs = ["locale"]
gettext_compact = False
gettext_location = False

html_theme = "furo"
html_title = "NetLoader"
html_copy_source = False

# As tall as the diagram needs; the default of 500 pixels makes a long one too small to read.
mermaid_height = "auto"
mermaid_fullscreen = False
