# SPDX-License-Identifier: Apache-2.0
"""Finds and composes recipes; `recipes/tables.yaml` holds one for each row of the paper.

Used by `reco_lightning.cli.entry_point`, which gives each command its part of a recipe, and by `reco recipes`.
"""

from __future__ import annotations

import difflib
import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reco_lightning.recipes.merge import merge

__all__ = [
    "PREFIX",
    "SECTIONS",
    "Recipe",
    "load_recipe",
    "options_for",
    "own_recipe",
    "recipe_names",
    "tables",
]

#: What stands in front of a packaged recipe's name after `--config`.
PREFIX = "recipe:"
#: Keys of a recipe that belong to one command; all others are LightningCLI's.
SECTIONS = ("tokenize", "generate", "evaluate")

_FOLDER = Path(__file__).parent
#: The parser in C takes a tenth of the time; some builds of PyYAML are without it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TABLES = "tables.yaml"


@dataclass(frozen=True)
class Recipe:
    """A recipe with all its parts merged.

    Args:
        name: Its name in the package, or the path of a file.
        summary: One line: what the file says at its beginning, or the parts and what is changed in them.
        config: The merged content: keys of LightningCLI, and `SECTIONS` of other commands.
        commands: The commands that it is for, in the order in which they are run.
        paper: Figures that the paper prints for it, by name; empty where there are none.
    """

    name: str
    summary: str
    commands: tuple[str, ...]
    config: Mapping[str, Any]
    paper: Mapping[str, float]


@functools.cache
def tables() -> dict[str, Any]:
    """Returns the tables of the paper: name to `title` and `rows`, each row to its recipe in `recipes/tables.yaml`.

    Example:
        >>> tables()["table7"]["rows"]["ffs-lambda-0.5"]["paper"]
        {'fvd': 76.93}
    """
    return yaml.load((_FOLDER / _TABLES).read_text(encoding="utf-8"), Loader=_LOADER)


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """Returns the names of the packaged recipes: whole ones, then pieces by folder, then the rows of the tables.

    Example:
        >>> names = recipe_names()
        >>> [name in names for name in ("reco", "model/110m", "table4/ffs-110m-reco")]
        [True, True, True]
    """
    files = [path.relative_to(_FOLDER).with_suffix("") for path in sorted(_FOLDER.rglob("*.yaml"))]
    files = [path for path in files if path != Path(_TABLES).with_suffix("")]
    names = [path.as_posix() for path in sorted(files, key=lambda path: (len(path.parts), path.parts))]
    return (*names, *(f"{table}/{row}" for table, content in tables().items() for row in content["rows"]))


def load_recipe(name: str) -> Recipe:
    """Reads a recipe and merges its parts.

    Args:
        name: A packaged recipe, or the path of a YAML file: one with `compose` is merged, another is taken as it is.

    Returns:
        The recipe. `{recipe}` in its values is replaced by its name.

    Raises:
        ValueError: If there is no such recipe or file, or its parts cannot be merged.

    Example:
        >>> recipe = load_recipe("table8/sky-overlap-75")
        >>> recipe.summary, recipe.paper
        ('table4/sky-110m-reco, stride_blocks 0.5', {'fvd': 86.9})
        >>> recipe.config["trainer"]["callbacks"][-1]["init_args"]["sampler"]["init_args"]["stride_blocks"]
        0.5
    """
    if not isinstance(name, str):  # checks.py would import torch, which `reco --help` need not wait for
        raise ValueError(f"recipe must be a name that `reco recipes ls` lists, or the path of a file, got {name!r}")
    content, head = _read(name)
    config = _named(_composed(name, ()), Path(name).stem if _is_path(name) else name)
    if _is_row(name):
        changes = {key: value for key, value in content.items() if key not in ("compose", "paper")}
        summary = ", ".join(dict.fromkeys([*content["compose"], *_leaves(changes)]))
        return Recipe(name, summary, tuple(_row_commands(name, config)), config, content.get("paper") or {})
    commands = tuple(line.strip() for line in head if line.strip().startswith("reco "))
    return Recipe(name, head[0].strip() if head else "", commands, config, {})


def own_recipe(path: str) -> bool:
    """Returns whether a config file is a recipe: it has `compose`, or keys for other commands than LightningCLI's.

    Args:
        path: What follows `--config`; for what is no YAML file the answer is no.
    """
    file = Path(path)
    if file.suffix not in (".yaml", ".yml") or not file.is_file():
        return False
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)
    except (UnicodeDecodeError, yaml.YAMLError):
        return False  # the command's own parser says what is wrong
    return isinstance(content, Mapping) and not content.keys().isdisjoint(("compose", *SECTIONS))


def options_for(recipe: Recipe, command: str) -> dict[str, Any]:
    """Returns what a recipe holds for a command.

    Args:
        recipe: The recipe.
        command: A word after `reco`. `tokenize` and `generate` have their section alone, `evaluate` its section on top
            of LightningCLI's keys but for `model`, which is the checkpoint's, all others LightningCLI's keys.

    Returns:
        The content of a config file for the command.

    Raises:
        ValueError: If the recipe has no such section.

    Example:
        >>> options_for(load_recipe("tokenizer/omnitokenizer"), "tokenize")
        {'tokenizer': 'imagenet_k600.ckpt', 'frames': 17, 'size': 256}
    """
    shared = {key: value for key, value in recipe.config.items() if key not in SECTIONS}
    if command not in SECTIONS:
        return shared
    section = recipe.config.get(command)
    if section is None and (command != "evaluate" or "evaluate" in recipe.config):
        raise ValueError(
            f"recipe {recipe.name} has nothing for reco {command}, only "
            f"{', '.join(key for key, value in recipe.config.items() if value is not None)}; give the options as flags"
        )
    if command != "evaluate":
        return dict(section or {})
    return merge({key: value for key, value in shared.items() if key != "model"}, section or {})


def _composed(name: str, asked: tuple[str, ...]) -> dict[str, Any]:
    """The merged content of a recipe; `asked` are those that it is a part of."""
    if name in asked:
        raise ValueError(f"compose: a recipe must not be a part of itself, got {' > '.join([*asked, name])}")
    content, _ = _read(name)
    merged: dict[str, Any] = {}
    for part in content.get("compose") or []:
        part = str(Path(name).parent / part) if _is_path(part) else part
        merged = merge(merged, _composed(part, (*asked, name)))
    return merge(merged, {key: value for key, value in content.items() if key not in ("compose", "paper")})


def _read(name: str) -> tuple[dict[str, Any], list[str]]:
    """A recipe's own content, and the lines of comment that it opens with."""
    if _is_row(name):
        table, _, row = name.partition("/")
        return tables()[table]["rows"][row], []
    path = Path(name) if _is_path(name) else _FOLDER / f"{name}.yaml"
    if not (path.is_file() if _is_path(name) else name in recipe_names()):
        close = difflib.get_close_matches(name, recipe_names(), n=3)
        meant = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
        raise ValueError(
            f"recipe must be one that `reco recipes ls` lists, got {name!r}.{meant} "
            f"A file of your own is given by its path, without the prefix `{PREFIX}`."
        )
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, Loader=_LOADER)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must hold YAML, but cannot be read: {error}") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} must hold a YAML mapping, got {type(content).__name__}")
    head = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return dict(content), [line.removeprefix("#") for line in head]


def _row_commands(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What a row takes, with the training of the row that it stands on where that is the same run."""
    run = _run_of(name)
    checkpoint = f"outputs/{run}/reco/RUN/checkpoints/last.ckpt"
    yield f"reco tokenize --config {PREFIX}{run}"
    yield f"reco fit --config {PREFIX}{run}"
    if run != name and "tokenize" in _read(name)[0]:
        yield f"reco tokenize --config {PREFIX}{name}"
    if config.get("evaluate"):
        yield f"reco evaluate --config {PREFIX}{name} --ckpt_path {checkpoint}"
    if config.get("generate"):
        yield f"reco generate --config {PREFIX}{name} --checkpoint {checkpoint}"


def _run_of(name: str) -> str:
    """The row whose training is that of a row."""
    content, _ = _read(name)
    parts = content["compose"]
    same = len(parts) == 1 and _is_row(parts[0]) and content.keys() <= {"compose", "paper", *SECTIONS}
    return _run_of(parts[0]) if same else name


def _is_row(name: str) -> bool:
    table, _, row = name.partition("/")
    return row in tables().get(table, {}).get("rows", {})


def _is_path(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _leaves(value: Mapping[str, Any]) -> list[str]:
    """Names and values of what a row changes."""
    found = []
    for key, inner in value.items():
        found += _leaves(inner) if isinstance(inner, Mapping) else [f"{key} {inner}"]
    return found


def _named(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _named(inner, name) for key, inner in value.items()}
    if isinstance(value, list):
        return [_named(inner, name) for inner in value]
    return value.replace("{recipe}", name) if isinstance(value, str) else value
