# SPDX-License-Identifier: Apache-2.0
"""Claims: one holder at a time, none that is dead; files whole or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from reco_lightning.experiments.study.locks import lock, write_json

HOLD = """
import sys, time
from pathlib import Path
from reco_lightning.experiments.study.locks import lock
with lock(Path(sys.argv[1])) as held:
    print(held, flush=True)
    time.sleep(60)
"""


def test_a_claim_names_the_process_keeps_others_out_and_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with lock(path) as first:
        assert first
        assert path.read_text() == f"{os.getpid()}\n"
        with lock(path) as second:
            assert not second
        assert path.read_text() == f"{os.getpid()}\n"
    assert not path.exists()
    with lock(path) as again:
        assert again


def test_a_claim_ends_with_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path / "a.lock"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_claim_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "a.lock"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with lock(path) as held:
            assert not held
        assert path.read_text() == f"{process.pid}\n"
        process.send_signal(signal.SIGKILL)
    assert path.read_text() == f"{process.pid}\n"  # left behind
    with lock(path) as held:
        assert held
        assert path.read_text() == f"{os.getpid()}\n"


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": [1.5]})
    assert json.loads(path.read_text()) == {"a": [1.5]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"a": []})
    assert json.loads(path.read_text()) == {"a": [1.5]}
    assert [one.name for one in tmp_path.iterdir()] == ["a.json"]
