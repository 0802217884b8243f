# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance against closed forms and against values of independent implementations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from reco_lightning.metrics.features import RandomConvFeatures
from reco_lightning.metrics.frechet import (
    FrechetVideoDistance,
    frechet_distance,
    frechet_gaussians,
    frechet_video_distance,
)
from reco_lightning.metrics.moments import Moments
from reco_lightning.metrics.protocols import PROTOCOLS, FVDProtocol, check_clips, fvd_protocol, resize_frames

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "fvd" / "frechet.json").read_text())
MINE = FVDProtocol("mine", frames=9, clips=64)


def gaussians(kind, width):
    """Two normal distributions whose distance is known: means and covariances."""
    draw = np.random.default_rng(0)
    zero, eye = np.zeros(width), np.eye(width)
    quarter = width // 4
    if kind == "2x2":
        return zero, np.array([[2.0, 1], [1, 2]]), np.array([1.0, 0]), np.diag([1.0, 3])
    if kind == "identical":
        root = draw.standard_normal((width, width))
        return zero, root @ root.T / width, zero, root @ root.T / width
    if kind == "mean_shift":
        return zero, eye, np.full(width, 0.5), eye
    if kind == "iso_scale":
        return zero, eye, zero, 4 * eye
    if kind == "diag":
        return zero, np.diag(np.linspace(0.1, 3, width)), zero, np.diag(np.linspace(2, 0.5, width))
    turn, mean = None, zero
    if kind == "illcond":
        turn, _ = np.linalg.qr(draw.standard_normal((width, width)))
        a, b = np.logspace(-8, 2, width), np.logspace(2, -8, width)
    elif kind == "commuting":
        turn, _ = np.linalg.qr(draw.standard_normal((width, width)))
        a, b = draw.uniform(0.1, 3, width), draw.uniform(0.1, 3, width)
        mean = draw.standard_normal(width) * 0.1
    else:
        turn, _ = np.linalg.qr(draw.standard_normal((width, width)))
        a, b = np.zeros(width), np.zeros(width)
        if kind == "rank_def":
            a[:quarter], b[:quarter] = draw.uniform(0.5, 2, quarter), draw.uniform(0.5, 2, quarter)
        else:
            a[:quarter], b[quarter : 2 * quarter] = 1, 2
    return zero, turn * a @ turn.T, mean, turn * b @ turn.T


@pytest.mark.parametrize("row", REFERENCE["analytic"], ids=lambda row: f"{row['case']}-{row['D']}")
def test_closed_forms(row):
    found = frechet_gaussians(*map(torch.from_numpy, gaussians(row["case"], row["D"])))
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(row["analytic"], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("row", REFERENCE["golden"], ids=lambda row: f"{row['N1']}x{row['N2']}x{row['D']}")
@pytest.mark.parametrize("ddof", [0, 1])
def test_features_of_seeds(row, ddof):
    draw = np.random.default_rng(row["seed"])
    x = draw.standard_normal((row["N1"], row["D"])).astype(np.float32)
    y = (1.5 * draw.standard_normal((row["N2"], row["D"])) + 0.25).astype(np.float32)
    found = frechet_distance(torch.from_numpy(x), torch.from_numpy(y), ddof=ddof)
    assert found.item() == pytest.approx(row[f"fd_ddof{ddof}"], rel=1e-4)


def test_bias_of_few_clips():
    (row,) = REFERENCE["same_distribution"]
    found = {0: [], 1: []}
    for seed in range(3):
        draw = np.random.default_rng(seed)
        x, y = (torch.from_numpy(draw.standard_normal((row["N"], 400))) for _ in range(2))
        for ddof, values in found.items():
            values.append(frechet_distance(x, y, ddof=ddof).item())
    assert np.mean(found[1]) == pytest.approx(row["unbiased_cov"], rel=1e-4)
    assert np.mean(found[0]) == pytest.approx(row["biased_cov"], rel=1e-4)


class Means(torch.nn.Module):
    """Mean of each frame's colours: few features, of clips of five dimensions."""

    width = num_features = 9 * 3

    def forward(self, clips):
        return clips.float().mean((3, 4)).flatten(1)


def clips_of(count, *, seed=0, frames=9, size=8, dark=1):
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, frames, size, size), dtype=torch.uint8, generator=draw) // dark


def test_metric_equals_that_of_torchmetrics():
    real, generated = clips_of(60), clips_of(48, seed=1, dark=2)
    oracle = FrechetInceptionDistance(feature=Means(), input_img_size=(3, 9, 8, 8))
    ours = FrechetVideoDistance(Means(), MINE)
    for part in real.split(25):
        oracle.update(part, real=True)
        ours.update(part, real=True)
    for part in generated.split(13):
        oracle.update(part, real=False)
        ours.update(part, real=False)
    assert ours.compute().item() == pytest.approx(oracle.compute().item(), rel=1e-5)
    assert ours.compute().item() == pytest.approx(frechet_video_distance(real, generated, Means(), MINE).item())


def test_covariance_follows_the_protocol():
    real, generated = clips_of(32), clips_of(32, seed=1, dark=2)
    by_n, less_one = (
        frechet_video_distance(real, generated, Means(), FVDProtocol("x", frames=9, ddof=ddof)).item()
        for ddof in (0, 1)
    )
    shift = (Moments.of(Means()(real)).mean - Moments.of(Means()(generated)).mean).square().sum().item()
    assert (by_n - shift) * 32 / 31 == pytest.approx(less_one - shift)  # the traces scale, the means do not


def test_protocols_of_the_literature():
    table = {
        name: (p.frames, p.clips, p.resize, p.output, p.ddof, p.norm_epsilon, p.place) for name, p in PROTOCOLS.items()
    }
    assert table == {
        "styleganv": (16, 2048, "squash", "logits", 0, 1e-3, "first"),
        "tats": (16, 2048, "squash", "logits", 1, 1e-5, "first"),
        "omnitokenizer": (17, 2048, "short_side_crop", "logits", 1, 1e-5, "centre"),
        "larp": (16, 10_000, "squash", "logits", 0, 1e-3, "first"),
    }
    assert fvd_protocol("tats") is PROTOCOLS["tats"]


def test_frames_of_the_centre():
    longer = torch.arange(40).view(1, 1, 40, 1, 1)
    assert PROTOCOLS["omnitokenizer"].cut(longer).flatten().tolist() == list(range(12, 29))
    assert PROTOCOLS["larp"].cut(longer).flatten().tolist() == list(range(16))
    assert PROTOCOLS["omnitokenizer"].cut(longer[:, :, :17]).flatten().tolist() == list(range(17))
    with pytest.raises(ValueError, match="17 frames or more, got 16; leave out shorter videos"):
        PROTOCOLS["omnitokenizer"].cut(longer[:, :, :16])


def test_resizing():
    ramp = torch.arange(8.0).view(1, 1, 1, 1, 8).expand(1, 1, 2, 4, 8)
    squashed = resize_frames(ramp, "squash", 4)
    assert squashed[0, 0, 1, 2].tolist() == [0.5, 2.5, 4.5, 6.5]  # halfway between two pixels, no antialiasing
    cropped = resize_frames(ramp, "short_side_crop", 4)
    assert cropped[0, 0, 1, 2].tolist() == [2, 3, 4, 5]
    tall = resize_frames(ramp.transpose(3, 4), "short_side_crop", 4)
    assert tall[0, 0, 1, :, 2].tolist() == [2, 3, 4, 5]
    doubled = resize_frames(ramp[..., :4, :4], "squash", 8)
    assert doubled[0, 0, 0, 0].tolist() == [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]  # borders repeated
    assert resize_frames(torch.zeros(2, 3, 5, 30, 50), "short_side_crop", 16).shape == (2, 3, 5, 16, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 8}, r"frames must be a whole number of 9 or more, got 8"),
        ({"frames": 9, "resize": "crop"}, r"resize must be one of 'squash', 'short_side_crop', got 'crop'"),
        ({"frames": 9, "output": "pool"}, r"output must be one of 'logits', 'features', got 'pool'"),
        ({"frames": 9, "ddof": 2}, r"ddof must be one of 0, 1, got 2"),
        ({"frames": 9, "place": "last"}, r"place must be one of 'first', 'centre', got 'last'"),
    ],
)
def test_protocols_that_are_none(options, message):
    with pytest.raises(ValueError, match=message):
        FVDProtocol("x", **options)


def test_unknown_protocol():
    with pytest.raises(ValueError, match=r"one of styleganv, tats, omnitokenizer, larp, or an FVDProtocol .*'fvd'"):
        fvd_protocol("fvd")


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (torch.zeros(1, 3, 9, 8, 8), r"uint8 of shape \(B, 3, T, H, W\), got torch.float32 of shape \(1, 3, 9, 8, 8\)"),
        (torch.zeros(1, 9, 8, 8, 3, dtype=torch.uint8), r"got torch.uint8 of shape \(1, 9, 8, 8, 3\); .*permute"),
        (torch.zeros(3, 9, 8, 8, dtype=torch.uint8), r"got torch.uint8 of shape \(3, 9, 8, 8\)"),
        (torch.zeros(1, 3, 10, 8, 8, dtype=torch.uint8), r"must have 9 frames, got 10"),
    ],
)
def test_clips_that_are_none(clips, message):
    with pytest.raises(ValueError, match=message):
        check_clips(clips, 9)


@pytest.mark.parametrize(
    ("real", "generated", "message"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 4), r"\(N, D\) and \(M, D\), got \(3, 2\) and \(3, 4\)"),
        (torch.zeros(3), torch.zeros(3), r"got \(3,\) and \(3,\)"),
        (torch.zeros(3, 2), torch.full((3, 2), torch.nan), r"finite, got NaN or infinity"),
        (torch.zeros(1, 2), torch.zeros(3, 2), r"a covariance needs 2 clips or more, got 1"),
    ],
)
def test_features_that_are_none(real, generated, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(real, generated)


def test_random_features_are_the_same_everywhere():
    clips = clips_of(2)
    one, again, other = RandomConvFeatures(), RandomConvFeatures(), RandomConvFeatures(seed=1)
    torch.manual_seed(123)
    assert torch.equal(one(clips), again(clips))
    assert not torch.equal(one(clips), other(clips))
    assert not torch.equal(one(clips), one(clips.flip(2)))  # the order of frames counts
    with pytest.raises(ValueError, match="width must be a whole number of 1 or more, got 0"):
        RandomConvFeatures(width=0)
