# SPDX-License-Identifier: Apache-2.0
"""From a checkpoint file to the LightningModule that it holds; used by the commands that need no trainer."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, TypeVar

import lightning.pytorch as L
import torch

__all__ = ["VIDEO_MODEL", "checkpoint_model", "load_module"]

VIDEO_MODEL = "reco_lightning.models.video_model.VideoModel"
_TEXT_VIDEO_MODEL = "reco_lightning.models.text_video_model.TextVideoModel"

Kind = TypeVar("Kind", bound=L.LightningModule)


def checkpoint_model(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Reads the model's class and arguments that LightningCLI stored in a checkpoint.

    Args:
        path: A checkpoint file.

    Returns:
        `{"class_path": ..., "init_args": {...}}`, or None where the checkpoint does not name its class (it was not
        written by a command line) and is neither a `VideoModel`'s nor a `TextVideoModel`'s, as its `network` shows.
    """
    # mmap: the weights stay on disk, only the hyperparameters are read
    stored = torch.load(path, weights_only=True, map_location="cpu", mmap=True).get("hyper_parameters", {})
    if "_class_path" not in stored:
        network = stored.get("network")
        if not isinstance(network, dict):
            return None
        return {"class_path": _TEXT_VIDEO_MODEL if "architecture" in network else VIDEO_MODEL, "init_args": stored}
    return {
        "class_path": stored["_class_path"],
        "init_args": {key: value for key, value in stored.items() if key not in ("_class_path", "_instantiator")},
    }


def load_module(checkpoint: str, kind: type[Kind]) -> Kind:
    """Builds the LightningModule of a checkpoint and loads its weights, on the CPU and in evaluation mode.

    Args:
        checkpoint: A checkpoint file.
        kind: What the module has to be; also its class where the checkpoint does not name one.

    Returns:
        The module.

    Raises:
        ValueError: If there is no such file, or it holds a module of another kind.
    """
    if not Path(checkpoint).is_file():
        raise ValueError(f"checkpoint must be a checkpoint file, got {checkpoint!r}, which is none")
    stored = checkpoint_model(checkpoint)
    cls: Any = kind
    if stored:
        module, _, name = stored["class_path"].rpartition(".")
        cls = getattr(importlib.import_module(module), name)
        if not issubclass(cls, kind):
            raise ValueError(f"checkpoint must hold a {kind.__name__}, got a {stored['class_path']}: {checkpoint}")
    return cls.load_from_checkpoint(checkpoint, map_location="cpu").eval()
