# SPDX-License-Identifier: Apache-2.0
"""Blocks of the documentation, and the command lines in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE = re.compile(r"\s*(?P<ticks>`{3,}|~{3,})(?P<kind>.*)$")
_ENVIRONMENT = re.compile(r"[A-Z_]+=\S*")


@dataclass(frozen=True)
class Block:
    """A fenced block: page, line of its first row of code, what stands behind the fence, and the code."""

    page: str
    line: int
    kind: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def file(self) -> str | None:
        """The file that the block is, where its first line is a comment with nothing but a name."""
        named = re.match(r"# ([\w-]+\.(?:py|yaml))\n", self.code)
        return named[1] if named else None


def blocks_in(text: str, page: str = "page.md") -> list[Block]:
    """All fenced blocks of a page, whatever their kind; one that is indented or never ends is refused."""
    found: list[Block] = []
    opened: tuple[int, str, str] | None = None
    rows: list[str] = []
    for number, row in enumerate(text.splitlines(), 1):
        fence = _FENCE.match(row)
        if opened is None:
            if fence and row[0] != "`":
                raise ValueError(f"{page}:{number}: a block has to begin with ``` and no space before it, got {row!r}")
            if fence:
                opened, rows = (number + 1, fence["ticks"], fence["kind"].strip()), []
        elif fence and fence["ticks"] == opened[1] and not fence["kind"].strip():
            found.append(Block(page, opened[0], opened[2], "".join(f"{row}\n" for row in rows)))
            opened = None
        else:
            rows.append(row)
    if opened:
        raise ValueError(f"{page}:{opened[0]}: the block never ends")
    return found


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a file."""
    return blocks_in(page.read_text(encoding="utf-8"), page.name)


def command_lines(block: Block) -> list[list[str]]:
    """The words of every command: rows after ``$`` of a console, all rows of a script.

    Rows that end in a backslash go on, ``a && b`` are two commands, comments and variables in front are left out.
    """
    code = block.code.replace("\\\n", " ")
    rows = code.splitlines()
    if block.kind == "console":
        rows = [row[2:] for row in rows if row.startswith("$ ")]
    commands: list[list[str]] = []
    for row in rows:
        command: list[str] = []
        for word in [*shlex.split(row, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                commands.append(command)
                command = []
    return [_without_environment(command) for command in commands]


def reco_words(command: list[str]) -> list[str] | None:
    """What follows `reco` in a command, also behind `torchrun`, `srun` or `python -m reco_lightning`."""
    if command[0] == "reco":
        return command[1:]
    if "reco_lightning" in command and command[command.index("reco_lightning") - 1] == "-m":
        return command[command.index("reco_lightning") + 1 :]
    return None


def _without_environment(command: list[str]) -> list[str]:
    while command and _ENVIRONMENT.fullmatch(command[0]):
        command = command[1:]
    return command
