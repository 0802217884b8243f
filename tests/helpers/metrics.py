# SPDX-License-Identifier: Apache-2.0
"""What tests of metrics share: the metrics of two processes in one, and textures that move by known amounts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torchmetrics import Metric


def joined(own: Metric, other: Metric) -> Any:
    """What a metric computes on its process when ``other`` is that of a second process."""
    for mine, theirs in zip(own.modules(), other.modules(), strict=True):
        if isinstance(mine, Metric):
            assert isinstance(theirs, Metric)
            states = itertools.cycle(list(theirs.metric_state.values()))
            mine.dist_sync_fn = lambda tensor, group=None, states=states: [tensor, next(states)]
            mine.distributed_available_fn = lambda: True
    return own.compute()


def texture(size, seed=0, smooth=16, channels=3):
    """Random colours that repeat at the border, uint8 (channels, size, size)."""
    spectrum = np.fft.rfft2(np.random.default_rng(seed).standard_normal((channels, size, size)))
    radius = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    waves = np.fft.irfft2(spectrum * np.exp(-((radius * smooth) ** 2)), s=(size, size))
    waves -= waves.min((1, 2), keepdims=True)
    return np.round(waves / waves.max((1, 2), keepdims=True) * 255).astype(np.uint8)


def moving(*places, size=128, axis=1, seed=0, smooth=16):
    """A texture that stands at the given places in pixels, (1, 3, T, size, size)."""
    picture = texture(size, seed, smooth)
    return torch.from_numpy(np.stack([np.roll(picture, place, axis=1 + axis) for place in places], axis=1))[None]
