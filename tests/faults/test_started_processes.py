# SPDX-License-Identifier: Apache-2.0
"""What a failed test has started does not outlive it, and is nobody else's warning."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from pathlib import Path

import pytest

from tests.helpers.processes import started

SLEEPS = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def is_running(pid):
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] not in "ZX"


def fail_while_they_run(seen):
    with started([sys.executable, "-c", SLEEPS], ["sleep", "600"]) as processes:
        child = int(processes[0].stdout.readline())
        assert is_running(child)
        seen.append((processes, child))
        raise ZeroDivisionError


@pytest.mark.slow
def test_a_failure_leaves_neither_processes_nor_warnings():
    seen = []
    with pytest.raises(ZeroDivisionError):
        fail_while_they_run(seen)
    processes, child = seen.pop()
    assert [process.returncode for process in processes] == [-9, -9]
    assert all(process.stdout.closed for process in processes)
    deadline = time.monotonic() + 30
    while is_running(child) and time.monotonic() < deadline:  # the signal has been sent, and takes its time
        time.sleep(0.01)
    assert not is_running(child)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del processes
        gc.collect()


def test_a_command_that_is_not_there_takes_the_others_with_it():
    seen = []

    def start():
        with started(["sleep", "600"], ["no such command"]) as processes:
            seen.append(processes)

    with pytest.raises(FileNotFoundError):
        start()
    assert seen == []
