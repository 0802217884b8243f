# SPDX-License-Identifier: Apache-2.0
"""Per-run file locks, released automatically when the process dies."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from reco_lightning.support.atomic_write import atomic_write

__all__ = ["lock", "write_json"]


@contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Holds a lock file unless another process does.

    The lock is the operating system's on the open file, which ends with the process: a file that a killed process left
    behind is taken over.

    Args:
        path: The lock file.
        wait: Whether to wait for the holder.

    Yields:
        Whether it is held now.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with lock(Path(folder, "a.lock")) as first, lock(Path(folder, "a.lock")) as second:
        ...         print(first, second)
        True False
    """
    import fcntl  # Linux and macOS alone

    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                break
        os.close(handle)  # its last holder has removed it meanwhile: a lock on it would keep nobody out
    try:
        os.ftruncate(handle, 0)
        os.write(handle, f"{os.getpid()}\n".encode())
        yield True
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file atomically.

    Args:
        path: The file.
        content: What JSON can say; not NaN.
    """
    text = json.dumps(content, indent=1, allow_nan=False)
    with atomic_write(path) as part:
        part.write_text(text + "\n", encoding="utf-8")
