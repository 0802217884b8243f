# SPDX-License-Identifier: Apache-2.0
"""Finds the argument by which layers and models of transformers take a key/value cache."""

from __future__ import annotations

import inspect
import re

from torch import nn

__all__ = ["CACHE_ARGUMENTS", "NEWEST_TESTED", "describe_module", "find_cache_argument"]

CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
"""The names, newest first: of two in one signature the older one is deprecated. The last is GPT-NeoX's and Bloom's."""

NEWEST_TESTED = "5.24.0"
"""The newest release of transformers that the tests were run with."""


def find_cache_argument(module: nn.Module) -> str | None:
    """Asks a module's signature for the name by which it takes a key/value cache.

    A forward that takes ``**kwargs`` and names no cache hands them on, so its parts are asked, in their order.

    Args:
        module: A layer, a model, or a wrapper around either.

    Returns:
        One of ``CACHE_ARGUMENTS``; ``None`` if the module takes a cache by none of them.

    Example:
        >>> class Layer(nn.Module):
        ...     def forward(self, states, past_key_values=None): ...
        >>> find_cache_argument(Layer()), find_cache_argument(nn.Linear(2, 2))
        ('past_key_values', None)
    """
    parameters = inspect.signature(module.forward).parameters
    for name in CACHE_ARGUMENTS:
        if name in parameters:
            return name
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        return None
    return next(filter(None, map(find_cache_argument, module.children())), None)


def describe_module(module: nn.Module) -> str:
    """Names a module's class; for one of transformers also the release, and whether that is newer than tested.

    Example:
        >>> describe_module(nn.Linear(2, 2))
        'Linear'
    """
    name = type(module).__name__
    if all(base.__module__.partition(".")[0] != "transformers" for base in type(module).__mro__):
        return name
    from transformers import __version__ as version

    newer = f", newer than {NEWEST_TESTED}, the newest tested" if _numbers(version) > _numbers(NEWEST_TESTED) else ""
    return f"{name} of transformers {version}{newer}"


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)[:3]]
