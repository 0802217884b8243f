# SPDX-License-Identifier: Apache-2.0
"""Checks the types and ranges of arguments and names the one that is wrong.

Each check takes arguments by their own names and raises `ValueError` for the first that it rejects. ``or_none`` also
accepts None.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

__all__ = [
    "check_betas",
    "check_choice",
    "check_finite",
    "check_flag",
    "check_int",
    "check_int_sequence",
    "check_path",
    "check_size",
    "check_str",
    "check_strs",
    "check_tensor",
    "check_video_grid",
]


def check_int(*, at_least: int | None = None, or_none: bool = False, **values: Any) -> None:
    """Raises unless each value is an integer. Booleans and floats are rejected; NumPy integers are accepted.

    Integers wider than 64 bits are rejected: torch counts with 64.

    Example:
        >>> check_int(n=4, top_k=None, or_none=True)
        >>> check_int(n="4")
        Traceback (most recent call last):
        ValueError: n must be a whole number, got '4'
        >>> check_int(n=0, at_least=1)
        Traceback (most recent call last):
        ValueError: n must be a whole number of 1 or more, got 0
    """
    _check_number(values, _is_whole, "a whole number", at_least=at_least, or_none=or_none)


def check_int_sequence(*, or_none: bool = False, **values: Any) -> None:
    """Raises unless each value is a sequence of whole numbers, of any length.

    Example:
        >>> check_int_sequence(grid=(5, 16, 16))
        >>> check_int_sequence(grid=(5, 16.5, 16))
        Traceback (most recent call last):
        ValueError: grid must be a sequence of whole numbers, got (5, 16.5, 16)
    """
    _check(values, _is_whole_sequence, "a sequence of whole numbers", or_none)


def check_size(**values: Any) -> None:
    """Raises unless each value is a pair (height, width) of 1 pixel or more each.

    Example:
        >>> check_size(size=(256, 0))
        Traceback (most recent call last):
        ValueError: size must be two whole numbers of 1 or more, (height, width), got (256, 0)
    """
    _check(values, _is_size, "two whole numbers of 1 or more, (height, width)")


def check_betas(**values: Any) -> None:
    """Raises unless each value is a pair of numbers in [0, 1), as the averaging constants of AdamW are.

    Example:
        >>> check_betas(betas=(0.9, 1.0))
        Traceback (most recent call last):
        ValueError: betas must be two numbers in [0, 1), got (0.9, 1.0)
    """
    _check(values, _is_pair_of_shares, "two numbers in [0, 1)")


def check_finite(
    *, above: float | None = None, at_least: float | None = None, or_none: bool = False, **values: Any
) -> None:
    """Raises unless each value is a finite number. Booleans, NaN and infinity are rejected.

    Example:
        >>> check_finite(temperature=1)
        >>> check_finite(temperature=float("nan"))
        Traceback (most recent call last):
        ValueError: temperature must be a finite number, got nan
        >>> check_finite(learning_rate=0, above=0)
        Traceback (most recent call last):
        ValueError: learning_rate must be a finite number above 0, got 0
    """
    _check_number(values, _is_finite, "a finite number", above=above, at_least=at_least, or_none=or_none)


def check_choice(allowed: Iterable[Any], **values: Any) -> None:
    """Raises unless each value is one of those allowed.

    Example:
        >>> check_choice(("paper", "mean"), norm="sum")
        Traceback (most recent call last):
        ValueError: norm must be one of 'paper', 'mean', got 'sum'
    """
    listed = list(allowed)
    _check(values, lambda value: value in listed, f"one of {', '.join(map(repr, listed))}")


def check_video_grid(**values: Any) -> None:
    """Raises unless each value is a token grid: three whole numbers of 1 or more, (blocks, rows, columns).

    Example:
        >>> check_video_grid(grid=(5, 16, 0))
        Traceback (most recent call last):
        ValueError: grid must be three whole numbers of 1 or more (blocks, rows, columns), got (5, 16, 0)
    """
    _check(values, _is_grid, "three whole numbers of 1 or more (blocks, rows, columns)")


def check_flag(**values: Any) -> None:
    """Raises unless each value is True or False; "false" and 0 are rejected.

    Example:
        >>> check_flag(verify="false")
        Traceback (most recent call last):
        ValueError: verify must be True or False, got 'false'
    """
    _check(values, lambda value: isinstance(value, bool), "True or False")


def check_path(*, or_none: bool = False, **values: Any) -> None:
    """Raises unless each value is a path. The empty text is rejected: it would be the working folder.

    Example:
        >>> check_path(output="outputs/samples")
        >>> check_path(output="")
        Traceback (most recent call last):
        ValueError: output must be a path, got ''
    """
    _check(values, _is_path, "a path", or_none)


def check_tensor(**values: Any) -> None:
    """Raises unless each value is a tensor, of any shape and dtype.

    Example:
        >>> check_tensor(videos=[1, 2])
        Traceback (most recent call last):
        ValueError: videos must be a torch.Tensor, got [1, 2]
    """
    _check(values, lambda value: isinstance(value, Tensor), "a torch.Tensor")


def check_str(**values: Any) -> None:
    """Raises unless each value is text; the empty text is accepted.

    Example:
        >>> check_str(y_label=3)
        Traceback (most recent call last):
        ValueError: y_label must be text, got 3
    """
    _check(values, lambda value: isinstance(value, str), "text")


def check_strs(**values: Any) -> None:
    """Raises unless each value is a sequence of one text or more; a single text is rejected.

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


def _check_number(
    values: Mapping[str, Any],
    accepts: Callable[[Any], bool],
    kind: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    or_none: bool,
) -> None:
    low = -math.inf if at_least is None else at_least
    lower = -math.inf if above is None else above
    bounds = f"{'' if above is None else f' above {above}'}{'' if at_least is None else f' of {at_least} or more'}"
    # every number passes a bound that was not given
    _check(values, lambda value: accepts(value) and value >= low and value > lower, f"{kind}{bounds}", or_none)


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


def _is_grid(value: Any) -> bool:
    return _is_whole_sequence(value) and len(value) == 3 and min(value) >= 1


def _is_pair_of_shares(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_is_finite(one) and 0 <= one < 1 for one in value)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, os.PathLike)) and bool(os.fspath(value)) and "\0" not in str(value)


def _short(value: Any) -> str:
    plain = value is None or isinstance(value, (str, bytes, int, float, complex, Sequence, Mapping))
    text = repr(value) if plain else f"a {type(value).__name__}"
    return text if len(text) <= 200 else f"{text[:200]}..."
