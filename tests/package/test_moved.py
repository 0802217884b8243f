# SPDX-License-Identifier: Apache-2.0
"""Module paths of version 0.1.0 lead to the same objects, with a warning that says where they are now."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

#: Every module of 0.1.0 with the public names that its reference listed.
MODULES = json.loads((Path(__file__).parents[1] / "data" / "version_0_1_0" / "modules.json").read_text())
del MODULES["reco_lightning.lazy"]  # no interface; lazy_loader took its place
MODULES["reco_lightning.benchmark"].remove("measure")  # StepBenchmark took its place


def forget(*names: str) -> None:
    """Imports under old names are kept by Python, as all are; each test is to see the first."""
    for name in names:
        if name in sys.modules and sys.modules[name].__name__ != name:
            del sys.modules[name]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_of_0_1_0_is_found_with_its_public_names(name: str) -> None:
    forget(name)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        module = importlib.import_module(name)
    for public in MODULES[name]:
        assert hasattr(module, public), public
    texts = [str(each.message) for each in seen if each.category is DeprecationWarning and name in str(each.message)]
    if module.__name__ == name:
        assert texts == []
    else:
        assert texts == [f"{name} has moved to {module.__name__}; the old path goes in version 0.3"]
        assert module is importlib.import_module(module.__name__) is sys.modules[name]
        assert module.__spec__.name == module.__name__  # importlib.reload and pickle ask for it


@pytest.mark.slow
def test_the_warning_points_at_the_import() -> None:
    code = "import warnings\nwarnings.simplefilter('error', DeprecationWarning)\n\nimport reco_lightning.recipe_merge\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeprecationWarning: reco_lightning.recipe_merge has moved to reco_lightning.recipes.merge" in done.stderr
    quiet = code.replace("'error'", "'default'")
    done = subprocess.run([sys.executable, "-c", quiet], capture_output=True, text=True, check=False)
    assert "<string>:4: DeprecationWarning" in done.stderr


def test_modules_stay_themselves_when_a_package_moved() -> None:
    forget("reco_lightning.study", "reco_lightning.study.plan")
    with pytest.deprecated_call():
        old = importlib.import_module("reco_lightning.study.plan")
    assert old is importlib.import_module("reco_lightning.experiments.study.plan")


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'reco_lightning\.callbak'"):
        importlib.import_module("reco_lightning.callbak")
