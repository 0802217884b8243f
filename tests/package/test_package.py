# SPDX-License-Identifier: Apache-2.0
"""The distribution: what installs where, what the core needs, and rules that hold for every module."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import reco_lightning

pytestmark = pytest.mark.third_party

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "reco_lightning"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MODULES = sorted(PACKAGE.rglob("*.py"))

#: What the extras bring; the core imports with none of them.
EXTRAS = (
    "transformers",
    "diffusers",
    "vector_quantize_pytorch",
    "matplotlib",
    "skvideo",
    "scipy",
    "cv2",
    "safetensors",
    "tensorboard",
    "litdata",
    "sklearn",
)


@pytest.mark.slow
def test_core_imports_without_extras() -> None:
    code = f"""
import importlib, pkgutil, sys
import av, decord, einops, jsonargparse, lightning.pytorch, torchmetrics, wandb
for name in list(sys.modules):
    if name.partition(".")[0] in {EXTRAS!r}:
        del sys.modules[name]
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import reco_lightning
for name in getattr(reco_lightning, "__all__", []):
    getattr(reco_lightning, name)
for module in pkgutil.walk_packages(reco_lightning.__path__, "reco_lightning."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
assert "pytorch_lightning" not in sys.modules
print("imported")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "imported", done.stderr


def test_version_has_one_source() -> None:
    assert PROJECT["dynamic"] == ["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", reco_lightning.__version__)
    assert sum("__version__ =" in path.read_text() for path in MODULES) == 1


def test_typing_marker_recipes_and_licence_are_there() -> None:
    assert (PACKAGE / "py.typed").is_file()
    assert len(list((PACKAGE / "recipes").glob("*.yaml"))) >= 3
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"


def test_extras() -> None:
    assert set(PROJECT["optional-dependencies"]) == {
        "demo",
        "hf",
        "metrics",
        "study",
        "tokenizers",
        "litdata",
        "docs",
        "dev",
    }
    core = {Requirement(line).name for line in PROJECT["dependencies"]}
    assert {"torch", "lightning", "torchmetrics", "einops", "jsonargparse", "decord", "wandb"} <= core
    # litdata brings torchvision, which has no CPU build: an extra by itself, in no other
    others = {name: lines for name, lines in PROJECT["optional-dependencies"].items() if name != "litdata"}
    everything = [*PROJECT["dependencies"], *itertools.chain(*others.values())]
    assert not [
        line for line in everything if Requirement(line).name.lower() in ("torchvision", "pytorch-lightning", "litdata")
    ]


@pytest.mark.parametrize(
    ("system", "machine", "reader"),
    [
        ("Linux", "x86_64", "decord"),
        ("Windows", "AMD64", "decord"),
        ("Linux", "aarch64", "decord2"),
        ("Darwin", "arm64", "decord2"),
        ("Darwin", "x86_64", "decord2"),
    ],
)
def test_exactly_one_decord_per_platform(system: str, machine: str, reader: str) -> None:
    environment = {"platform_system": system, "platform_machine": machine}
    readers = [r for r in map(Requirement, PROJECT["dependencies"]) if r.name.startswith("decord")]
    assert [r.name for r in readers if r.marker is None or r.marker.evaluate(environment)] == [reader]


def test_every_lower_bound_has_a_reason() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    block = text[text.index("\ndependencies = [") : text.index("[project.optional-dependencies]")].splitlines()[2:-2]
    for line, above in zip(block, ["", *block], strict=False):
        if line.strip().startswith('"'):
            assert "# " in line or above.strip().startswith(("#", '"decord>=')), f"no reason beside {line.strip()}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rules_of_every_module(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(tree) or not tree.body, "a module opens with its docstring"
    assert len(text.splitlines()) <= 500
    assert path.name != "utils.py"
    code = [node for node in tree.body if not isinstance(node, ast.Expr)]
    if code:
        names = {t.id for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) for t in _targets(node)}
        assert "__all__" in names or path == PACKAGE / "__init__.py"
    for node in ast.walk(tree):
        imported = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in imported:
            assert not name.startswith("pytorch_lightning"), "one import root: lightning.pytorch"
            assert not name.startswith("torchvision")
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[ast.Name]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [each for target in targets for each in ast.walk(target) if isinstance(each, ast.Name)]
