# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import gc
import sys

import pytest


def pytest_collection_finish():
    """Takes what all modules hold out of the collector's sight: steps whose memory is measured collect many times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_wandb_run_is_left_behind():
    """A run that a test leaves open would be taken up by the next test's logger."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
