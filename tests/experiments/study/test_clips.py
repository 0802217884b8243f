# SPDX-License-Identifier: Apache-2.0
"""Real clips: the split by time, tokens kept in the folder, and one tokenizer for all runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from reco_lightning.data.video.clip import probe
from reco_lightning.experiments.demo.clips import find_sample_videos
from reco_lightning.experiments.study import clips
from reco_lightning.experiments.study.clips import ClipSource, frames_of
from reco_lightning.experiments.study.data_spec import LONGEST_REAL, DataSpec
from reco_lightning.experiments.study.settings import Settings

SETTINGS = Settings(tokenizer_steps=2)


def views() -> list[np.ndarray]:
    """Two views of 60 frames; the brightness of a frame is its number."""
    noise = np.random.default_rng(0).integers(0, 60, size=(2, 1, 32, 32, 3))
    return list((noise + 3 * np.arange(60)[:, None, None, None]).astype(np.uint8))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClipSource:
    monkeypatch.setattr(clips, "read_views", views)
    return ClipSource(DataSpec("clips", blocks=3), seed=0, folder=tmp_path, settings=SETTINGS)


def test_the_parts_share_no_frame() -> None:
    numbered = [np.arange(60, dtype=np.uint8)[:, None, None, None]]
    train = clips._clips(numbered, frames_of(3), held_out=False)
    held_out = clips._clips(numbered, frames_of(3), held_out=True)
    assert {len(clip) for clip in (*train, *held_out)} == {9}
    assert [int(clip[0].item()) for clip in train] == list(range(0, 28, 2))
    assert [int(clip[0].item()) for clip in held_out] == list(range(36, 52))
    assert {int(frame) for clip in train for frame in clip.flatten()} == set(range(35))
    assert {int(frame) for clip in held_out for frame in clip.flatten()} == set(range(36, 60))


def test_tokens_are_those_of_the_tokenizer_in_a_new_order_in_each_pass(made: ClipSource, tmp_path: Path) -> None:
    assert made.grid == (3, 4, 4)
    everything = np.load(tmp_path / "clips-2-steps" / "tokens-3-train.npy")
    assert everything.shape == (28, 48)
    first, second = made.batch(0, 28), made.batch(28, 56)
    assert not np.array_equal(first, second)
    for one in (first, second):
        assert sorted(row.tobytes() for row in one) == sorted(row.tobytes() for row in everything)
    video = torch.from_numpy(views()[0][:9])[None].permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.inference_mode():
        assert np.array_equal(everything[0], made._tokenizer.encode(video).flatten().numpy())
    assert made.held_out(5, 4).shape == (5, 64)
    assert made.pixels(made.known(2, 4)).shape == (2, 13, 64)


def test_the_tokenizer_is_trained_once_for_a_folder(
    made: ClipSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clips, "_train_tokenizer", lambda *args, **kwargs: pytest.fail("it was trained again"))
    monkeypatch.setattr(clips, "read_views", lambda: pytest.fail("the videos were read again"))
    again = ClipSource(DataSpec("clips", blocks=3, clips=7), seed=0, folder=tmp_path, settings=SETTINGS)
    assert len({row.tobytes() for row in again.batch(0, 70)}) <= 7
    same = [torch.equal(a, b) for a, b in zip(made._tokenizer.parameters(), again._tokenizer.parameters(), strict=True)]
    assert all(same)
    with pytest.raises(ValueError, match="clips must be at most 28, all that there are, or None for these, got 29"):
        ClipSource(DataSpec("clips", blocks=3, clips=29), seed=0, folder=tmp_path, settings=SETTINGS)


def test_clips_longer_than_the_videos_are_named(made: ClipSource) -> None:
    with pytest.raises(ValueError, match=r"blocks must be at most 6 for real clips, .* 24 frames, got 7, .* 25 frames"):
        made.held_out(4, 7)


def test_the_longest_clips_are_those_that_the_shortest_demo_video_has() -> None:
    (shortest,) = (path for path in find_sample_videos() if path.stem == "carphone_pristine")
    frames = probe(shortest).frames
    held_out = frames - round(frames * (1 - clips._HELD_OUT))
    assert frames_of(LONGEST_REAL) <= held_out < frames_of(LONGEST_REAL + 1)
