# SPDX-License-Identifier: Apache-2.0
"""A process that has imported torch and Lightning, and forks the modules and scripts that tests run.

A fresh Python takes seconds for these imports. ``processes.py`` runs ``python -m tests.helpers.fork_server FD`` and
sends one message a process over the socket FD: arguments, environment and folder as JSON, with the files of
output and status.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import socket
import sys
import threading
import traceback

__all__ = ["serve"]


def serve(connection: socket.socket) -> dict[str, object]:
    """Returns in a forked process, with what it is to run."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:
            os._exit(0)  # the test run has ended
        if supervisor := os.fork():
            for file in files:
                os.close(file)
            os.waitpid(supervisor, 0)
            continue
        if os.fork():  # init takes the other one over, so that this server waits for nobody
            os._exit(0)
        connection.close()
        output, status = files
        if pid := os.fork():
            os.write(status, f"{pid}\n".encode())
            _, code = os.waitpid(pid, 0)
            os.write(status, f"{os.waitstatus_to_exitcode(code)}\n".encode())
            os._exit(0)
        os.close(status)
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        os.close(output)
        return json.loads(message)


if __name__ == "__main__":
    import reco_lightning.cli.lightning  # noqa: F401

    started = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(started["environment"])
    os.chdir(started["folder"])
    module, *arguments = started["arguments"]
    sys.argv = [module, *arguments]  # run_module puts the file in the place of the name
    status = 0
    try:
        if module.endswith(".py"):
            runpy.run_path(module, run_name="__main__")
        else:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        status = 1
        traceback.print_exc()
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the rest of an interpreter's end takes seconds
