# SPDX-License-Identifier: Apache-2.0
"""Stands in for the package lazy-loader where nothing can be installed: `make gpu` on a bare machine."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path


def attach_stub(package, file):
    """Names of a package, from the imports of the stub beside its ``__init__.py``, imported when they are asked for."""
    homes = {}
    for node in ast.parse(Path(file).with_suffix(".pyi").read_text()).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                homes[alias.asname or alias.name] = (
                    "." * node.level + (node.module or alias.name),
                    node.module and alias.name,
                )

    def get(name):
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, attribute = homes[name]
        found = importlib.import_module(module, package)
        return found if attribute is None else getattr(found, attribute)

    return get, lambda: sorted(homes), sorted(homes)
