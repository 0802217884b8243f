# SPDX-License-Identifier: Apache-2.0
"""Training killed (SIGKILL) at random moments and resumed: same weights as uninterrupted, no step lost or doubled."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.faults.runs import STEPS, assert_same_training, config, in_a_process, train

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


def steps(journal):
    """What each step was given and found; a step that was run again must have been given and found the same."""
    found = {}
    for line in journal.read_text().splitlines():
        number, rest = line.split(" ", 1)
        assert found.setdefault(int(number), rest) == rest
    return found


@pytest.mark.slow
def test_a_training_killed_three_times_ends_as_the_uninterrupted_one(whole, tmp_path):
    tokens, folder, moments = whole
    source = random.Random(0)
    path = config(tokens, tmp_path / "run")
    for _ in range(3):
        kill_at = source.randint(1, moments // 2)
        code, said = in_a_process(
            lambda at=kill_at: train(path, tmp_path / "journal", at, "--ckpt_path", "last"), tmp_path
        )
        assert code == -signal.SIGKILL, said
        for checkpoint in (tmp_path / "run" / "checkpoints").glob("*.ckpt"):
            assert torch.load(checkpoint, weights_only=True)["global_step"] <= STEPS
    code, said = in_a_process(lambda: train(path, tmp_path / "journal", None, "--ckpt_path", "last"), tmp_path)
    assert code == 0, said
    assert_same_training(tmp_path / "run", folder / "run")
    assert steps(tmp_path / "journal") == steps(folder / "journal")
    assert sorted(steps(folder / "journal")) == list(range(1, STEPS + 1))


def kill_in_the_write_of(number):
    """Dies when half of the checkpoint of that number is written."""
    write, calls = Path.write_bytes, []

    def half(self, data):
        if self.name.endswith(".part"):
            calls.append(self)
            if len(calls) == number:
                write(self, bytes(data)[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
        return write(self, data)

    Path.write_bytes = half


@pytest.mark.slow
def test_half_a_checkpoint_never_takes_the_place_of_a_whole_one(whole, tmp_path):
    tokens, folder, _ = whole
    path = config(tokens, tmp_path / "run")

    def dies():
        kill_in_the_write_of(4)  # last.ckpt of step 6, after that of step 3
        train(path, None)

    code, said = in_a_process(dies, tmp_path)
    assert code == -signal.SIGKILL, said
    kept = tmp_path / "run" / "checkpoints"
    assert torch.load(kept / "last.ckpt", weights_only=True)["global_step"] == 3
    (half,) = kept.glob(".*.part")
    assert 0 < half.stat().st_size < (kept / "last.ckpt").stat().st_size
    code, said = in_a_process(lambda: train(path, None, None, "--ckpt_path", "last"), tmp_path)
    assert code == 0, said
    assert_same_training(tmp_path / "run", folder / "run")
