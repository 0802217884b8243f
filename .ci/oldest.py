# SPDX-License-Identifier: Apache-2.0
"""Prints pyproject.toml's lower bounds as pip's constraints: ``python .ci/oldest.py EXTRAS`` (``make test-oldest``)."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def oldest(project: dict[str, Any], extras: list[str]) -> list[str]:
    """One exact version for each dependency of the project and of the extras, with its marker.

    Raises:
        ValueError: A dependency has no lower bound, or two extras state different ones.

    >>> oldest({"dependencies": ["a[b]>=4.39,<5", "c>=2; python_version < '3.11'"]}, [])
    ['a==4.39', 'c==2; python_version < "3.11"']
    """
    optional = project.get("optional-dependencies", {})
    pins: dict[str, str] = {}
    for line in itertools.chain(project["dependencies"], *(optional[extra] for extra in extras)):
        requirement = Requirement(line)
        marker = f"; {requirement.marker}" if requirement.marker else ""
        bounds = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        pin = "".join(f"{requirement.name}=={bound}{marker}" for bound in bounds)
        if not pin or pins.setdefault(requirement.name, pin) != pin:
            raise ValueError(
                f"pyproject.toml: {line!r} needs a lower bound, NAME>=VERSION, and in every extra the same one"
            )
    return list(pins.values())


if __name__ == "__main__":
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    print(*oldest(tomllib.loads(pyproject.read_text())["project"], sys.argv[1].split(",")), sep="\n")
