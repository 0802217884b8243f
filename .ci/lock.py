# SPDX-License-Identifier: Apache-2.0
"""Locks the newest releases that go together: ``python .ci/lock.py TORCH EXTRAS VERSION...`` (``make lock``).

Each Python's lock, ``.ci/constraints/VERSION.txt``, is what pip would install there, by a dry run in an empty
environment. Only the standard library is needed.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).parent / "constraints"
#: The user chooses the build of torch, which brings its own CUDA libraries; torchvision follows torch.
CHOSEN_BY_TORCH = re.compile(r"torch|torchvision|triton|nvidia-.+|cuda-.+")
HEADER = """\
# {date}, Python {version}, Linux on x86-64: what `make demo` and `make test` install besides {torch}.
# `make lock` makes it anew.
"""


def pins(report: dict[str, Any]) -> list[str]:
    """The lines of a lock out of pip's installation report: sorted, without our package and what torch decides on.

    >>> package = {"metadata": {"name": "Typing_Extensions", "version": "4.16.0+local"}}
    >>> pins({"install": [package, {"metadata": {"name": "nvidia-nvtx", "version": "13.0"}}]})
    ['typing-extensions==4.16.0']
    """
    found = {}
    for package in report["install"]:
        name = re.sub(r"[-_.]+", "-", package["metadata"]["name"]).lower()
        if name != "reco-lightning" and not CHOSEN_BY_TORCH.fullmatch(name):
            found[name] = package["metadata"]["version"].partition("+")[0]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def resolve(version: str, requirements: list[str]) -> dict[str, Any]:
    """Pip's report on installing the requirements with a Python, of which nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        # pyenv's python3.12 runs where a version is chosen; without pyenv the variable says nothing
        environment = {**os.environ, "PYENV_VERSION": version}
        subprocess.run([f"python{version}", "-m", "venv", folder], env=environment, check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "--upgrade", "pip"], check=True)  # older ones download torch for a dry run
        report = Path(folder, "report.json")
        subprocess.run([*pip, "--dry-run", "--ignore-installed", "--report", report, *requirements], check=True)
        return json.loads(report.read_text())


def main(torch: str, extras: str, *versions: str) -> None:
    """Writes the lock of each Python; all are resolved before the first is written."""
    reports = {version: resolve(version, [torch, f".[{extras}]", "hatchling"]) for version in versions}
    for version, report in reports.items():
        header = HEADER.format(version=version, torch=torch, date=datetime.date.today())
        (CONSTRAINTS / f"{version}.txt").write_text(header + "\n".join(pins(report)) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
