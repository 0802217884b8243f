# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated video, each a `torchmetrics.Metric` with a function beside it."""

from __future__ import annotations

import lazy_loader

# one metric's packages are not needed for another
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
