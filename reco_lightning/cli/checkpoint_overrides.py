# SPDX-License-Identifier: Apache-2.0
"""Lets command-line arguments override hyperparameters stored in a checkpoint.

Used by `reco_lightning.cli.lightning`.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import yaml
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import override

__all__ = ["GivenOptimizerOptions", "changed_values", "explicit_arguments", "merge_group"]


def explicit_arguments(args: Sequence[str]) -> tuple[str | None, str | None]:
    """Finds the model class and the checkpoint that flags and config files name, later ones winning.

    Args:
        args: A command line.

    Returns:
        Class path or short class name, and checkpoint path; None where nothing is named.

    Example:
        >>> explicit_arguments(["fit", "--model=VideoModel", "--ckpt_path", "last.ckpt"])
        ('VideoModel', 'last.ckpt')
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # one list keeps the order; a flag without its value is the real parser's to report
    for flags in (("--config", "-c"), ("--model", "--model.class_path"), ("--ckpt_path",)):
        parser.add_argument(
            *flags, dest="found", action="append", nargs="?", type=functools.partial(_pair, flags[0][2:])
        )
    model_class = path = None
    for kind, value in (pair for pair in parser.parse_known_args(args)[0].found or [] if pair):
        loaded = _read_yaml(value) if kind == "config" else {kind: value}
        if not isinstance(loaded, Mapping):
            continue
        path = loaded.get("ckpt_path") or path
        model = _read_yaml(loaded.get("model"))
        model_class = (model.get("class_path") if isinstance(model, Mapping) else model) or model_class
    return model_class, path


def changed_values(stored: Mapping[str, Any], used: Mapping[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Lists the leaves in which two nested mappings differ.

    Args:
        stored: The checkpoint's values.
        used: The values of this run.
        prefix: Put before every key.

    Returns:
        Dotted key to (stored, used), for the keys that both have.

    Example:
        >>> changed_values({"a": {"lr": 0.1, "wd": 0.0}}, {"a": {"lr": 0.5, "wd": 0.0}})
        {'a.lr': (0.1, 0.5)}
    """
    changed: dict[str, tuple[Any, Any]] = {}
    for key in stored.keys() & used.keys():
        old, new = stored[key], used[key]
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            changed |= changed_values(old, new, f"{prefix}{key}.")
        elif (list(old) if isinstance(old, tuple) else old) != (list(new) if isinstance(new, tuple) else new):
            changed[f"{prefix}{key}"] = (old, new)
    return dict(sorted(changed.items()))


def merge_group(restored: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Merges the options of an optimizer group after a resume: the given win, the learning rate follows its schedule.

    Args:
        restored: The group as the checkpoint left it.
        given: The same group as `configure_optimizers` made it in this run.

    Returns:
        The options to run with; `params` is left out.

    Example:
        >>> merge_group({"lr": 0.01, "initial_lr": 0.1}, {"lr": 0.5, "initial_lr": 0.5})  # a tenth of the way down
        {'lr': 0.05, 'initial_lr': 0.5}
    """
    options = {key: value for key, value in given.items() if key != "params"}
    start = restored.get("initial_lr")
    if start and "initial_lr" in given:
        options["lr"] = restored["lr"] * (given["initial_lr"] / start)
    return options


class GivenOptimizerOptions(L.Callback):
    """Lets a resumed run use the optimizer options that it was given, where Lightning would restore the checkpoint's.

    `RecoCLI` adds it when the user states a model argument that differs from the checkpoint's. Moments and step
    counters are restored as always; a scheduler goes on from its place, its rates scaled to the given one.
    """

    def __init__(self) -> None:
        self._given: list[list[dict[str, Any]]] = []

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the options before the checkpoint's state is loaded over them."""
        self._given = [
            [{k: copy.deepcopy(v) for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            for optimizer in trainer.optimizers
        ]

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Puts them back after it."""
        for optimizer, given in zip(trainer.optimizers, self._given, strict=True):
            for group, options in zip(optimizer.param_groups, given, strict=True):
                group.update(merge_group(group, options))
        for config in trainer.lr_scheduler_configs:
            _set_base_rates(config.scheduler)


def _pair(kind: str, value: str) -> tuple[str, str]:
    return kind, value


def _read_yaml(value: Any) -> Any:
    """What a file, or YAML in the argument itself, holds; None where the real parser will complain about it."""
    if not isinstance(value, str):
        return value
    try:
        text = Path(value).read_text() if Path(value).is_file() else value
        return yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None


def _set_base_rates(scheduler: Any) -> None:
    if not isinstance(scheduler, LRScheduler):
        return
    scheduler.base_lrs = [group.get("initial_lr", group["lr"]) for group in scheduler.optimizer.param_groups]
    for value in vars(scheduler).values():  # SequentialLR and ChainedScheduler hold further ones in a list
        for inner in value if isinstance(value, (list, tuple)) else ():
            _set_base_rates(inner)
