# SPDX-License-Identifier: Apache-2.0
"""Windowed training with representation continuity (arXiv 2604.07402) for any autoregressive video LightningModule."""

from __future__ import annotations

import lazy_loader

from reco_lightning import _moved

__version__ = "0.1.0"

# torch and Lightning take seconds to import, which `reco --help` need not wait for
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

_moved.install()
