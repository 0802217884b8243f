# SPDX-License-Identifier: Apache-2.0
"""Farnebäck's flow on textures that move by known amounts."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import pytest
import torch

from reco_lightning.metrics.optical_flow import (
    FARNEBACK,
    IntervalOpticalFlow,
    flow_magnitude,
    interval_optical_flow,
    mean_flow,
)
from tests.helpers.metrics import joined, moving, texture


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shift", [1, 3, 6, 12])
def test_known_shifts(shift, axis):
    found = interval_optical_flow(moving(0, shift, size=192, axis=axis), (1,))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(shift, rel=0.03 + 0.02 * shift / 6)


def test_diagonal_shifts_have_their_euclidean_length():
    picture = texture(192)[0]
    assert flow_magnitude(picture, np.roll(picture, (3, 4), (0, 1))) == pytest.approx(5, rel=0.05)


def test_flow_grows_with_the_distance_and_the_readings_differ():
    steady = interval_optical_flow(moving(0, 1, 2, 3, 4), (1, 2, 4))
    assert steady[0].tolist() == pytest.approx([1, 2, 4], rel=0.05)
    faster = moving(0, 1, 4)
    assert interval_optical_flow(faster, (1, 2))[0].tolist() == pytest.approx([(1 + 3) / 2, 4], rel=0.05)
    first = interval_optical_flow(faster, (1, 2), pairs="from_first")
    assert first[0].tolist() == pytest.approx([1, 4], rel=0.05)


def test_grey_is_that_of_red_green_and_blue_in_this_order():
    video = moving(0, 2, size=64)
    video[:, 2] = moving(3, 0, size=64, seed=5)[:, 2]  # blue moves the other way
    weights = np.array([0.299, 0.587, 0.114])

    def flow(weights):
        grey = np.round(np.tensordot(weights, video[0].numpy(), 1)).astype(np.uint8)  # (T, H, W)
        field = cv2.calcOpticalFlowFarneback(grey[0], grey[1], None, 0.5, 3, 15, 3, 5, 1.2, 0)
        return np.sqrt((field.astype(float) ** 2).sum(-1)).mean()

    found = interval_optical_flow(video, (1,)).item()
    assert found == pytest.approx(flow(weights), rel=0.01)
    assert abs(found - flow(weights[::-1])) > 0.05 * found


def test_settings_are_those_of_the_protocol():
    assert list(FARNEBACK.values()) == [0.5, 3, 15, 3, 5, 1.2, 0]


def test_mean_flow_is_that_of_adjacent_frames_and_scales_with_the_size():
    # fine enough to keep structure when it is enlarged
    videos = torch.cat([moving(*places, smooth=6) for places in ((0, 2, 4), (0, 0, 0), (0, 1, 4))])
    found = mean_flow(videos)
    assert found.tolist() == pytest.approx([2, 0, 2], rel=0.05, abs=0.01)
    assert mean_flow(videos, size=(256, 256)).tolist() == pytest.approx([4, 0, 4], rel=0.02, abs=0.01)
    assert mean_flow(videos, size=(64, 64)).tolist() == pytest.approx([1, 0, 1], rel=0.02, abs=0.01)
    assert mean_flow(videos, size=(128, 128)).tolist() == found.tolist()
    assert mean_flow(videos, size=(128, 256))[0].item() == pytest.approx(4, rel=0.02)  # height before width


def test_the_metric_is_the_mean_over_videos_and_two_processes_agree():
    real, made = torch.cat([moving(0, 1, 2), moving(0, 2, 4, seed=1)]), moving(0, 3, 6, seed=2)
    one, first, second = (IntervalOpticalFlow((1, 2)) for _ in range(3))
    one.update(real, real=True)
    one.update(made, real=False)
    found = one.compute()
    assert found["real"].tolist() == pytest.approx([1.5, 3], rel=0.05)
    assert found["gap"].tolist() == pytest.approx([1.5, 3], rel=0.15)
    torch.testing.assert_close(found["real"], interval_optical_flow(real, (1, 2)).mean(0))
    first.update(real[:1], real=True)
    second.update(real[1:], real=True)
    second.update(made, real=False)
    together = joined(first, second)
    assert all(torch.allclose(together[name], found[name], rtol=1e-12) for name in found)
    assert one.record()["clips"] == first.record()["clips"] == {"real": 2, "generated": 1}
    assert one.record()["size"] == [128, 128]


def test_a_frozen_video_has_no_flow_and_the_real_curve_stands_beside_it():
    metric = IntervalOpticalFlow((1, 2))
    metric.update(moving(0, 1, 2), real=True)
    metric.update(moving(0, 0, 0), real=False)
    assert metric.compute()["generated"].tolist() == pytest.approx([0, 0], abs=0.01)
    _, ax = metric.plot()
    assert [line.get_label() for line in ax.lines] == ["real data", "generated"]
    assert "(pixels)" in ax.get_ylabel()


def test_without_opencv_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        ModuleNotFoundError, match=r'Optical flow needs OpenCV: pip install "reco_lightning\[metrics\]"'
    ):
        IntervalOpticalFlow()
    with pytest.raises(ModuleNotFoundError, match="needs OpenCV"):
        mean_flow(moving(0, 1))


def test_too_short_a_video_is_refused():
    with pytest.raises(ValueError, match="intervals must lie from 1 to 0 for clips of 1 frames, got 1"):
        mean_flow(moving(0))
    with pytest.raises(ValueError, match="videos must be uint8"):
        interval_optical_flow(moving(0, 1).float(), (1,))
