# SPDX-License-Identifier: Apache-2.0
"""What holds for every test."""

from __future__ import annotations

import gc
import sys

import pytest
import torch


@pytest.fixture(autouse=True)
def no_wandb_run_is_left_behind():
    """A run that a test leaves open would be taken up by the next test's logger."""
    yield
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.finish()


def pytest_configure(config):
    """Collecting makes a million objects, all of which live on: there is no garbage to look for.

    Each seed would be kept for each kind of device that is not there, with the stack of the test as text.
    """
    gc.disable()
    for device in (torch.cuda, torch.mtia, torch.xpu):
        if not device.is_available():
            device.manual_seed_all = lambda seed: None


def pytest_collection_finish(session):
    gc.enable()


@pytest.fixture(autouse=True)
def no_shape_is_remembered_by_the_compiler():
    """Torch makes a size that another test has changed a symbol, which takes five times as long to compile."""
    yield
    if "torch._dynamo.eval_frame" in sys.modules:
        sys.modules["torch._dynamo"].reset()


@pytest.fixture(autouse=True, scope="module")
def no_garbage_is_looked_for_among_what_lives_on():
    """Each search would go through all tests and modules: a third of the time of a compiled test."""
    gc.collect()
    gc.freeze()
