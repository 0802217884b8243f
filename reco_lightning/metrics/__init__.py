# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated video, each a `torchmetrics.Metric` with a function beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reco_lightning.support.lazy_imports import lazy_exports

if TYPE_CHECKING:
    from reco_lightning.metrics.clip_score import CLIP, CLIPScore
    from reco_lightning.metrics.features import FeatureExtractor, RandomConvFeatures, TorchScriptFeatures
    from reco_lightning.metrics.frechet import (
        FrechetVideoDistance,
        RandomFeatureDistance,
        frechet_distance,
        frechet_video_distance,
        fvd_extractor,
    )
    from reco_lightning.metrics.i3d.convert import convert_i3d
    from reco_lightning.metrics.i3d.network import I3DFeatures, InceptionI3D, load_i3d
    from reco_lightning.metrics.interval import IntervalPSNR, interval_psnr
    from reco_lightning.metrics.mmd import PolynomialVideoMMD, polynomial_mmd
    from reco_lightning.metrics.motion_groups import MotionGroups
    from reco_lightning.metrics.motion_manifest import MotionManifest, measure_motion, motion_group
    from reco_lightning.metrics.optical_flow import IntervalOpticalFlow, interval_optical_flow, mean_flow
    from reco_lightning.metrics.own_samples import generated_batches
    from reco_lightning.metrics.position_loss import PositionLoss, measure_position_loss
    from reco_lightning.metrics.protocols import PROTOCOLS, FVDProtocol, fvd_protocol

__all__ = [
    "CLIP",
    "PROTOCOLS",
    "CLIPScore",
    "FVDProtocol",
    "FeatureExtractor",
    "FrechetVideoDistance",
    "I3DFeatures",
    "InceptionI3D",
    "IntervalOpticalFlow",
    "IntervalPSNR",
    "MotionGroups",
    "MotionManifest",
    "PolynomialVideoMMD",
    "PositionLoss",
    "RandomConvFeatures",
    "RandomFeatureDistance",
    "TorchScriptFeatures",
    "convert_i3d",
    "frechet_distance",
    "frechet_video_distance",
    "fvd_extractor",
    "fvd_protocol",
    "generated_batches",
    "interval_optical_flow",
    "interval_psnr",
    "load_i3d",
    "mean_flow",
    "measure_motion",
    "measure_position_loss",
    "motion_group",
    "polynomial_mmd",
]

# Where each name lives. Imported on first use: one metric's packages are not needed for another.
_HOMES = {
    "CLIP": "clip_score",
    "PROTOCOLS": "protocols",
    "CLIPScore": "clip_score",
    "FVDProtocol": "protocols",
    "FeatureExtractor": "features",
    "FrechetVideoDistance": "frechet",
    "I3DFeatures": "i3d.network",
    "InceptionI3D": "i3d.network",
    "IntervalOpticalFlow": "optical_flow",
    "IntervalPSNR": "interval",
    "MotionGroups": "motion_groups",
    "MotionManifest": "motion_manifest",
    "PolynomialVideoMMD": "mmd",
    "PositionLoss": "position_loss",
    "RandomConvFeatures": "features",
    "RandomFeatureDistance": "frechet",
    "TorchScriptFeatures": "features",
    "convert_i3d": "i3d.convert",
    "frechet_distance": "frechet",
    "frechet_video_distance": "frechet",
    "fvd_extractor": "frechet",
    "fvd_protocol": "protocols",
    "generated_batches": "own_samples",
    "interval_optical_flow": "optical_flow",
    "interval_psnr": "interval",
    "load_i3d": "i3d.network",
    "mean_flow": "optical_flow",
    "measure_motion": "motion_manifest",
    "measure_position_loss": "position_loss",
    "motion_group": "motion_manifest",
    "polynomial_mmd": "mmd",
}

__getattr__, __dir__ = lazy_exports(__name__, _HOMES)
