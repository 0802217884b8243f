# SPDX-License-Identifier: Apache-2.0
"""Public names are imported when they are asked for, and not before."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("reco_lightning", "reco_lightning.metrics", "reco_lightning.tokenizers")


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_found(package):
    module = importlib.import_module(package)
    assert module.__all__
    for name in module.__all__:
        assert name in dir(module)
        value = getattr(module, name)
        assert getattr(value, "__name__", name) == name
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing


def test_importing_the_packages_imports_neither_torch_nor_lightning():
    code = f"import sys, {', '.join(PACKAGES)}; print(sorted({{'torch', 'lightning', 'wandb'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
