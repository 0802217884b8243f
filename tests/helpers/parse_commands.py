# SPDX-License-Identifier: Apache-2.0
"""Parses command lines of `reco` in a process of its own; run with a JSON file of them and the file to write."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import yaml

from reco_lightning.cli.entry_point import main


def parsed(args: list[str]) -> dict[str, object]:
    """What the command would run with, or what it says is wrong."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.suppress(SystemExit):
        main([*args, "--print_config"])
    config = yaml.safe_load(out.getvalue())
    return {"config": config} if isinstance(config, dict) and not err.getvalue() else {"error": err.getvalue()}


if __name__ == "__main__":
    lines, configs = map(Path, sys.argv[1:])
    configs.write_text(json.dumps([parsed(args) for args in json.loads(lines.read_text())]))
