# SPDX-License-Identifier: Apache-2.0
"""Processes that a test starts, and that are gone with all they held when it ends, however it ends."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from typing_extensions import Self

ROOT = Path(__file__).parents[2]
#: What a launcher or a test run tells the processes below it.
TOLD = ("LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PL_GLOBAL_SEED")


def clean_environment(**changes: str) -> dict[str, str]:
    """The environment without what belongs to this test run, and with one thread a process."""
    kept = {k: v for k, v in os.environ.items() if k not in TOLD and not k.startswith(("SLURM_", "PYTEST_"))}
    return kept | {"OMP_NUM_THREADS": "1"} | changes


def free_port() -> str:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def send_from_outside(number: int, *, group: bool) -> None:
    """Signals this process or its group, as a batch system does; by its parent.s own a worker ends without an error."""
    target = -os.getpgid(0) if group else os.getpid()
    subprocess.run(["sh", "-c", f"kill -{int(number)} {target}"], start_new_session=True, check=True)


class Forked:
    """``python -m MODULE ARGUMENT...`` without the seconds of its imports; used as a ``subprocess.Popen``."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.output = tempfile.TemporaryFile("a+")  # noqa: SIM115 - closed by __exit__
        self.status, status = os.pipe()
        message = {"arguments": list(arguments), "environment": dict(environment), "folder": str(folder)}
        socket.send_fds(_fork_server(), [json.dumps(message).encode()], [self.output.fileno(), status])
        os.close(status)
        self.pid, self.returncode = int(self._line(60)), None

    def _line(self, timeout: float | None) -> str:
        """One of the two lines of the status: the process's number, and later its exit status."""
        if not select.select([self.status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        text = b""
        while not text.endswith(b"\n"):
            if not (byte := os.read(self.status, 1)):
                raise RuntimeError(f"the fork server has ended before process {getattr(self, 'pid', 'at its start')}")
            text += byte
        return text.decode()

    def wait(self, timeout: float | None = None) -> int:
        """Waits for the exit status; a signal's is negative."""
        if self.returncode is None:
            self.returncode = int(self._line(timeout))
        return self.returncode

    def poll(self) -> int | None:
        """The exit status of an ended process."""
        if self.returncode is None and not select.select([self.status], [], [], 0)[0]:
            return None
        return self.wait()

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        """Waits, and returns what was written to the standard output and error."""
        self.wait(timeout)
        self.output.seek(0)
        return self.output.read(), None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait(60)
        os.close(self.status)
        self.output.close()


@cache
def _fork_server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-m", "tests.helpers.fork_server", str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, env=clean_environment(), pass_fds=[theirs.fileno()])
    theirs.close()

    @atexit.register
    def end() -> None:
        ours.close()
        server.wait()

    return ours


@contextmanager
def forked(
    *arguments: str | Path, environment: Mapping[str, str] | None = None, folder: Path = ROOT
) -> Iterator[list[Forked]]:
    """Starts ``python -m`` with the arguments, or a script, by the fork server; kills it if it runs at the end."""
    with Forked([str(each) for each in arguments], environment or clean_environment(), folder) as process:
        try:
            yield [process]
        finally:
            _kill(process)


def run_module(*arguments: str | Path, folder: Path = ROOT, timeout: float = 300) -> str:
    """Runs ``python -m`` with the arguments; returns what it wrote, and raises where it fails."""
    with forked(*arguments, folder=folder) as processes:
        text = finish(processes, timeout)
    assert processes[0].returncode == 0, text[-5000:]
    return text


@contextmanager
def launched(*arguments: str | Path, ranks: int = 2) -> Iterator[list[Forked]]:
    """The processes of one run that Lightning joins, as a launcher of a cluster would start them.

    Lightning's own launcher would start each but the first from nothing.
    """
    port = free_port()
    with ExitStack() as stack:
        processes = []
        for rank in range(ranks):
            told = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks)}
            environment = clean_environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **told)
            processes += stack.enter_context(forked(*arguments, environment=environment))
        yield processes


def finish(processes: Sequence[Forked], timeout: float) -> str:
    """Waits for all ranks; returns what they wrote, and raises where one failed or is late."""
    end = time.monotonic() + timeout
    texts = []
    for process in processes:
        try:
            texts.append(process.communicate(max(end - time.monotonic(), 0.1))[0])
        except subprocess.TimeoutExpired:
            for each in processes:
                _kill(each)
            written = "\n".join(each.communicate(10)[0] for each in processes)
            raise AssertionError(f"still running after {timeout} s:\n{written[-3000:]}") from None
    return "\n".join(texts)


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


def _kill(process: subprocess.Popen[str] | Forked) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
