# SPDX-License-Identifier: Apache-2.0
"""Loads the LightningModule of a checkpoint without running code in the file."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch

from reco_lightning._moved import current_path
from reco_lightning.support.argument_checks import check_path

__all__ = ["VIDEO_MODEL", "checkpoint_model", "load_module"]

VIDEO_MODEL = "reco_lightning.models.video_model.VideoModel"
_TEXT_VIDEO_MODEL = "reco_lightning.models.text_video.lightning_module.TextVideoModel"
#: Where Lightning looks for a module's arguments; the last two are keys of its older releases.
_HYPERPARAMETERS = ("hyper_parameters", "hparams", "module_arguments")
#: What LightningCLI names in a checkpoint; Lightning before 2.6.6 calls whatever function stands there.
_INSTANTIATORS = ("lightning.pytorch.cli.instantiate_module", "pytorch_lightning.cli.instantiate_module")

Kind = TypeVar("Kind", bound=L.LightningModule)


def checkpoint_model(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the model's class and arguments that LightningCLI stored in a checkpoint.

    Args:
        path: A checkpoint file.

    Returns:
        `{"class_path": ..., "init_args": {...}}`, or None where the checkpoint does not name its class (it was not
        written by a command line) and is neither a `VideoModel`'s nor a `TextVideoModel`'s, as its `network` shows.

    Raises:
        ValueError: If there is no such file, it is no checkpoint, or reading it would run code.
    """
    stored = _read(path).get("hyper_parameters", {})
    if "_class_path" not in stored:
        network = stored.get("network")
        if not isinstance(network, dict):
            return None
        return {"class_path": _TEXT_VIDEO_MODEL if "architecture" in network else VIDEO_MODEL, "init_args": stored}
    return {
        "class_path": current_path(stored["_class_path"]),
        "init_args": {key: value for key, value in stored.items() if key not in ("_class_path", "_instantiator")},
    }


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A checkpoint's content, without running code in it; the weights stay on disk."""
    check_path(checkpoint=path)
    if not Path(path).is_file():
        raise ValueError(f"checkpoint must be an existing checkpoint file, got {os.fspath(path)!r} (no such file)")
    try:
        stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # bytes that are no pickle fail in many ways
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds a {unsafe[1]}, and reading that would run code" if unsafe else str(error).partition("\n")[0]
        raise ValueError(
            f"checkpoint must be a file that torch.load(weights_only=True) reads, got {os.fspath(path)!r}: {reason}"
        ) from error
    if not isinstance(stored, dict) or not isinstance(stored.get("hyper_parameters", {}), dict):
        raise ValueError(f"checkpoint must be a file that a trainer wrote, got {os.fspath(path)!r}, which is another")
    for key in _HYPERPARAMETERS:
        arguments = stored.get(key)
        named = (
            arguments.get("_instantiator", _INSTANTIATORS[0]) if isinstance(arguments, Mapping) else _INSTANTIATORS[0]
        )
        if named not in _INSTANTIATORS:
            raise ValueError(
                f"checkpoint must name no function but {_INSTANTIATORS[0]} to make its module, got {named!r} in "
                f"{os.fspath(path)!r}, which loading would call"
            )
    return stored


def load_module(checkpoint: str, kind: type[Kind]) -> Kind:
    """Builds the LightningModule of a checkpoint and loads its weights, on the CPU and in evaluation mode.

    Args:
        checkpoint: A checkpoint file.
        kind: What the module has to be; also its class where the checkpoint does not name one.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such file, or it holds a module of another kind or other weights.
    """
    stored = checkpoint_model(checkpoint)
    cls: Any = kind
    if stored:
        module, _, name = stored["class_path"].rpartition(".")
        try:
            cls = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(
                f"checkpoint must hold a module whose class can be imported, got {stored['class_path']!r}: {checkpoint}"
            ) from error
        if not isinstance(cls, type) or not issubclass(cls, kind):
            raise ValueError(f"checkpoint must hold a {kind.__name__}, got a {stored['class_path']}: {checkpoint}")
    try:
        return cls.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    except (
        RuntimeError,
        KeyError,
        TypeError,
    ) as error:  # of torch and Lightning, where arguments or weights are others
        raise ValueError(
            f"checkpoint must hold the arguments and weights of its {cls.__name__}, got {checkpoint!r}: {error}"
        ) from error
