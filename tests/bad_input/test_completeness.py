# SPDX-License-Identifier: Apache-2.0
"""Every name that users call is in the table of bad input."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing
from functools import cache
from pathlib import Path

import pytest

import reco_lightning
from reco_lightning.cli.entry_point import COMMANDS
from tests.bad_input.table import ENTRIES

ROOT = Path(__file__).parents[2]
#: Users import these, and do not make them.
RECORDS = {
    "data.tokens.writer.ClipSource",  # TokenShardWriter.write refuses what no manifest can hold
    "metrics.motion_manifest.MotionManifest",  # made by measure_motion and MotionManifest.load, which is in the table
    "models.larp.network.Guided",
    "windowing.explain.Explanation",
    "windowing.mixin.WindowStep",
}


@cache
def callables():
    """Names below `reco_lightning` of all that is called: no protocols, records of types, or exceptions."""
    found = {}
    for module in pkgutil.walk_packages(reco_lightning.__path__, "reco_lightning."):
        if module.name.endswith("__main__"):
            continue
        home = importlib.import_module(module.name)
        for name in getattr(home, "__all__", ()):
            value = getattr(home, name)
            is_own = callable(value) and getattr(value, "__module__", None) == module.name
            is_error = inspect.isclass(value) and issubclass(value, BaseException)
            if is_own and not is_error and not typing.is_typeddict(value) and not getattr(value, "_is_protocol", False):
                found[f"{module.name}.{name}".removeprefix("reco_lightning.")] = value
    return found


def takes_arguments(value):
    try:
        return bool(inspect.signature(value).parameters)
    except ValueError:  # a class of torch's that hides its signature
        return True


def homes(name):
    """Full names that an entry of the table may mean: a function, a class, or a class of whose method it is."""
    of_class = name.rpartition(".")[0]
    return [full for full in callables() if f".{full}".endswith(f".{name}")] or [
        full for full in callables() if of_class and f".{full}".endswith(f".{of_class}")
    ]


IN_TABLE = {full for entry in ENTRIES for full in homes(entry.name)}


def named_by_users():
    """Full names of what the package exports, commands run, recipes name, and documentation imports."""
    found = [getattr(reco_lightning, name) for name in reco_lightning.__all__]
    for command in (command for command in COMMANDS if not command.takes_args):
        module, _, name = command.target.partition(":")
        found.append(getattr(importlib.import_module(module), name))
    by_name = {full.rpartition(".")[2]: value for full, value in callables().items()}
    for path in (ROOT / "reco_lightning" / "recipes").rglob("*.yaml"):
        names = re.findall(r"class_path: *([\w.]+)", path.read_text(encoding="utf-8"))
        found += [by_name.get(name.rpartition(".")[2]) for name in names]
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.py")):
        text = path.read_text(encoding="utf-8")
        for module, names in re.findall(r"^from (reco_lightning[\w.]*) import ([\w, ]+)", text, re.MULTILINE):
            found += [getattr(importlib.import_module(module), name) for name in names.replace(" ", "").split(",")]
    wanted = set(map(id, found))
    return {full for full, value in callables().items() if id(value) in wanted and takes_arguments(value)}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_an_entry_is_one_name_of_the_package(entry):
    assert len(homes(entry.name)) == 1


def test_what_users_name_is_in_the_table():
    named = named_by_users()
    assert {
        "callbacks.reco.ReCoCallback",
        "experiments.study.command.study",
        "callbacks.finite_loss.FiniteLoss",
    } <= named
    assert named - IN_TABLE <= RECORDS <= callables().keys()
