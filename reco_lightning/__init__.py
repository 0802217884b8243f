# SPDX-License-Identifier: Apache-2.0
"""Windowed training with representation continuity (arXiv 2604.07402) for any autoregressive video LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reco_lightning.lazy import lazy_exports

if TYPE_CHECKING:
    from reco_lightning.callback import ReCoCallback
    from reco_lightning.continuity import continuity_loss
    from reco_lightning.evaluation import EvaluateVideos
    from reco_lightning.explanation import Explanation, explain
    from reco_lightning.generation import generate
    from reco_lightning.methods import Method, load_method
    from reco_lightning.mixin import ReCoMixin, WindowStep
    from reco_lightning.models.text_generation import generate_from_text
    from reco_lightning.models.text_video_model import TextVideoModel
    from reco_lightning.models.text_video_network import TextVideoNetwork
    from reco_lightning.models.transformer import VideoTransformer
    from reco_lightning.models.video_model import VideoModel
    from reco_lightning.position_profile import PositionLossProfile
    from reco_lightning.samples import SampleVideos
    from reco_lightning.windows import Window, WindowSampler

__all__ = [
    "EvaluateVideos",
    "Explanation",
    "Method",
    "PositionLossProfile",
    "ReCoCallback",
    "ReCoMixin",
    "SampleVideos",
    "TextVideoModel",
    "TextVideoNetwork",
    "VideoModel",
    "VideoTransformer",
    "Window",
    "WindowSampler",
    "WindowStep",
    "continuity_loss",
    "explain",
    "generate",
    "generate_from_text",
    "load_method",
]

__version__ = "0.1.0"

# Where each name lives. Imported on first use: torch and Lightning take seconds, which `reco --help` need not wait for.
_HOMES = {
    "EvaluateVideos": "evaluation",
    "Explanation": "explanation",
    "Method": "methods",
    "PositionLossProfile": "position_profile",
    "ReCoCallback": "callback",
    "ReCoMixin": "mixin",
    "SampleVideos": "samples",
    "TextVideoModel": "models.text_video_model",
    "TextVideoNetwork": "models.text_video_network",
    "VideoModel": "models.video_model",
    "VideoTransformer": "models.transformer",
    "Window": "windows",
    "WindowSampler": "windows",
    "WindowStep": "mixin",
    "continuity_loss": "continuity",
    "explain": "explanation",
    "generate": "generation",
    "generate_from_text": "models.text_generation",
    "load_method": "methods",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
