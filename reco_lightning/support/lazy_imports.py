# SPDX-License-Identifier: Apache-2.0
"""Public names that a package imports on first use (PEP 562): importing the package costs nothing else."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["lazy_exports"]


def lazy_exports(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Makes the ``__getattr__`` and ``__dir__`` of a package.

    Args:
        package: The package's ``__name__``.
        homes: For each public name the module that it lives in, named from the package on.

    Returns:
        ``__getattr__``, which raises an AttributeError for any other name, and ``__dir__``.

    Example:
        >>> find, names = lazy_exports("reco_lightning", {"Window": "windows"})
        >>> find("Window")(0, 4)
        Window(start=0, stop=4)
        >>> "Window" in names()
        True
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)  # found there from now on
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return find, names
