# SPDX-License-Identifier: Apache-2.0
"""Processes that a test starts, and that are gone with all they held when it ends, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextmanager
def started(
    *commands: Sequence[str | Path], environment: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen[str]]]:
    """Starts commands side by side; those that still run at the end are killed with their children, and all waited for.

    A process that nobody waits for is a ResourceWarning in whatever test runs when Python collects it.
    """
    with ExitStack() as stack:
        processes = []
        for command in commands:
            process = stack.enter_context(  # its own exit closes the pipe and waits
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            )
            stack.callback(_kill, process)
            processes.append(process)
        yield processes


def _kill(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
