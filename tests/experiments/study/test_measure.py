# SPDX-License-Identifier: Apache-2.0
"""What a study measures, against direct computations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from reco_lightning.experiments.study.data_spec import DataSpec
from reco_lightning.experiments.study.measure import FrechetSpace, clip_features, position_losses
from reco_lightning.experiments.study.settings import Settings
from reco_lightning.experiments.study.sources import TokenSource, open_source
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> TokenSource:
    return open_source(DataSpec(), seed=0, folder=tmp_path_factory.mktemp("study"), settings=Settings())


def test_losses_by_position_are_those_of_each_clip_by_itself() -> None:
    torch.manual_seed(0)
    model = VideoModel(VideoTransformer(vocab_size=8, grid=(2, 2, 2), dim=16, depth=1, heads=2))
    tokens = torch.randint(8, (130, 8))
    found = position_losses(model, tokens)
    assert model.training
    by_hand = np.zeros(8)
    for clip in tokens:
        probabilities = model(clip[None]).softmax(-1)[0]  # (8, V)
        by_hand += -np.log(probabilities.detach().numpy()[np.arange(8), clip.numpy()]) / 130
    assert np.allclose(found, by_hand, atol=1e-5)


def test_features_are_pixels_then_differences() -> None:
    pixels = np.array([[[1, 2], [5, 3], [4, 4]]], np.float32)
    assert clip_features(pixels).tolist() == [[1, 2, 5, 3, 4, 4, 4, 1, -1, 1]]


def test_the_distance_is_that_of_the_components_by_scipy(source: TokenSource) -> None:
    space = FrechetSpace(source, blocks=3, clips=200, features=6)
    known, held_out = source.known(200, 3), source.held_out(200, 3)
    made = np.concatenate([known[:100], held_out[100:]])
    features = {name: clip_features(source.pixels(t)) for name, t in (("k", known), ("h", held_out), ("m", made))}
    covariance = np.cov(features["k"].T, bias=True)
    _, vectors = np.linalg.eigh(covariance)
    projected = {name: (value - features["k"].mean(0)) @ vectors[:, -6:] for name, value in features.items()}
    real, other = projected["h"], projected["m"]
    root = scipy.linalg.sqrtm(np.cov(real.T) @ np.cov(other.T)).real
    by_hand = np.square(real.mean(0) - other.mean(0)).sum() + np.trace(np.cov(real.T) + np.cov(other.T) - 2 * root)
    assert space.distance(made) == pytest.approx(by_hand, rel=1e-6)
    assert space.distance(held_out) == pytest.approx(0, abs=1e-9)
    assert space.distance(known) == pytest.approx(space.floor)


def test_frozen_clips_and_clips_of_other_motion_are_far(source: TokenSource, tmp_path: Path) -> None:
    space = FrechetSpace(source, blocks=5, clips=512, features=32)
    still = source.known(512, 5).copy()
    still[:, 16:] = np.tile(still[:, :16], 4)
    fast = open_source(DataSpec(motion="fast"), seed=0, folder=tmp_path, settings=Settings())
    assert space.distance(still) > 3 * space.floor
    assert space.distance(fast.known(512, 5)) > 1.5 * space.floor
