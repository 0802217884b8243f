# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration: MyST pages, the furo theme, and an API reference from the docstrings."""

import importlib
import inspect
import re

import reco_lightning

project = "reco_lightning"
author = "the reco_lightning authors"
release = version = reco_lightning.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_templates"]
templates_path = ["_templates"]
html_theme = "furo"
html_title = "reco_lightning"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autosummary_generate = True
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True  # fields of dataclasses are described once

# names are found both in the package and in the module that defines them
suppress_warnings = ["ref.python"]


def list_names(app, page, source):
    """In api.md, puts the classes and functions of ``__all__`` in the place of each module of a topic."""
    if page != "api":
        return

    def names(match):
        module = importlib.import_module(match[1])
        values = {name: getattr(module, name) for name in module.__all__}
        own = [name for name, value in values.items() if inspect.isroutine(value) or inspect.isclass(value)]
        return "\n".join(f"   {match[1]}.{name}" for name in own)

    source[0] = re.sub(r"^   (reco_lightning\.[\w.]+)$", names, source[0], flags=re.MULTILINE)


def setup(app):
    app.connect("source-read", list_names)
