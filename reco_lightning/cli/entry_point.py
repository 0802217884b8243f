# SPDX-License-Identifier: Apache-2.0
"""The `reco` command: reads the command's name, and only then imports what that command needs.

`fit`, `validate`, `test`, `predict` and `explain` go to `reco_lightning.cli.lightning`; every other command is one
function whose signature is its command line.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from reco_lightning import __version__
from reco_lightning.recipes.files import PREFIX, load_recipe, options_for, own_recipe

__all__ = ["COMMANDS", "Command", "main", "resolve_recipes"]


@dataclass(frozen=True)
class Command:
    """A command: one word after `reco`.

    Args:
        name: The word.
        summary: One line for `reco --help`.
        target: `module:function` that runs it. With `takes_args` it receives the remaining arguments as a list;
            otherwise its signature and docstring make the command line.
        takes_args: Whether the target reads the arguments itself.
        aliases: Pairs of a short option and the long one that it stands for.
    """

    name: str
    summary: str
    target: str
    takes_args: bool = False
    aliases: tuple[tuple[str, str], ...] = ()


COMMANDS: tuple[Command, ...] = (
    Command("fit", "Train a model on token shards or videos.", "reco_lightning.cli.lightning:run_fit", takes_args=True),
    Command(
        "validate", "Run a model's validation loop once.", "reco_lightning.cli.lightning:run_validate", takes_args=True
    ),
    Command("test", "Run a model's test loop once.", "reco_lightning.cli.lightning:run_test", takes_args=True),
    Command(
        "predict", "Run a model's prediction loop once.", "reco_lightning.cli.lightning:run_predict", takes_args=True
    ),
    Command(
        "tokenize",
        "Turn a folder of videos into token shards, once.",
        "reco_lightning.pipelines.tokenize.run:tokenize_folder",
    ),
    Command(
        "generate",
        "Sample clips from a checkpoint and write them as mp4.",
        "reco_lightning.pipelines.generate:generate",
        aliases=(("-n", "--n"),),
    ),
    Command(
        "evaluate",
        "Score a checkpoint's generated videos against a data set.",
        "reco_lightning.cli.lightning:run_evaluate",
        takes_args=True,
    ),
    Command(
        "convert-i3d",
        "Turn DeepMind's I3D checkpoint into the weights file of the Fréchet video distance.",
        "reco_lightning.metrics.i3d.convert:convert_i3d",
    ),
    Command(
        "demo", "Train plainly and with ReCo on real clips, and compare.", "reco_lightning.experiments.demo:run_demo"
    ),
    Command(
        "benchmark",
        "Measure training steps of the methods, or with --generation sampling against transformers.",
        "reco_lightning.experiments.benchmark.command:benchmark",
    ),
    Command(
        "study",
        "Train several methods with several seeds at equal steps and cost, and tabulate them.",
        "reco_lightning.experiments.study.command:study",
    ),
    Command(
        "plan",
        "Predict memory and operations of training steps, without running them.",
        "reco_lightning.experiments.plan.command:plan",
    ),
    Command(
        "explain",
        "Say which engine, blocks and head a config would use, and what a step costs.",
        "reco_lightning.cli.lightning:run_explain",
        takes_args=True,
    ),
    Command(
        "recipes",
        "List the packaged recipes, show one, or copy it to a file of your own.",
        "reco_lightning.cli.recipes:run_recipes",
        takes_args=True,
    ),
)


def resolve_recipes(command: str, args: list[str], folder: str) -> list[str]:
    """Replaces every recipe after `--config` by a file with what it holds for the command; other values pass unchanged.

    Args:
        command: A word after `reco`.
        args: What follows it.
        folder: An existing folder for the files.

    Returns:
        The arguments that the command itself understands.

    Raises:
        ValueError: If there is no such recipe, or it holds nothing for the command.

    Example:
        >>> resolve_recipes("fit", ["--config", "my/own.yaml"], "unused")
        ['--config', 'my/own.yaml']
    """
    resolved: list[str] = []
    for position, arg in enumerate(args):
        flag, equals, value = arg.partition("=")
        if equals and flag == "--config":
            resolved.append(f"{flag}={_config_file(command, value, Path(folder, str(position)))}")
        elif position and args[position - 1] in ("--config", "-c"):
            resolved.append(_config_file(command, arg, Path(folder, str(position))))
        else:
            resolved.append(arg)
    return resolved


def _config_file(command: str, value: str, folder: Path) -> str:
    if value.startswith(PREFIX):
        recipe = load_recipe(value.removeprefix(PREFIX).removesuffix(".yaml"))
    elif own_recipe(value):
        recipe = load_recipe(value)
    else:
        _check_text(value)
        return value
    path = folder / f"{recipe.name.replace('/', '-')}.yaml"
    folder.mkdir()
    path.write_text(yaml.safe_dump(options_for(recipe, command), sort_keys=False), encoding="utf-8")
    return str(path)


def _check_text(path: str) -> None:
    if not Path(path).is_file():
        return  # jsonargparse says so
    try:
        Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config must be a file of UTF-8 text, got {path!r}: {error}") from error


def main(args: list[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: What follows `reco`; None reads `sys.argv`.

    Raises:
        SystemExit: With code 2 where a command or an argument is not understood, 0 after `--help` and `--version`.

    Example:
        >>> main(["--version"])
        Traceback (most recent call last):
        SystemExit: 0
    """
    args = sys.argv[1:] if args is None else list(args)
    parser = _parser()
    commands = {command.name: command for command in COMMANDS}
    if not args:
        parser.print_help(sys.stderr)
        parser.exit(2)
    if args[0] not in commands:
        if args[0].startswith("-"):
            parser.parse_known_args(args[:1])  # leaves after --help and --version
            parser.error(f"the command comes first, its options after it, got {args[0]!r}: reco COMMAND [options].")
        parser.error(f"unknown command {args[0]!r}.{_did_you_mean(args[0], commands)} One of: {', '.join(commands)}.")
    command = commands[args[0]]
    try:
        with tempfile.TemporaryDirectory(prefix="reco-") as folder:
            rest = resolve_recipes(command.name, args[1:], folder)
            target = _load(command.target)
            if command.takes_args:
                target(rest)
            else:
                _run_function(command, target, rest)
    except Exception as error:
        refusal = None if os.environ.get("RECO_TRACEBACK") else _refusal(error)
        if refusal is None:
            raise
        sys.stderr.write(f"reco {command.name}: error: {refusal}\n")
        raise SystemExit(2) from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reco",
        description="Windowed training with representation continuity for autoregressive video models.",
        epilog=f"`reco COMMAND --help` lists the options of a command. `--config {PREFIX}NAME` is a packaged recipe; "
        "`reco recipes ls` lists them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"reco_lightning {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", title="commands")
    for command in COMMANDS:
        commands.add_parser(command.name, help=command.summary, add_help=False)
    return parser


def _run_function(command: Command, function: Callable[..., Any], args: list[str]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=f"reco {command.name}", description=command.summary)
    parser.add_function_arguments(function, as_positional=False)
    parser.add_argument("--config", action="config", help="A YAML file with these options.")
    options = parser.parse_args(_expand(args, dict(command.aliases), _switches(function))).as_dict()
    options.pop("config", None)
    function(**options)


def _switches(function: Callable[..., Any]) -> set[str]:
    return {f"--{name}" for name, p in inspect.signature(function).parameters.items() if p.annotation in (bool, "bool")}


def _expand(args: list[str], aliases: dict[str, str], switches: set[str]) -> list[str]:
    """Writes short options out, and `--quick` as `--quick=true`: jsonargparse wants a value."""
    expanded = []
    for arg, following in itertools.zip_longest(args, args[1:], fillvalue="--"):
        arg = aliases.get(arg, arg)
        expanded.append(f"{arg}=true" if arg in switches and following.startswith("-") else arg)
    return expanded


def _refusal(error: BaseException | None) -> BaseException | None:
    """What our own code refused, where jsonargparse says only that a value does not fit; its words are the cause."""
    while error is not None and not _is_about_arguments(error):
        error = error.__cause__
    return error


def _is_about_arguments(error: BaseException) -> bool:
    """Whether our own code refused something; an error from deeper down needs its traceback."""
    if type(error).__name__ == "MisconfigurationException":
        return True  # Lightning's own are about the trainer's arguments
    refused = isinstance(error, (ValueError, OSError, FloatingPointError))
    missing_extra = isinstance(error, ModuleNotFoundError) and "pip install" in str(error)
    if not (refused or missing_extra):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("reco_lightning")


def _load(target: str) -> Callable[..., Any]:
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
