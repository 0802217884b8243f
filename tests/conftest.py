# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture(autouse=True)
def no_wandb_run_is_left_behind():
    """A run that a test leaves open would be taken up by the next test's logger."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()
