# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import gc
import sys

import pytest


@pytest.fixture(autouse=True)
def no_wandb_run_is_left_behind():
    """A run that a test leaves open would be taken up by the next test's logger."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def pytest_configure(config):
    """Collecting makes a million objects, all of which live on: there is no garbage to look for."""
    gc.disable()


def pytest_collection_finish(session):
    """Leaves what was collected out of every later search for garbage: a third of the time of a compiled test."""
    gc.enable()
    gc.freeze()
