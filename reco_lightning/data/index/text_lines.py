# SPDX-License-Identifier: Apache-2.0
"""Reads the user's text files line by line."""

from __future__ import annotations

import os

__all__ = ["read_lines"]


def read_lines(path: str | os.PathLike[str], *, argument: str) -> list[str]:
    r"""Reads the lines of a file.

    Args:
        path: A UTF-8 file.
        argument: Which argument names it, for the message.

    Returns:
        The lines, without their ends.

    Raises:
        ValueError: The file is of another encoding.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "list.txt")
        ...     _ = path.write_text("a.mp4\nb.mp4\n")
        ...     read_lines(path, argument="index")
        ['a.mp4', 'b.mp4']
    """
    try:
        with open(path, encoding="utf-8") as lines:
            return [line.rstrip("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise ValueError(f"{argument} must be a file of UTF-8 text, got {os.fspath(path)!r}: {error}") from error
