# SPDX-License-Identifier: Apache-2.0
"""Checks the types and ranges of arguments and names the one that is wrong.

Each check takes arguments by their own names. The ranges stay where the arguments are used.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_betas",
    "check_finite",
    "check_flag",
    "check_int",
    "check_int_sequence",
    "check_path",
    "check_size",
    "check_str",
    "check_strs",
    "check_tensor",
]


def check_int(*, at_least: int | None = None, or_none: bool = False, **values: Any) -> None:
    """Raises unless each value is an integer. Booleans and floats are rejected; NumPy integers are accepted.

    Args:
        at_least: The least value that is allowed; None allows any.
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind, or wider than the 64 bits that torch counts with.

    Example:
        >>> check_int(n=4, top_k=None, or_none=True)
        >>> check_int(n="4")
        Traceback (most recent call last):
        ValueError: n must be a whole number, got '4'
        >>> check_int(n=0, at_least=1)
        Traceback (most recent call last):
        ValueError: n must be a whole number of 1 or more, got 0
    """
    if at_least is None:
        _check(values, _is_whole, "a whole number", or_none)
    else:
        _check(
            values,
            lambda value: _is_whole(value) and value >= at_least,
            f"a whole number of {at_least} or more",
            or_none,
        )


def check_int_sequence(*, or_none: bool = False, **values: Any) -> None:
    """Refuses what is no sequence of whole numbers; how many it holds is not looked at.

    Args:
        or_none: Whether None is allowed too.
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_int_sequence(grid=(5, 16, 16))
        >>> check_int_sequence(grid=(5, 16.5, 16))
        Traceback (most recent call last):
        ValueError: grid must be a sequence of whole numbers, got (5, 16.5, 16)
    """
    _check(values, _is_whole_sequence, "a sequence of whole numbers", or_none)


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
    _check(values, _is_size, "two whole numbers of 1 or more, (height, width)")


def check_betas(**values: Any) -> None:
    """Refuses what is no pair of averaging constants, as AdamW has them: two numbers in [0, 1).

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is something else.

    Example:
        >>> check_betas(betas=(0.9, 1.0))
        Traceback (most recent call last):
        ValueError: betas must be two numbers in [0, 1), got (0.9, 1.0)
    """
    _check(values, _is_pair_of_shares, "two numbers in [0, 1)")


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
    _check(values, _is_finite, "a finite number", or_none)


def check_flag(**values: Any) -> None:
    """Refuses what is neither True nor False, as "false" and 0.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_flag(verify="false")
        Traceback (most recent call last):
        ValueError: verify must be True or False, got 'false'
    """
    _check(values, lambda value: isinstance(value, bool), "True or False")


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
    _check(values, _is_path, "a path", or_none)


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
    _check(values, lambda value: isinstance(value, Tensor), "a torch.Tensor")


def check_str(**values: Any) -> None:
    """Refuses what is no text; the empty one is.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind.

    Example:
        >>> check_str(y_label=3)
        Traceback (most recent call last):
        ValueError: y_label must be text, got 3
    """
    _check(values, lambda value: isinstance(value, str), "text")


def check_strs(**values: Any) -> None:
    """Refuses what is no list of one text or more; a text alone is none.

    Args:
        values: Arguments by name.

    Raises:
        ValueError: One is of another kind, or empty.

    Example:
        >>> check_strs(methods=["plain", "reco"])
        >>> check_strs(methods="plain")
        Traceback (most recent call last):
        ValueError: methods must be a list of one text or more, got 'plain'
    """
    _check(values, _is_texts, "a list of one text or more")


def _check(values: Mapping[str, Any], accepts: Callable[[Any], bool], allowed: str, or_none: bool = False) -> None:
    for name, value in values.items():
        if not (or_none and value is None) and not accepts(value):
            raise ValueError(f"{name} must be {allowed}{' or None' if or_none else ''}, got {_short(value)}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def _is_finite(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float holds
        return False


def _is_whole_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(map(_is_whole, value))


def _is_texts(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and len(value) > 0
    return listed and all(isinstance(one, str) for one in value)


def _is_size(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(map(_is_whole, value)) and min(value) >= 1


def _is_pair_of_shares(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_is_finite(one) and 0 <= one < 1 for one in value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)) and "\0" not in str(value)


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, (str, bytes, int, float, complex, Sequence, Mapping))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
