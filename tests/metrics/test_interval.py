# SPDX-License-Identifier: Apache-2.0
"""PSNR by distance against hand-computed cases and torchmetrics; what all interval metrics refuse and share."""

from __future__ import annotations

import json
import math
import pickle

import pytest
import torch
from matplotlib.figure import Figure
from torchmetrics.functional.image import peak_signal_noise_ratio

from reco_lightning.metrics.interval import IntervalPSNR, check_videos, frame_pairs, interval_psnr
from reco_lightning.support.plots import interval_curves
from tests.helpers.metrics import joined


def flat(*levels, size=4):
    """A video of one grey level a frame, (1, 3, T, size, size)."""
    column = torch.tensor(levels, dtype=torch.uint8).view(1, 1, -1, 1, 1)
    return column.expand(1, 3, -1, size, size).contiguous()


def noise(count, frames=5, size=8, seed=0):
    return torch.randint(
        256, (count, 3, frames, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def decibels(difference):
    return 20 * math.log10(255 / difference)


def test_hand_computed_in_both_readings():
    video = flat(0, 10, 40, 41)
    found = interval_psnr(video, (1, 2, 3))
    assert found.dtype == torch.float64
    one = (decibels(10) + decibels(30) + decibels(1)) / 3  # decibels are averaged, not errors
    two = (decibels(40) + decibels(31)) / 2
    assert found[0].tolist() == pytest.approx([one, two, decibels(41)], abs=1e-12)
    first = interval_psnr(video, (1, 2, 3), pairs="from_first")
    assert first[0].tolist() == pytest.approx([decibels(10), decibels(40), decibels(41)], abs=1e-12)


def test_equal_frames_count_as_100_decibels_and_opposite_ones_as_0():
    assert interval_psnr(flat(7, 7), (1,)).item() == 100
    assert interval_psnr(flat(0, 255, size=600), (1,)).item() == 0  # more than 32 bits of squared error
    assert interval_psnr(flat(255, 0), (1,)).item() == 0  # unsigned numbers do not wrap around


def test_one_wrong_pixel_is_averaged_over_channels_and_pixels():
    video = flat(0, 0)
    video[0, 1, 1, 2, 3] = 48
    assert interval_psnr(video, (1,)).item() == pytest.approx(decibels(math.sqrt(48**2 / 48)))


def test_every_pair_against_torchmetrics():
    videos = noise(2)
    for interval in (1, 2, 3, 4):
        for pairs in ("all", "from_first"):
            expected = [
                [
                    peak_signal_noise_ratio(v[:, s].double(), v[:, t].double(), data_range=255.0).item()
                    for s, t in frame_pairs(5, interval, pairs)
                ]
                for v in videos
            ]
            found = interval_psnr(videos, (interval,), pairs=pairs)
            torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64).mean(1, keepdim=True))


def test_pairs():
    assert frame_pairs(17, 16, "all") == [(0, 16)]
    assert frame_pairs(4, 1, "all") == [(0, 1), (1, 2), (2, 3)]
    assert frame_pairs(4, 3, "from_first") == [(0, 3)]


@pytest.mark.parametrize("pairs", ["all", "from_first"])
def test_the_metric_is_the_mean_over_videos_however_they_come(pairs):
    real, made = noise(3, seed=1), noise(5, seed=2) // 2
    metric = IntervalPSNR((1, 3), pairs=pairs)
    for part in made.split(2):
        metric.update(part, real=False)
    with torch.inference_mode():
        metric.update(real, real=True)
    metric.update(made[:0].new_zeros(1, 3, 5, 8, 8), real=True)
    found = metric.compute()
    still = torch.full((1, 2), 100.0, dtype=torch.float64)
    expected = torch.cat([interval_psnr(real, (1, 3), pairs=pairs), still]).mean(0)
    torch.testing.assert_close(found["real"], expected)
    torch.testing.assert_close(found["generated"], interval_psnr(made, (1, 3), pairs=pairs).mean(0))
    assert torch.equal(found["gap"], found["generated"] - found["real"])
    record = metric.record()
    assert record["value"]["gap"] == found["gap"].tolist()
    assert json.loads(json.dumps(record)) == record
    del record["value"]
    assert record == {"metric": "IntervalPSNR", "clips": {"real": 4, "generated": 5}} | {
        "intervals": [1, 3],
        "pairs": pairs,
        "frames": 5,
        "size": [8, 8],
    }
    metric.reset()
    assert metric.counts.tolist() == [0, 0]
    assert metric.shape.tolist() == [0, 0, 0]


def test_two_processes_give_what_one_gives():
    real, made = noise(4, seed=1), noise(3, seed=2) // 2
    one, first, second = (IntervalPSNR((1, 2)) for _ in range(3))
    one.update(real, real=True)
    one.update(made, real=False)
    first.update(real, real=True)  # the other process has none
    first.update(made[:1], real=False)
    second.update(made[1:], real=False)
    expected = one.compute()
    for metrics in ((first, second), (second.clone(), first.clone())):
        found = joined(*metrics)
        assert metrics[0].record() == one.record() | {"value": metrics[0].record()["value"]}
        assert all(found[name].dtype == torch.float64 for name in expected)
        assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in expected)


def test_states_stay_float64_and_out_of_checkpoints():
    metric = IntervalPSNR((1,)).half()
    metric.update(noise(2), real=True)
    copy = pickle.loads(pickle.dumps(metric))
    assert copy.totals.dtype == torch.float64
    assert torch.equal(copy.totals, metric.totals)
    assert not metric.state_dict()


def test_both_curves_are_drawn_with_units():
    metric = IntervalPSNR((1, 2, 4))
    metric.update(flat(0, 10, 20, 30, 40), real=True)
    metric.update(flat(0, 5, 10, 15, 20), real=False)
    fig, ax = metric.plot()
    assert fig is ax.figure
    assert [line.get_label() for line in ax.lines] == ["real data", "generated"]
    assert list(ax.lines[0].get_xdata()) == [1, 2, 4]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([decibels(10), decibels(20), decibels(40)])
    assert "(dB)" in ax.get_ylabel()
    assert ax.get_xlabel() == "distance from source to target frame (frames)"
    assert list(ax.get_xticks()) == [1, 2, 4]
    one = IntervalPSNR((1,))
    for real in (True, False):
        one.update(flat(0, 10), real=real)
    assert len(one.plot()[1].lines[0].get_xdata()) == 1
    own = Figure().subplots()
    assert metric.plot(metric.compute(), own)[1] is own


def test_no_figure_without_the_real_curve():
    with pytest.raises(ValueError, match=r"curves must hold 'real data' and have one value for each of 2 intervals"):
        interval_curves([1, 2], {"ReCo": [30.0, 20.0]}, y_label="PSNR (dB)")
    with pytest.raises(ValueError, match=r"got lengths \{'real data': 2, 'ReCo': 1\}; without the real data's curve"):
        interval_curves([1, 2], {"real data": [30.0, 20.0], "ReCo": [30.0]}, y_label="PSNR (dB)")


def test_one_kind_alone_is_refused():
    metric = IntervalPSNR((1,))
    metric.update(noise(2), real=False)
    with pytest.raises(ValueError, match="IntervalPSNR needs videos of both kinds, got 0 real and 2 generated; call"):
        metric.compute()


@pytest.mark.parametrize(
    "videos",
    [noise(1).float(), noise(1)[0], noise(1)[:, :1], noise(1).permute(0, 2, 3, 4, 1), noise(1)[:0]],
    ids=["float", "one video", "grey", "channels last", "none"],
)
def test_what_is_no_video_is_refused(videos):
    with pytest.raises(ValueError, match=r"videos must be uint8 of shape \(B, 3, T, H, W\), got .*to_uint8"):
        check_videos(videos)
    metric = IntervalPSNR((1,))
    with pytest.raises(ValueError, match="videos must be uint8"):
        metric.update(videos, real=True)
    assert metric.counts[0] == 0


def test_refusals():
    with pytest.raises(ValueError, match=r"intervals must be whole numbers of 1 or more, rising, got \[2, 1\]"):
        IntervalPSNR((2, 1))
    with pytest.raises(ValueError, match=r"intervals must be whole numbers .* got \[\]"):
        IntervalPSNR(())
    with pytest.raises(ValueError, match="intervals must lie from 1 to 1 for clips of 2 frames, got 0"):
        IntervalPSNR((0, 1))
    with pytest.raises(ValueError, match="pairs must be one of 'all', 'from_first', got 'both'"):
        IntervalPSNR((1,), pairs="both")
    with pytest.raises(ValueError, match="intervals must lie from 1 to 4 for clips of 5 frames, got 8; give shorter"):
        IntervalPSNR().update(noise(1), real=True)
    metric = IntervalPSNR((1,))
    metric.update(noise(1), real=True)
    with pytest.raises(ValueError, match=r"same \(T, H, W\), here \(5, 8, 8\), got \(5, 16, 16\)"):
        metric.update(noise(1, size=16), real=False)
