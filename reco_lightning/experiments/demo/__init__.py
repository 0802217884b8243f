# SPDX-License-Identifier: Apache-2.0
"""``reco demo``: the same model trained plainly and with ReCo on real clips, and a page that compares the two."""

from __future__ import annotations

from reco_lightning.experiments.demo.run import run_demo
from reco_lightning.experiments.demo.settings import FULL, QUICK, Settings

__all__ = ["FULL", "QUICK", "Settings", "run_demo"]
