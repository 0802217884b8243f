# SPDX-License-Identifier: Apache-2.0
"""Measures a trained network: loss by token position, and the distance of its samples."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from reco_lightning.experiments.study.sources import TokenSource
from reco_lightning.metrics.frechet import frechet_distance
from reco_lightning.models.video_model import VideoModel

__all__ = ["FrechetSpace", "clip_features", "position_losses"]

_ROWS = 128


@torch.inference_mode()
def position_losses(model: VideoModel, tokens: torch.Tensor) -> npt.NDArray[np.float64]:
    """Returns the mean cross-entropy of each token position on whole sequences.

    Args:
        model: The model; left in the mode that it was in.
        tokens: Clips, (n, N).

    Returns:
        N numbers in nats.
    """
    training = model.training
    model.eval()
    total = torch.zeros(tokens.shape[1], dtype=torch.float64)
    for rows in tokens.split(_ROWS):
        losses = F.cross_entropy(model(rows).transpose(1, 2), rows, reduction="none")  # (b, N)
        total += losses.double().sum(0)
    model.train(training)
    return (total / len(tokens)).numpy()


def clip_features(pixels: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Returns all pixels of all frames, and all differences of neighbouring frames.

    Args:
        pixels: (n, T, P).

    Returns:
        (n, (2 T - 1) P), float64.

    Example:
        >>> clip_features(np.array([[[1.0], [4.0]]], np.float32)).tolist()
        [[1.0, 4.0, 3.0]]
    """
    frames = pixels.astype(np.float64)
    return np.concatenate([frames.reshape(len(frames), -1), np.diff(frames, axis=1).reshape(len(frames), -1)], axis=1)


class FrechetSpace:
    """Squared Fréchet distances to real clips, in a space that the real clips alone decide.

    The features are principal components of `clip_features`, of clips like those that are trained on: pixels see what
    a clip shows, differences see how it moves, and a few components keep the covariance of a thousand clips well
    determined. Everything is float64 and without random numbers. `floor` is the distance of real training clips to
    held-out ones: what a network that knew the distribution of the former would reach against the latter. The numbers
    have no scale but their own, which differs between lengths and data sets.

    Args:
        source: The real clips.
        blocks: Frame blocks of the clips compared.
        clips: How many on either side.
        features: D, components.
    """

    def __init__(self, source: TokenSource, *, blocks: int, clips: int, features: int) -> None:
        self._source = source
        known = clip_features(source.pixels(source.known(clips, blocks)))
        self._mean = known.mean(0)
        _, _, axes = np.linalg.svd(known - self._mean, full_matrices=False)
        self._axes = axes[:features].T  # (F, D)
        self._real = self._project(clip_features(source.pixels(source.reference(clips, blocks))))
        held_out = self._project(clip_features(source.pixels(source.held_out(clips, blocks))))
        self.floor = float(frechet_distance(held_out, self._project(known)))

    def distance(self, tokens: npt.NDArray[np.int64]) -> float:
        """Returns the distance of generated clips.

        Args:
            tokens: (n, N).
        """
        return float(frechet_distance(self._real, self._project(clip_features(self._source.pixels(tokens)))))

    def _project(self, features: npt.NDArray[np.float64]) -> torch.Tensor:
        return torch.from_numpy((features - self._mean) @ self._axes)
