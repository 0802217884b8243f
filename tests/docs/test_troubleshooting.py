# SPDX-License-Identifier: Apache-2.0
"""The messages that the troubleshooting page explains are those that the package gives."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.pages import ROOT

TABLE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("| the message says |")[2]
MESSAGES = re.findall(r"^\| `(.+?)` \|", TABLE.partition("\n\n")[0], re.MULTILINE)


def texts() -> list[str]:
    """All texts in the package; what is filled in is an ellipsis."""
    found = []
    for path in sorted((ROOT / "reco_lightning").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


TEXTS = texts()


@pytest.mark.parametrize("message", MESSAGES)
def test_message_is_one_of_the_package(message: str) -> None:
    assert any(message in text for text in TEXTS)


def test_the_table_was_found() -> None:
    assert len(MESSAGES) > 15
