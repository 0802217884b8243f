# SPDX-License-Identifier: Apache-2.0
"""Lists what differs between two environments: ``python .ci/changes.py BEFORE AFTER``, locks or what pip freezes."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def versions(text: str) -> dict[str, str]:
    r"""The version of each package in lines ``name==version``, as a lock and ``pip list --format=freeze`` have them.

    >>> versions("# a comment\nMarkup_Safe==3.0\ntorch==2.13.0+cpu")
    {'markup-safe': '3.0', 'torch': '2.13.0'}
    """
    lines = re.findall(r"^([\w.-]+)==([^\s+]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}


def changes(before: str, after: str) -> list[str]:
    r"""One line for each package that both have, in different versions.

    >>> changes("a==1\nb==2\nc==3", "a==1\nb==2.1\nd==4")
    ['b 2 -> 2.1']
    """
    old, new = versions(before), versions(after)
    return [f"{name} {old[name]} -> {new[name]}" for name in sorted(old.keys() & new.keys()) if old[name] != new[name]]


if __name__ == "__main__":
    print(*changes(*(Path(name).read_text() for name in sys.argv[1:])), sep="\n")
