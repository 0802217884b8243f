# SPDX-License-Identifier: Apache-2.0
"""Runs what a page shows: ``python -m tests.helpers.run_pages STEPS`` in the page's folder, STEPS being a JSON file.

A step is ``["python", code, file, line]``, ``["run", words]`` or ``["parse", words]``, words being those after `reco`.
All
steps share a namespace, as if the page were a script. What goes wrong is printed, or ``DONE``.
"""

from __future__ import annotations

import json
import sys
import traceback
import types
from pathlib import Path

from reco_lightning.cli.entry_point import main
from tests.helpers.parse_commands import parsed

DONE = "\n-- all steps were taken --\n"


def take(steps: list[list]) -> list[str]:
    """Takes the steps, and returns what went wrong."""
    page = sys.modules["__main__"] = types.ModuleType("__main__")
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
    return errors


if __name__ == "__main__":
    sys.path.insert(0, "")  # as `python -m` has it
    print("\n".join(take(json.loads(Path(sys.argv[1]).read_text()))) or DONE, end="")
