# SPDX-License-Identifier: Apache-2.0
"""Python blocks of the README, and those of the documentation that follow a line `<!-- runs -->`, run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from reco_lightning.cli import COMMANDS
from reco_lightning.recipe_files import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"(?P<mark><!-- runs -->\s*)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Name and code of every block that has to run."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if page.name == "README.md" or match["mark"]:
                line = text.count("\n", 0, match.start("code")) + 1
                found.append((f"{page.name}:{line}", match["code"]))
    return found


BLOCKS = blocks()


def of(readme: bool):
    chosen = [(name, code) for name, code in BLOCKS if name.startswith("README.md") == readme]
    return pytest.mark.parametrize("code", [code for _, code in chosen], ids=[name for name, _ in chosen])


@of(readme=True)
def test_block_of_the_readme_runs_in_a_process_of_its_own(code: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "offline", "MPLBACKEND": "agg"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.filterwarnings("ignore")  # what a reader's own process prints
@of(readme=False)
def test_block_of_a_page_runs(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MPLBACKEND", "agg")
    with mock.patch.dict(os.environ):
        try:
            exec(compile(code, "<page>", "exec"), {"__name__": "__main__"})
        finally:
            if torch.distributed.is_initialized():  # left by a strategy of several processes
                torch.distributed.destroy_process_group()


def test_the_readme_has_a_block_to_run() -> None:
    assert any(name.startswith("README.md") for name, _ in BLOCKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    known = {command.name for command in COMMANDS}
    text = page.read_text()
    for word in re.findall(r"^\$ reco ([a-z][a-z0-9-]*)", text, re.MULTILINE):
        assert word in known
    for name in re.findall(r"recipe:([a-z0-9_./-]*[a-z0-9])", text):
        load_recipe(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_between_files_hold(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target
