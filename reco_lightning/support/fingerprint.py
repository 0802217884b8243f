# SPDX-License-Identifier: Apache-2.0
"""A SHA-256 of a network's weights and configuration."""

from __future__ import annotations

import hashlib
from dataclasses import is_dataclass

import torch
from torch import Tensor, nn

__all__ = ["fingerprint"]


def fingerprint(tokenizer: object) -> str:
    """Returns the SHA-256 of a tokenizer's weights and of its dataclass `config`: equal ones give the same ids.

    Args:
        tokenizer: Any object; only a `torch.nn.Module` has weights to hash.

    Returns:
        64 hexadecimal digits, or "" for an object that is not a module.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(2, 2)
        >>> fingerprint(layer) == fingerprint(layer), fingerprint(object())
        (True, '')
    """
    if not isinstance(tokenizer, nn.Module):
        return ""
    config = getattr(tokenizer, "config", None)
    digest = hashlib.sha256(repr(config).encode() if is_dataclass(config) else b"")
    for name, value in sorted(tokenizer.state_dict().items()):
        if not isinstance(value, Tensor):
            continue
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        # bytes are read through uint8, as numpy has no bfloat16
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
