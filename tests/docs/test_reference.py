# SPDX-License-Identifier: Apache-2.0
"""The API reference lists the modules of the public interface by topic; every class and function has a text."""

from __future__ import annotations

import ast
import importlib
import re

import pytest

from tests.helpers.pages import ROOT, Block, blocks_of

PACKAGE = ROOT / "reco_lightning"


def module_name(path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


TREES = {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
MODULES = {name: tree for name, tree in TREES.items() if is_public(name)}


def exports(module: str) -> list[str]:
    """What `__all__` of a module holds; nothing where it has none."""
    for node in TREES[module].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            return ast.literal_eval(node.value)
    return []


def definition(module: str, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """The class or function behind a name, also where it is imported from another module of the package."""
    for node in ast.walk(TREES[module]):
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == name and node in TREES[module].body:
            return node
        if isinstance(node, ast.ImportFrom) and node.module in TREES and name in [alias.name for alias in node.names]:
            return definition(node.module, name)
    return None  # a constant, or the name of a type


PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
LISTED = re.findall(r"^   (reco_lightning\.[\w.]+)$", PAGE.partition("## Modules")[0], re.MULTILINE)


def test_every_listed_module_is_there_once_and_has_names() -> None:
    assert len(LISTED) == len({*LISTED})
    assert [module for module in LISTED if module not in MODULES or not exports(module)] == []


@pytest.mark.parametrize("package", ["reco_lightning", "reco_lightning.metrics", "reco_lightning.tokenizers"])
def test_what_a_package_gives_out_is_public_where_it_is_defined(package: str) -> None:
    names = {name for module in LISTED for name in exports(module)}
    assert {*importlib.import_module(package).__all__} - names == set()


@pytest.mark.parametrize("module", sorted(module for module in MODULES if exports(module)))
def test_every_class_and_function_has_a_text(module: str) -> None:
    # a member without one is left out of the module's page
    bare = [name for name in exports(module) if (node := definition(module, name)) and not ast.get_docstring(node)]
    assert bare == []


def test_every_module_has_a_page_and_every_page_is_in_the_index() -> None:
    recursive = [block for block in blocks_of(ROOT / "docs" / "api.md") if ":recursive:" in block.code]
    assert len(recursive) == 1
    assert re.search(r":toctree: generated\n.*\n   reco_lightning\n", recursive[0].code, re.DOTALL)
    index = blocks_of(ROOT / "docs" / "index.md")
    listed = [line for block in index if block.kind == "{toctree}" for line in entries(block)]
    assert sorted(listed) == sorted(page.stem for page in (ROOT / "docs").glob("*.md") if page.stem != "index")


def entries(block: Block) -> list[str]:
    return [line for line in block.code.splitlines() if line and not line.startswith(":")]


def test_the_index_has_what_a_reader_looks_for() -> None:
    needed = "install quickstart add_to_your_module method recipes tokenizers data metrics engines performance"
    listed = [line for block in blocks_of(ROOT / "docs" / "index.md") for line in entries(block)]
    assert {*needed.split(), "reliability", "troubleshooting", "api"} <= set(listed)


def test_the_method_card_has_its_headings() -> None:
    headings = re.findall(r"^## (.*)$", (ROOT / "docs" / "method.md").read_text(encoding="utf-8"), re.MULTILINE)
    needed = {"How it works", "When not to use it", "Suggested settings", "Composability", "Attribution"}
    assert needed <= set(headings)


def test_every_file_that_the_architecture_names_is_there() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\./[^)]+)\)", page)
    assert len(links) > 40
    assert [link for link in links if not (ROOT / "docs" / link).is_file()] == []
    shown = re.search(r"```text\n(.*?)```", page, re.DOTALL)[1]
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and not path.name.startswith("_")}
    assert set(re.findall(r"^(?:   [├└]── )?([a-z]+) ", shown, re.MULTILINE)) == folders
    assert page.count("? | [`") == 20


def test_the_top_of_the_package_is_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 16
