# SPDX-License-Identifier: Apache-2.0
"""The folders of the LARP release (Wang et al., arXiv 2410.21264): `config.json` and `model.safetensors`, no pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from reco_lightning.tokenizers.exact_weights import load_exactly

__all__ = ["load_weights", "read_config", "read_weights"]


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the options of a released model.

    Args:
        folder: Holds `config.json`.

    Returns:
        What is in the file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no JSON object.

    Example:
        >>> read_config("nowhere")
        Traceback (most recent call last):
            ...
        FileNotFoundError: folder must hold config.json and model.safetensors, but there is no config.json in ...
    """
    file = _file(folder, "config.json")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be a JSON file, but cannot be read ({error}); download it again") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} must hold a JSON object, got a {type(config).__name__}; download it again")
    return config


def read_weights(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Returns the state dict of a released model, on the CPU.

    Args:
        folder: Holds `model.safetensors`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It cannot be read.
        ModuleNotFoundError: safetensors is not installed.
    """
    file = _file(folder, "model.safetensors")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f'{file} needs safetensors: pip install "reco_lightning[tokenizers]"') from error
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file} must be a safetensors file, but cannot be read ({error}); download it again"
        ) from error


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
    """Fills a module with a state dict that has to fit it exactly.

    Args:
        module: Of any device but meta.
        weights: One tensor for each key of its state dict; any floating dtype.
        source: What to call the weights in an error.

    Raises:
        ValueError: Keys are missing, unknown or of another shape; all are listed, and nothing was loaded.

    Example:
        >>> import torch
        >>> load_weights(nn.Linear(2, 1), {"weight": torch.ones(1, 2), "scale": torch.ones(1)}, "line")
        Traceback (most recent call last):
            ...
        ValueError: line must hold exactly the weights that its config.json asks for. Missing: bias. Unknown: scale. ...
    """
    load_exactly(
        module,
        weights,
        claim=f"{os.fspath(source)} must hold exactly the weights that its config.json asks for",
        remedy="Download both files of the same model",
    )


def _file(folder: str | os.PathLike[str], name: str) -> Path:
    file = Path(folder) / name
    if not file.is_file():
        raise FileNotFoundError(
            f"folder must hold config.json and model.safetensors, but there is no {name} in {os.fspath(folder)!r}; "
            "download the model from its hub first"
        )
    return file
