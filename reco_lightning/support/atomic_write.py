# SPDX-License-Identifier: Apache-2.0
"""Atomic file writes: write to a temporary file, fsync, rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a name to write to, and puts what was written in the place of the file when the block ends.

    Processes that write the same file at the same time leave one of theirs, whole. After an error, or if the machine
    fails, a file that was there before is as it was.

    Args:
        path: The file; folders are made, a file of that name is replaced.

    Yields:
        A name in the same folder, which no other process has.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> with atomic_write(folder / "new" / "report.txt") as part:
        ...     _ = part.write_text("done")
        >>> [(file.name, file.read_text()) for file in (folder / "new").iterdir()]
        [('report.txt', 'done')]
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{uuid4().hex}.part")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # or the new name could be on the disk before the content
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
