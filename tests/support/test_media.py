# SPDX-License-Identifier: Apache-2.0
import os
import stat

import lightning.pytorch as L
import numpy as np
import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

from reco_lightning.data.video.clip import probe, read_clip
from reco_lightning.support import media
from reco_lightning.support.media import log_videos, video_grid, video_strip, write_video


@pytest.fixture
def clip():
    frames = np.zeros((6, 48, 64, 3), np.uint8)
    frames[:, :24] = (200, 40, 90)
    frames[:, 24:] = np.arange(6, dtype=np.uint8)[:, None, None, None] * 40
    return frames


@pytest.fixture
def written(clip, tmp_path):
    return [write_video(tmp_path / f"{name}.mp4", clip) for name in "ab"]


def test_what_is_written_is_what_is_read(clip, tmp_path):
    path = write_video(tmp_path / "new" / "é b.mp4", clip, fps=29.97)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.reader) == (6, 48, 64, "decord")
    assert info.fps == pytest.approx(29.97, abs=0.01)
    back = read_clip(path, start=0, frames=6, size=(48, 64))
    assert np.abs(back.astype(int) - clip)[:, 4:-4, 4:-4].mean() < 3
    assert [entry.name for entry in path.parent.iterdir()] == ["é b.mp4"]
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")  # plays before it is loaded


def test_odd_sides_are_padded_by_the_last_row_and_column(clip, tmp_path):
    path = write_video(tmp_path / "odd.mp4", clip[:, :47, :33])
    assert probe(path)[2:4] == (48, 34)
    assert read_clip(path, start=5, frames=1, size=(48, 34))[0, -1, -1].min() > 180


def test_a_failure_leaves_the_old_file_and_nothing_else(clip, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", clip)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(media, "_encode", fail)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, clip)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_is_as_readable_as_any_other(clip, tmp_path):
    (tmp_path / "other").touch()
    path = write_video(tmp_path / "a.mp4", clip)
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


@pytest.mark.parametrize(
    ("name", "change", "fps", "message"),
    [
        ("a.avi", lambda clip: clip, 8, r"path must end in \.mp4, got .*a\.avi"),
        ("a.mp4", lambda clip: clip / 255.0, 8, r"frames must be uint8 of shape \(T, H, W, 3\), got float64"),
        ("a.mp4", lambda clip: clip[0], 8, r"frames must be uint8 of shape .* got uint8 of shape \(48, 64, 3\)"),
        ("a.mp4", lambda clip: clip[:0], 8, r"frames must be uint8 .*to_uint8 converts"),
        ("a.mp4", lambda clip: clip, 0, "fps must be positive, got 0"),
    ],
)
def test_write_video_refuses(clip, tmp_path, name, change, fps, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / name, change(clip), fps=fps)


def test_grid_lays_clips_out_row_by_row():
    clips = np.stack([np.full((2, 3, 4, 1), number, np.uint8) for number in (1, 2, 3)])
    grid = video_grid(clips, 2)
    assert grid.shape == (2, 6, 8, 1)
    assert grid[1, ::3, ::4, 0].tolist() == [[1, 2], [3, 0]]
    with pytest.raises(ValueError, match="columns must be a whole number of 1 or more, got 0"):
        video_grid(clips, 0)
    with pytest.raises(ValueError, match=r"clips must be of shape .* got \(2, 3, 4, 1\)"):
        video_grid(clips[0], 2)


def test_strip_runs_from_the_first_frame_to_the_last():
    frames = np.stack([np.full((2, 2, 3), number, np.uint8) for number in range(17)])
    assert video_strip(frames, 5)[0, ::2, 0].tolist() == [0, 4, 8, 12, 16]
    assert video_strip(frames[:3]).shape == (2, 6, 3)
    with pytest.raises(ValueError, match="count must be a whole number of 1 or more, got 0"):
        video_strip(frames, 0)
    with pytest.raises(ValueError, match="frames must be of shape"):
        video_strip(frames[0])


def test_wandb_gets_the_files(written, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(WandbLogger, "log_video", lambda self, *given, **named: calls.append((given, named)))
    log_videos(WandbLogger(offline=True, save_dir=tmp_path), "val/samples", written, step=7)
    assert calls == [(("val/samples", [os.fspath(path) for path in written]), {"step": 7})]


def test_tensorboard_gets_a_strip_per_file(written, tmp_path, monkeypatch):
    logger = TensorBoardLogger(tmp_path)
    calls = []
    monkeypatch.setattr(logger.experiment, "add_image", lambda *given, **named: calls.append((*given, named)))
    log_videos([logger], "val/samples", written, 7)
    assert [(tag, image.shape, image.dtype, step, named) for tag, image, step, named in calls] == [
        (f"val/samples/{number}", (48, 6 * 64, 3), np.uint8, 7, {"dataformats": "HWC"}) for number in range(2)
    ]
    calls.clear()
    log_videos(logger, "val/samples", written[:1], 7)
    assert calls[0][0] == "val/samples"
    monkeypatch.undo()
    log_videos(logger, "val/samples", written, 7)
    logger.finalize("success")
    assert sum(path.stat().st_size for path in tmp_path.rglob("events.*")) > 500  # an empty one has 88


def test_a_trainers_loggers_are_served_and_others_leave_the_files(written, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(WandbLogger, "log_video", lambda self, *given, **named: calls.append(given))
    loggers = [CSVLogger(tmp_path), WandbLogger(offline=True, save_dir=tmp_path)]
    trainer = L.Trainer(accelerator="cpu", logger=loggers, default_root_dir=tmp_path, enable_progress_bar=False)
    log_videos(trainer, "samples", written, 0)
    assert len(calls) == 1
    log_videos(CSVLogger(tmp_path), "samples", written, 0)
    log_videos(None, "samples", written, 0)
    log_videos(trainer, "samples", [], 0)
    assert len(calls) == 1
    assert all(path.is_file() for path in written)


def test_a_video_that_was_not_written_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"paths must name written videos, got .*gone\.mp4"):
        log_videos([], "samples", [tmp_path / "gone.mp4"], 0)


def test_the_same_frames_make_the_same_file(tmp_path):
    block = np.random.default_rng(0).integers(0, 255, (6, 6, 3), dtype=np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    clip = np.stack([np.roll(block, 2 * number, axis=1) for number in range(40)])
    files = [write_video(tmp_path / f"{number}.mp4", clip).read_bytes() for number in range(4)]
    assert files[1:] == files[:1] * 3
