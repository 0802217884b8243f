# SPDX-License-Identifier: Apache-2.0
"""Worker processes of a loader that leave signals to their parent."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["SignalsToParent", "signals_held"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def signals_held() -> Iterator[None]:
    """Holds SIGTERM and SIGINT back while workers start, as one that is just starting would end of them.

    They are delivered to this process afterwards; workers that are forked or spawned inherit that they are held.

    Example:
        >>> with signals_held():
        ...     pass  # start the workers
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class SignalsToParent:
    """A loader's `worker_init_fn`: SIGTERM and SIGINT end a worker no more, it ends with its parent.

    A batch system and Ctrl-C signal the whole group of processes. A worker that ended first would be an error of its
    parent's, which then could not finish the batch at hand and save.

    Args:
        then: What the worker does next, as the `worker_init_fn` of the user.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> loader = DataLoader([1, 2], num_workers=1, worker_init_fn=SignalsToParent())
    """

    then: Callable[[int], object] | None = None

    def __call__(self, worker: int) -> None:
        """Starts a worker.

        Args:
            worker: Its number.
        """
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.then is not None:
            self.then(worker)
