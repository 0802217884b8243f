# SPDX-License-Identifier: Apache-2.0
"""Writes clips as mp4, arranges them in grids and sends them to loggers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import lightning.pytorch as L
import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from reco_lightning.support.argument_checks import check_finite, check_int, check_path
from reco_lightning.support.atomic_write import atomic_write

__all__ = ["check_fps", "log_videos", "run_folder", "video_grid", "video_strip", "write_video"]

Pixels = npt.NDArray[np.uint8]


def write_video(path: str | os.PathLike[str], frames: Pixels, *, fps: float = 8.0) -> Path:
    """Writes frames as an H.264 mp4 that browsers and W&B play.

    The file appears under its name only when it is complete. Odd sides are padded by repeating the last row or column,
    since the pixel format needs even ones.

    Args:
        path: Where to; must end in `.mp4`. Missing folders are made.
        frames: uint8 (T, H, W, 3), RGB in 0..255.
        fps: Frames per second.

    Returns:
        The path written.

    Raises:
        ValueError: If `path`, `frames` or `fps` is not as described.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_video(Path(folder, "black.mp4"), np.zeros((4, 33, 48, 3), np.uint8)).name
        'black.mp4'
    """
    check_path(path=path)
    check_fps(fps)
    path = Path(path)
    frames = np.asarray(frames)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"path must end in .mp4, got {str(path)!r}")
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        found = f"{frames.dtype} of shape {tuple(frames.shape)}"
        raise ValueError(f"frames must be uint8 of shape (T, H, W, 3), got {found}; tokenizers.base.to_uint8 converts")
    even = np.pad(frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode="edge")
    with atomic_write(path) as part:
        _encode(part, even, Fraction(fps).limit_denominator(1001))
    return path


def check_fps(fps: float) -> None:
    """Raises unless an mp4 file can state the frame rate.

    Args:
        fps: Frames per second, 0.001 to 1000.

    Raises:
        ValueError: It is another.

    Example:
        >>> check_fps(0)
        Traceback (most recent call last):
        ValueError: fps must be positive, got 0
    """
    check_finite(fps=fps)
    if fps <= 0:
        raise ValueError(f"fps must be positive, got {fps}")
    if not 0.001 <= fps <= 1000:
        raise ValueError(f"fps must lie from 0.001 to 1000, got {fps}")


def video_grid(clips: Pixels, columns: int) -> Pixels:
    """Lays n clips out as one video, row by row; empty cells are black.

    Args:
        clips: uint8 (n, T, H, W, C).
        columns: Clips per row, at least 1.

    Returns:
        uint8 (T, rows * H, columns * W, C).

    Raises:
        ValueError: If `clips` has another rank or no clip, or `columns` is below 1.

    Example:
        >>> video_grid(np.zeros((5, 17, 32, 48, 3), np.uint8), 3).shape
        (17, 64, 144, 3)
    """
    clips = np.asarray(clips)
    if clips.ndim != 5 or len(clips) == 0:
        raise ValueError(f"clips must be of shape (n, T, H, W, C) with n at least 1, got {tuple(clips.shape)}")
    check_int(at_least=1, columns=columns)
    n, t, h, w, c = clips.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, t, h, w, c), clips.dtype)
    cells[:n] = clips
    grid = cells.reshape(rows, columns, t, h, w, c).transpose(2, 0, 3, 1, 4, 5)  # (T, rows, H, columns, W, C)
    return grid.reshape(t, rows * h, columns * w, c)


def video_strip(frames: Pixels, count: int = 8) -> Pixels:
    """Puts frames of one video side by side as a picture, evenly spaced from the first to the last.

    Args:
        frames: uint8 (T, H, W, C).
        count: How many frames to show; all of them where T is smaller.

    Returns:
        uint8 (H, min(count, T) * W, C).

    Raises:
        ValueError: If `frames` has another rank or no frame, or `count` is below 1.

    Example:
        >>> video_strip(np.zeros((17, 32, 48, 3), np.uint8)).shape
        (32, 384, 3)
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or len(frames) == 0:
        raise ValueError(f"frames must be of shape (T, H, W, C) with T at least 1, got {tuple(frames.shape)}")
    check_int(at_least=1, count=count)
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return np.concatenate(list(frames[chosen]), axis=1)


def run_folder(trainer: L.Trainer) -> str:
    """Returns the folder of this run alone: no other run writes there.

    The `log_dir` of a CSV or TensorBoard logger; with any other logger `<save_dir>/<name>/<version>`, where Lightning
    puts the checkpoints too; without one the trainer's `default_root_dir`. Not collective, unlike `trainer.log_dir`.

    Args:
        trainer: The trainer, its loggers set up.
    """
    if not trainer.loggers:
        return str(trainer.default_root_dir)
    logger = trainer.loggers[0]
    if isinstance(logger, (CSVLogger, TensorBoardLogger)):
        return str(logger.log_dir)
    version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
    return os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), version)


@rank_zero_only
def log_videos(
    trainer_or_loggers: L.Trainer | Logger | Iterable[Logger] | None,
    key: str,
    paths: Sequence[str | os.PathLike[str]],
    step: int,
) -> None:
    """Shows written videos in every logger that can show them; the files stay where they are for all others.

    W&B gets the files themselves, TensorBoard, whose own video call needs a package that no longer fits, a strip of
    frames per file. CSV and unknown loggers get nothing. Does nothing outside rank 0.

    Args:
        trainer_or_loggers: A Trainer, a logger or several loggers; None means no logger.
        key: Name under which they appear, for example `val/samples`.
        paths: Files as `write_video` writes them.
        step: Global step that they belong to.

    Raises:
        ValueError: If a file does not exist.

    Example:
        >>> log_videos([], "val/samples", [], step=10)
    """
    if not paths:
        return
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"paths must name written videos, got {os.fspath(path)!r}; write_video makes them")
    for logger in _loggers(trainer_or_loggers):
        if isinstance(logger, WandbLogger):
            logger.log_video(key, [os.fspath(path) for path in paths], step=step)
        elif isinstance(logger, TensorBoardLogger):
            for number, path in enumerate(paths):
                tag = key if len(paths) == 1 else f"{key}/{number}"
                logger.experiment.add_image(tag, video_strip(_all_frames(path)), step, dataformats="HWC")


def _loggers(source: L.Trainer | Logger | Iterable[Logger] | None) -> list[Logger]:
    if source is None:
        return []
    if isinstance(source, L.Trainer):
        return list(source.loggers)
    return [source] if isinstance(source, Logger) else list(source)


def _encode(path: Path, frames: Pixels, rate: Fraction) -> None:
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        # with mbtree, x264 does not write the same file twice from the same small frames
        options = {"crf": "18", "preset": "veryfast", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def _all_frames(path: str | os.PathLike[str]) -> Pixels:
    with av.open(os.fspath(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
