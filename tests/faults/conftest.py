# SPDX-License-Identifier: Apache-2.0
"""The run that nothing happens to, which the others are compared with."""

from __future__ import annotations

import pytest

from tests.faults.runs import config, in_a_process, train, write_shards


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """Its shards; its folder, with the run in `run` and the journal beside it; and its number of moments."""
    folder = tmp_path_factory.mktemp("whole")
    tokens = write_shards(folder / "tokens")
    path, count = config(tokens, folder / "run"), folder / "count"
    code, said = in_a_process(lambda: train(path, folder / "journal", count=count), folder)
    assert code == 0, said
    return tokens, folder, int(count.read_text())
