# SPDX-License-Identifier: Apache-2.0
"""Whether plain arguments are of their kind, asked before a range is compared or torch is called.

Each check takes arguments by their own names. The ranges stay where the arguments are used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_finite",
    "check_path",
    "check_size",
    "check_switch",
    "check_tensor",
    "check_whole",
    "check_whole_sequence",
]


def check_whole(*, or_none: bool = False, **values: Any) -> None:
    """Refuses what is no whole number; `True` and `2.0` are none, NumPy's integers are.

    Args:
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind, or wider than the 64 bits that torch counts with.

    Example:
        >>> check_whole(n=4, top_k=None, or_none=True)
        >>> check_whole(n="4")
        Traceback (most recent call last):
        ValueError: n must be a whole number, got '4'
    """
    for name, value in values.items():
        if not (or_none and value is None) and not _is_whole(value):
            raise _refusal(name, "a whole number", value, or_none)


def check_whole_sequence(*, or_none: bool = False, **values: Any) -> None:
    """Refuses what is no sequence of whole numbers; how many it holds is not looked at.

    Args:
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_whole_sequence(grid=(5, 16, 16))
        >>> check_whole_sequence(grid=(5, 16.5, 16))
        Traceback (most recent call last):
        ValueError: grid must be a sequence of whole numbers, got (5, 16.5, 16)
    """
    for name, value in values.items():
        if or_none and value is None:
            continue
        if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or not all(map(_is_whole, value)):
            raise _refusal(name, "a sequence of whole numbers", value, or_none)


def check_size(**values: Any) -> None:
    """Refuses what is no pair (height, width) of 1 pixel or more each.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is something else.

    Example:
        >>> check_size(size=(256, 0))
        Traceback (most recent call last):
        ValueError: size must be two whole numbers of 1 or more, (height, width), got (256, 0)
    """
    for name, value in values.items():
        pair = isinstance(value, Sequence) and len(value) == 2 and all(map(_is_whole, value))
        if not pair or min(value) < 1:
            raise _refusal(name, "two whole numbers of 1 or more, (height, width)", value, False)


def check_finite(*, or_none: bool = False, **values: Any) -> None:
    """Refuses what is no finite number; `True`, NaN and infinity are none.

    Args:
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_finite(temperature=1)
        >>> check_finite(temperature=float("nan"))
        Traceback (most recent call last):
        ValueError: temperature must be a finite number, got nan
    """
    for name, value in values.items():
        if not (or_none and value is None) and not _is_finite(value):
            raise _refusal(name, "a finite number", value, or_none)


def check_switch(**values: Any) -> None:
    """Refuses what is neither True nor False, as "false" and 0.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_switch(verify="false")
        Traceback (most recent call last):
        ValueError: verify must be True or False, got 'false'
    """
    for name, value in values.items():
        if not isinstance(value, bool):
            raise _refusal(name, "True or False", value, False)


def check_path(*, or_none: bool = False, **values: Any) -> None:
    """Refuses what names no file or folder: other kinds, and the empty text, which would be the working folder.

    Args:
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_path(output="outputs/samples")
        >>> check_path(output="")
        Traceback (most recent call last):
        ValueError: output must be a path, got ''
    """
    for name, value in values.items():
        if or_none and value is None:
            continue
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value) or "\0" in str(value):
            raise _refusal(name, "a path", value, or_none)


def check_tensor(**values: Any) -> None:
    """Refuses what is no tensor; shape and dtype are not looked at.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_tensor(videos=[1, 2])
        Traceback (most recent call last):
        ValueError: videos must be a torch.Tensor, got [1, 2]
    """
    for name, value in values.items():
        if not isinstance(value, Tensor):
            raise _refusal(name, "a torch.Tensor", value, False)


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _refusal(name: str, allowed: str, value: Any, or_none: bool) -> ValueError:
    return ValueError(f"{name} must be {allowed}{' or None' if or_none else ''}, got {_short(value)}")


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, (str, bytes, int, float, complex, Sequence, Mapping))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
