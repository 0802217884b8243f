# SPDX-License-Identifier: Apache-2.0
"""The contracts of import-linter refuse an import against the layers, and name it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.path.insert(0, '.'); from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT / "reco_lightning", folder / "reco_lightning", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_package_keeps_its_layers(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("models.transformer", "windowing.sampler"),
        ("data.tokens.shards", "windowing.sampler"),
        ("metrics.moments", "tokenizers.base"),
        ("windowing.engines.base", "callbacks.reco"),
        ("windowing.losses.continuity", "windowing.injection.windowed_step"),
        ("support.media", "data.video.frames"),
        ("data.index.clip_index", "data.index.layouts"),  # a circle
    ],
)
def test_a_wrong_import_is_named(copy: Path, importer: str, imported: str) -> None:
    path = copy / "reco_lightning" / f"{importer.replace('.', '/')}.py"
    before = path.read_text()
    path.write_text(f"{before}\nimport reco_lightning.{imported}\n")
    try:
        done = lint(copy)
    finally:
        path.write_text(before)
    assert done.returncode == 1
    package = "data.index" if importer.startswith("data.index") else importer  # circles are told of their package
    assert f"reco_lightning.{package}" in done.stdout
    assert imported.rpartition(".")[2] in done.stdout
