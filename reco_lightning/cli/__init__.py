# SPDX-License-Identifier: Apache-2.0
"""The `reco` command: which command runs, LightningCLI, what a recipe and a checkpoint add to its arguments.

Code that a Python user calls belongs below: in pipelines, experiments or callbacks.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
