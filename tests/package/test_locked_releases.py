# SPDX-License-Identifier: Apache-2.0
"""The releases that are tested: the locks, the oldest set, and what the documentation says of both."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
MAKEFILE = (ROOT / "Makefile").read_text()
LOCKS = sorted((ROOT / ".ci" / "constraints").glob("*.txt"))

pins = runpy.run_path(str(ROOT / ".ci" / "lock.py"))["pins"]
oldest = runpy.run_path(str(ROOT / ".ci" / "oldest.py"))["oldest"]
versions, changes = map(runpy.run_path(str(ROOT / ".ci" / "changes.py")).get, ("versions", "changes"))


def variable(name: str) -> str:
    """What the Makefile gives a variable."""
    return re.search(rf"^{name} \??:?= (.+)$", MAKEFILE, re.MULTILINE)[1]


def applies(requirement: Requirement, python: str = "3.11") -> bool:
    """Whether a requirement is one on the machines that the locks are made for."""
    environment = {"python_version": python, "platform_system": "Linux", "platform_machine": "x86_64"}
    return requirement.marker is None or requirement.marker.evaluate(environment)


def test_a_lock_is_sorted_and_leaves_out_what_the_build_of_torch_decides():
    names = ["torch", "Markup_Safe", "nvidia-nvtx", "triton", "cuda-bindings", "torchvision", "reco_lightning", "av"]
    report = {"install": [{"metadata": {"name": name, "version": "1.2+cpu"}} for name in names]}
    report["install"].append({"metadata": {"name": "torch-einops-utils", "version": "0.2"}})
    assert pins(report) == ["av==1.2", "markup-safe==1.2", "torch-einops-utils==0.2"]


def test_every_python_that_the_makefile_names_has_a_lock():
    assert [path.stem for path in LOCKS] == variable("LOCKED_PYTHONS").split()
    assert PROJECT["requires-python"] == f">={LOCKS[0].stem}"


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.stem)
def test_a_lock_satisfies_every_requirement_of_pyproject(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^+\s]+", line) for line in lines)
    locked = versions(path.read_text())
    assert list(locked) == sorted(locked)
    assert "hatchling" in locked
    for line in {line for lines in (PROJECT["dependencies"], *EXTRAS.values()) for line in lines}:
        requirement = Requirement(line)
        if applies(requirement, path.stem) and requirement.name != "torch":
            version = locked[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version), f"{line}, but {version} is locked: run `make lock`"


def test_lower_bounds_become_exact_versions_with_markers_and_without_extras():
    project = {
        "dependencies": ["a[b,c]>=4.39,<5", "d>=2; python_version < '3.11'"],
        "optional-dependencies": {"e": ["f>=1.0", "a>=4.39"], "g": ["h>=3"]},
    }
    assert oldest(project, ["e"]) == ["a==4.39", 'd==2; python_version < "3.11"', "f==1.0"]


@pytest.mark.parametrize("line", ["a<5", "a", "a>=2"])
def test_a_dependency_without_one_lower_bound_is_named(line):
    with pytest.raises(ValueError, match=re.escape(f"{line!r} needs a lower bound")):
        oldest({"dependencies": ["a>=1"], "optional-dependencies": {"e": [line]}}, ["e"])


def test_changes_name_what_both_have_in_different_versions():
    before = "# comment\nMarkup_Safe==3.0.4\ntorch==2.13.0\nsame==1\ngone==1\n"
    after = "markup-safe==3.1.0\ntorch==2.13.0+cpu\nsame==1\nnew==1\n"
    assert changes(before, after) == ["markup-safe 3.0.4 -> 3.1.0"]


@pytest.mark.parametrize(
    ("version", "printed", "said"),
    [
        ("3.11", "PIP_CONSTRAINT=.ci/constraints/3.11.txt PIP_BUILD_CONSTRAINT=.ci/constraints/3.11.txt\n", ""),
        ("3.99", "", "No releases are locked for Python 3.99"),
    ],
)
def test_pip_is_given_the_lock_of_its_python(tmp_path, version, printed, said):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {version}\n")
    python.chmod(0o755)
    done = subprocess.run([ROOT / ".ci" / "locked", python], capture_output=True, text=True, check=True)
    assert done.stdout == printed
    assert done.stderr.startswith(said)
    assert bool(done.stderr) == bool(said)


def test_the_table_of_tested_releases_is_that_of_pyproject_and_the_lock():
    page = (ROOT / "docs" / "install.md").read_text()
    lock = (ROOT / ".ci" / "constraints" / "3.11.txt").read_text()
    newest = versions(f"{lock}\n{variable('TORCH')}")
    users = [name for name in EXTRAS if name not in ("docs", "dev")]
    bounds = {pin.name: str(pin.specifier)[2:] for pin in map(Requirement, oldest(PROJECT, users)) if applies(pin)}
    date = re.search(r"\d{4}-\d\d-\d\d", lock)[0]
    rows = [
        f"| {name} | {bounds[name]} | {newest[canonicalize_name(name)]} | {date} |"
        for name in sorted(bounds, key=str.lower)
    ]
    table = re.search(r"\| dependency \| oldest tested \|.*\n\|---\|---\|---\|---\|\n((?:\|.*\n)*)", page)[1]
    assert table.splitlines() == rows
