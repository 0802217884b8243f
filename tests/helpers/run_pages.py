# SPDX-License-Identifier: Apache-2.0
"""Runs what pages show, each time in a fork of one process that has imported the library and no more.

A request is one line of JSON on stdin: a folder and steps; the answer is one on stdout: what went wrong, or nothing.
A step is ``["python", code, file, line]``, ``["run", words]`` or ``["parse", words]``, words being those after `reco`.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import traceback
import types
from pathlib import Path

import reco_lightning.cli.lightning  # noqa: F401  # what a fit imports: short names of classes mean no more than there
from reco_lightning.cli.entry_point import main
from tests.helpers.parse_commands import parsed

_LONGEST = 300  # seconds that a page may take on a busy machine


def answer(folder: str, steps: list[list]) -> str:
    """Takes the steps in a process of their own, in one namespace, and returns its output if one fails."""
    output = Path(f"{folder}.out")
    child = os.fork()
    if child == 0:
        _take(folder, steps, output)
        atexit._run_exitfuncs()  # closes what the steps left open; the rest of an interpreter's end takes seconds
        os._exit(0)
    _, status = os.waitpid(child, 0)
    text = output.read_text(errors="replace")
    return "" if status == 0 and _DONE in text else text[-6000:] or f"ended with status {status}"


_DONE = "\n-- all steps were taken --\n"


def _take(folder: str, steps: list[list], output: Path) -> None:
    signal.alarm(_LONGEST)
    with open(output, "wb") as file, open(os.devnull, "rb") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    sys.path.insert(0, folder)  # as `python -m` has it
    page = sys.modules["__main__"] = types.ModuleType("__main__")  # as if the page were a script
    errors = []
    for kind, what, *place in steps:
        try:
            if kind == "python":
                file, line = place
                exec(compile("\n" * (line - 1) + what, file, "exec"), vars(page))
            elif kind == "run":
                main(what)
            elif error := parsed(what).get("error"):
                errors.append(f"reco {' '.join(what)}\n{error}")
        except SystemExit as end:
            if end.code:
                errors.append(f"{kind} {what}: exit status {end.code}")
                break
        except BaseException:
            errors.append(f"{kind} {place}: {traceback.format_exc()}")
            break
    sys.stdout.flush()
    sys.stderr.flush()
    print("\n".join(errors) if errors else _DONE, end="", flush=True)


def serve() -> None:
    parsed(["fit", "--config", "recipe:reco"])  # what the parser looks up once, the forks have at hand
    while line := sys.stdin.readline():
        print(json.dumps(answer(**json.loads(line))), flush=True)


if __name__ == "__main__":
    serve()
