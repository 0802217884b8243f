# SPDX-License-Identifier: Apache-2.0
"""`reco predict`: generation requests as a data module, and the callback that writes the videos."""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
