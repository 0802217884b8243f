# SPDX-License-Identifier: Apache-2.0
"""Picks the device that a command computes on."""

from __future__ import annotations

import torch

__all__ = ["pick_device"]


def pick_device(device: str) -> torch.device:
    """Returns the device to compute on.

    Args:
        device: A torch device, or `auto`: CUDA, then Apple's MPS, then the CPU.

    Raises:
        ValueError: It is no such name, or this machine has no such device.

    Example:
        >>> pick_device("cpu")
        device(type='cpu')
    """
    if device != "auto":
        try:
            place = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"device must be auto, cpu, cuda, cuda:1 and so on, got {device!r}") from error
        found = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available()), "meta": 0}
        if (place.index or 0) >= found.get(place.type, 1 + (place.index or 0)):
            raise ValueError(
                f"device must be one of this machine, got {device!r} where it has {found[place.type]} of that type"
            )
        return place
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
