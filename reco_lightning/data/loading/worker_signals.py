# SPDX-License-Identifier: Apache-2.0
"""Worker processes of a loader that leave signals to their parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
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
        >>> from torch.utils.data import DataLoader
        >>> with signals_held():
        ...     batches = iter(DataLoader([1, 2]))
    """
    if not hasattr(signal, "sigwaitinfo"):  # nobody would let the workers end
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True)
class SignalsToParent:
    """A loader's `worker_init_fn`: SIGTERM ends a worker only if its parent sends it, and SIGINT no more.

    A batch system and Ctrl-C signal the whole group of processes. A worker that ended first would be an error of its
    parent's, which then could not finish the batch at hand and save. Where the platform does not tell who sent a signal
    (macOS, Windows), workers are as they were.

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
        if hasattr(signal, "sigwaitinfo"):
            signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
            threading.Thread(target=_end_with_the_parent, daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _end_with_the_parent() -> None:
    """Waits for what the mask holds back; multiprocessing ends its children by SIGTERM and waits for them."""
    parent = multiprocessing.parent_process()
    while True:
        seen = signal.sigwaitinfo(_SIGNALS)
        if seen.si_signo == signal.SIGTERM and parent is not None and seen.si_pid == parent.pid:
            os._exit(0)
