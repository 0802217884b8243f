# SPDX-License-Identifier: Apache-2.0
# The public names and their homes, once: __init__.py imports them on first use, type checkers read this file.

from .clip_score import CLIP as CLIP
from .clip_score import CLIPScore as CLIPScore
from .features import FeatureExtractor as FeatureExtractor
from .features import RandomConvFeatures as RandomConvFeatures
from .features import TorchScriptFeatures as TorchScriptFeatures
from .frechet import FrechetVideoDistance as FrechetVideoDistance
from .frechet import RandomFeatureDistance as RandomFeatureDistance
from .frechet import frechet_distance as frechet_distance
from .frechet import frechet_video_distance as frechet_video_distance
from .frechet import fvd_extractor as fvd_extractor
from .i3d.convert import convert_i3d as convert_i3d
from .i3d.network import I3DFeatures as I3DFeatures
from .i3d.network import InceptionI3D as InceptionI3D
from .i3d.network import load_i3d as load_i3d
from .interval import IntervalPSNR as IntervalPSNR
from .interval import interval_psnr as interval_psnr
from .mmd import PolynomialVideoMMD as PolynomialVideoMMD
from .mmd import polynomial_mmd as polynomial_mmd
from .motion_groups import MotionGroups as MotionGroups
from .motion_manifest import MotionManifest as MotionManifest
from .motion_manifest import measure_motion as measure_motion
from .motion_manifest import motion_group as motion_group
from .optical_flow import IntervalOpticalFlow as IntervalOpticalFlow
from .optical_flow import interval_optical_flow as interval_optical_flow
from .optical_flow import mean_flow as mean_flow
from .own_samples import generated_batches as generated_batches
from .position_loss import PositionLoss as PositionLoss
from .position_loss import measure_position_loss as measure_position_loss
from .protocols import PROTOCOLS as PROTOCOLS
from .protocols import FVDProtocol as FVDProtocol
from .protocols import fvd_protocol as fvd_protocol
