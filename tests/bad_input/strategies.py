# SPDX-License-Identifier: Apache-2.0
"""What a line of the table of bad input is, and wrong values of every kind of argument."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

__all__ = [
    "BLOCKS", "GRID", "INTERVALS", "MAYBE_PATH", "NAN", "NO_TENSOR", "PAIR", "PATH", "PROTOCOL", "SAMPLING", "SEED",
    "SIZE", "SWITCH", "TEXT", "TEXTS", "Entry", "Wrong", "choice", "number", "received", "tensors", "values",
    "whole",
]  # fmt: skip

Wrong = st.SearchStrategy[Any]


@dataclass(frozen=True)
class Entry:
    """One public callable.

    Args:
        name: Its public name.
        call: Takes keyword arguments.
        valid: Makes arguments with which the call succeeds; None where that takes files of a release.
        wrong: For each argument the values that it must refuse.
        said: What an error calls an argument, where that is not its name.
    """

    name: str
    call: Callable[..., Any]
    valid: Callable[[], Mapping[str, Any]] | None
    wrong: Mapping[str, Wrong]
    said: Mapping[str, str] = field(default_factory=dict)


def received(value: Any) -> list[str]:
    """What an error may say of a value: itself, or for objects their class, and of tensors dtype or shape."""
    kind = type(value).__name__
    found = [repr(value)[:200], f"got {kind}", f"got a {kind}"]
    if isinstance(value, str) and "." in value:  # a file, named by its whole path
        found.append(value)
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return [*found, str(value.dtype), str(tuple(value.shape))]
    if isinstance(value, (list, tuple)):  # the wrong item, or their number
        found += [f"got {item!r}" for item in (*value, len(value))]
        found.append(f"got {', '.join(map(str, value))}")
    if isinstance(value, dict):
        found += [f"got {item!r}" for pair in value.items() for item in pair]
    return found


ODD = [None, "", "three", b"3", [3], {"a": 3}, {3}, object, 1j]
NAN, INFINITY = float("nan"), float("inf")


def values(*pinned: Any) -> Wrong:
    return st.sampled_from(pinned)


def whole(least: int | None = None, most: int | None = None, *, optional: bool = False) -> Wrong:
    """What is no whole number from `least` to `most`."""
    parts = [
        values(*(value for value in ODD if not (optional and value is None)), True, False, 2.0, NAN, INFINITY, 2**63),
        st.text(max_size=3),
        st.floats(),
        st.lists(st.integers(), max_size=2),
    ]
    if least is not None:
        parts.append(values(least - 1, -(2**40)))
    if most is not None:
        parts.append(values(most + 1, 2**40))
    return st.one_of(*parts)


def number(
    least: float | None = None, most: float | None = None, *, open_ends: str = "", optional: bool = False
) -> Wrong:
    """What is no finite number from `least` to `most`; `open_ends` names those that do not belong: "l", "m" or both."""
    parts = [
        values(
            *(value for value in ODD if not (optional and value is None)),
            True,
            False,
            NAN,
            INFINITY,
            -INFINITY,
            10**400,
        ),
        st.text(max_size=3),
        st.lists(st.floats(), max_size=2),
    ]
    if least is not None:
        parts.append(st.floats(max_value=least, exclude_max="l" not in open_ends, allow_infinity=False))
    if most is not None:
        parts.append(st.floats(min_value=most, exclude_min="m" not in open_ends, allow_infinity=False))
    return st.one_of(*parts)


def choice(*, optional: bool = False) -> Wrong:
    """What is the name of nothing."""
    found = [value for value in ODD if not (optional and value is None) and value is not object]
    return st.one_of(values(*found, 0, 1.5, True), st.text(min_size=1, max_size=3).map(lambda text: f"no {text}"))


SWITCH = values("true", "", 0, 1, 1.0, None, [True])
SEED = whole()
PATH = values(None, 3, 2.5, True, b"a", [], "", object)
MAYBE_PATH = values(3, 2.5, True, b"a", [], "", object)
TEXT = values(None, 3, 2.5, b"a", ["a"])
TEXTS = values(None, 3, "ab", b"ab", [], [3], ["a", None], {"a"})
PAIR = values(None, 3, "ab", (1,), (1, 2, 3), (0, 8), (8, -1), (8, 2.5), (8, True), ("8", 8))
SIZE = values(None, "ab", (1,), (1, 2, 3), (0, 8), (8, 2.5), (True, 8), 0, -4, 2.5, True, NAN)
GRID = values(None, 3, "abc", (2,), (2, 2), (0, 2, 2), (2, 2, -1), (2, 2.5, 2), (2, True, 2), ("2", 2, 2), {2, 3, 4})
INTERVALS = values(None, 3, "12", [], [0], [-1, 2], [1.5], [True], ["1"])
NO_TENSOR = values(None, 3, "clip", [1, 2], np.zeros(3))
PROTOCOL = choice()


def tensors(*others: torch.Tensor) -> Wrong:
    return st.one_of(NO_TENSOR, values(*others))


SAMPLING: dict[str, Wrong] = {
    "temperature": number(0),
    "top_k": whole(1, optional=True),
    "top_p": number(0, 1, open_ends="l", optional=True),
    "cfg_scale": number(0),
    "seed": SEED,
}
BLOCKS = whole(1, optional=True)
