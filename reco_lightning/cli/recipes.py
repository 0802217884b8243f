# SPDX-License-Identifier: Apache-2.0
"""`reco recipes`: lists the packaged recipes, shows one with all its parts, or copies it to a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from reco_lightning.recipes.files import PREFIX, SECTIONS, Recipe, load_recipe, recipe_names, tables

__all__ = ["copy_recipe", "recipe_listing", "recipe_text", "run_recipes"]

_ORDER = ("class_path", "init_args", "seed_everything", "sizes_from_shards", "model", "data", "trainer", *SECTIONS)


def recipe_listing() -> str:
    """Returns the packaged recipes with one line each, whole ones first, then by folder and by table.

    Example:
        >>> recipe_listing().splitlines()[1].split(maxsplit=1)
        ['baseline', 'VideoModel on token shards, trained plainly on whole sequences: the baseline of recipe:reco.']
    """
    lines: list[str] = []
    group = None
    for name in recipe_names():
        folder = name.rpartition("/")[0] or "whole recipes"
        if folder != group:
            group, table = folder, tables().get(folder)
            lines += ["", f"{folder}: {table['title']}" if table else folder]
        recipe = load_recipe(name)
        paper = f"; in the paper {_figures(recipe.paper)}" if recipe.paper else ""
        lines.append(f"  {name:<30} {recipe.summary}{paper}")
    return "\n".join(lines[1:])


def recipe_text(recipe: Recipe, source: str | None = None) -> str:
    """Returns a recipe as one YAML file that stands alone and opens with its launch commands.

    Args:
        recipe: The recipe.
        source: The file that the commands are to name in the recipe's place; None leaves them.

    Returns:
        The text.

    Example:
        >>> print(recipe_text(load_recipe("method/baseline"), "mine.yaml").splitlines()[2])
        #   reco fit --config recipe:baseline --config mine.yaml --data.folder tokens
    """
    own = re.compile(rf"{PREFIX}{re.escape(recipe.name)}(?![\w/.-])")
    commands = [own.sub(source, line) if source else line for line in recipe.commands]
    head = [f"{recipe.name}: {recipe.summary}", "", *(f"  {line}" for line in commands)]
    if recipe.paper:
        head += ["", f"In the paper: {_figures(recipe.paper)}"]
    text = "".join(f"# {line}".rstrip() + "\n" for line in head)
    return f"{text}\n{yaml.safe_dump(_sorted(recipe.config), sort_keys=False, width=120, default_flow_style=None)}"


def copy_recipe(name: str, file: str, *, overwrite: bool = False) -> None:
    """Writes a recipe with all its parts to a file that stands alone.

    Args:
        name: A packaged recipe.
        file: The file to write; its folder is made if missing.
        overwrite: Whether a file that is there is replaced.

    Raises:
        ValueError: If there is no such recipe, the file has no ending of YAML, or it is there.
    """
    if not isinstance(file, str) or not isinstance(overwrite, bool):
        raise ValueError(f"file must be a path and overwrite True or False, got {file!r} and {overwrite!r}")
    path = Path(file)
    text = recipe_text(load_recipe(name), file)
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"FILE must end in .yaml or .yml, got {file!r}")
    if path.exists() and not overwrite:
        raise ValueError(f"FILE must not be there yet, got {file!r}, which is; --overwrite replaces it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def run_recipes(args: list[str]) -> None:
    """Runs `reco recipes`.

    Args:
        args: What follows it.

    Raises:
        ValueError: As in `copy_recipe`.
        SystemExit: With code 2 where the arguments are not understood, 0 after `--help`.
    """
    options = _parser().parse_args(args)
    name = getattr(options, "name", "").removeprefix(PREFIX)
    if options.action == "ls":
        print(recipe_listing())
    elif options.action == "show":
        print(recipe_text(load_recipe(name)), end="")
    else:
        copy_recipe(name, options.file, overwrite=options.overwrite)
        print(f"Wrote {options.file}: reco fit --config {options.file}")


def _figures(paper: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {value}" for key, value in paper.items())


def _sorted(value: Any) -> Any:
    """With keys in the order in which one reads them."""
    if isinstance(value, list):
        return [_sorted(inner) for inner in value]
    if not isinstance(value, Mapping):
        return value
    keys = sorted(value, key=lambda key: _ORDER.index(key) if key in _ORDER else len(_ORDER))
    return {key: _sorted(value[key]) for key in keys}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reco recipes", description="Packaged configs, for every row of the paper's tables.", allow_abbrev=False
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    actions.add_parser("ls", help="List all, with one line each.", allow_abbrev=False)
    show = actions.add_parser("show", help="Print one with all its parts, launch commands first.", allow_abbrev=False)
    copy = actions.add_parser("cp", help="Write one to a file that stands alone.", allow_abbrev=False)
    for parser_of in (show, copy):
        parser_of.add_argument("name", metavar="NAME", help=f"What follows {PREFIX} after --config.")
    copy.add_argument("file", metavar="FILE", help="A YAML file.")
    copy.add_argument("--overwrite", action="store_true", help="Replace the file if it is there.")
    return parser
