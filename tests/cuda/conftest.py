# SPDX-License-Identifier: Apache-2.0
"""The device that these tests run on, and a line of JSON for each that has ended, so that a cut loses only the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

DEVICE = torch.device(os.environ.get("RECO_TEST_DEVICE", "cuda" if torch.cuda.is_available() else "cpu"))


@pytest.fixture
def device():
    return DEVICE


@pytest.fixture(autouse=True)
def full_precision():
    """Products of float32 in float32, so that devices can be compared."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch.set_float32_matmul_precision(before)


def pytest_runtest_logreport(report):
    path = os.environ.get("RECO_TEST_REPORT")
    is_last = report.when == "call" or report.outcome == "failed"
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or not is_last:
        return
    line = {
        "test": report.nodeid.rpartition("/")[2],
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "message": report.longreprtext[-4000:] if report.failed else "",
    }
    with Path(path).open("a") as file:
        file.write(json.dumps(line) + "\n")
