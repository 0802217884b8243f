# SPDX-License-Identifier: Apache-2.0
"""Windowed training with representation continuity (arXiv 2604.07402) for any autoregressive video LightningModule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reco_lightning.support.lazy_imports import lazy_exports

if TYPE_CHECKING:
    from reco_lightning.callbacks.position_profile import PositionLossProfile
    from reco_lightning.callbacks.reco import ReCoCallback
    from reco_lightning.callbacks.sample_videos import SampleVideos
    from reco_lightning.experiments.methods import Method, load_method
    from reco_lightning.models.sampling.generate import generate
    from reco_lightning.models.sampling.text import generate_from_text
    from reco_lightning.models.text_video.lightning_module import TextVideoModel
    from reco_lightning.models.text_video.network import TextVideoNetwork
    from reco_lightning.models.transformer import VideoTransformer
    from reco_lightning.models.video_model import VideoModel
    from reco_lightning.pipelines.evaluate.callback import EvaluateVideos
    from reco_lightning.windowing.explain import Explanation, explain
    from reco_lightning.windowing.losses.continuity import continuity_loss
    from reco_lightning.windowing.mixin import ReCoMixin, WindowStep
    from reco_lightning.windowing.sampler import Window, WindowSampler

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
    "EvaluateVideos": "pipelines.evaluate.callback",
    "Explanation": "windowing.explain",
    "Method": "experiments.methods",
    "PositionLossProfile": "callbacks.position_profile",
    "ReCoCallback": "callbacks.reco",
    "ReCoMixin": "windowing.mixin",
    "SampleVideos": "callbacks.sample_videos",
    "TextVideoModel": "models.text_video.lightning_module",
    "TextVideoNetwork": "models.text_video.network",
    "VideoModel": "models.video_model",
    "VideoTransformer": "models.transformer",
    "Window": "windowing.sampler",
    "WindowSampler": "windowing.sampler",
    "WindowStep": "windowing.mixin",
    "continuity_loss": "windowing.losses.continuity",
    "explain": "windowing.explain",
    "generate": "models.sampling.generate",
    "generate_from_text": "models.sampling.text",
    "load_method": "experiments.methods",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
