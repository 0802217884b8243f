# SPDX-License-Identifier: Apache-2.0
"""Adds the file name and a remedy to write errors such as a full disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["named_disk_errors"]


@contextmanager
def named_disk_errors(path: str | os.PathLike[str], remedy: str) -> Iterator[None]:
    """Names the file and the remedy in an `OSError` from inside, which by itself says neither where a write fails.

    Args:
        path: The file that is written.
        remedy: What is kept and what to do; the end of a sentence.

    Raises:
        OSError: What was raised inside, of the same class and number.

    Example:
        >>> with named_disk_errors("a.ckpt", "free space"):
        ...     raise OSError(28, "No space left on device")
        Traceback (most recent call last):
        OSError: [Errno 28] a.ckpt cannot be written (No space left on device): free space
    """
    try:
        yield
    except OSError as error:
        text = f"{os.fspath(path)} cannot be written ({error.strerror or error}): {remedy}"
        # numpy and others leave the number out
        raise (OSError(text) if error.errno is None else OSError(error.errno, text)) from error
