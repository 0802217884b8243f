# SPDX-License-Identifier: Apache-2.0
"""Checks the input of other libraries' tokenizers before they fail or drop frames."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import Tensor

from reco_lightning.support.argument_checks import check_int, check_tensor

__all__ = ["block_grid", "check_ids", "check_loaded", "check_video"]


def block_grid(
    frames: int, height: int, width: int, *, frame_multiple: int, temporal_stride: int, spatial_stride: int
) -> tuple[int, int, int]:
    """Returns the shape (t, h, w) of the ids of a clip in whole blocks of frames, the first frame not alone.

    Args:
        frames: T, a multiple of frame_multiple.
        height: H in pixels, a multiple of spatial_stride.
        width: W in pixels, a multiple of spatial_stride.
        frame_multiple: Frames that are encoded or decoded together.
        temporal_stride: Frames per latent frame.
        spatial_stride: Pixels per id along each side.

    Returns:
        t = frames / temporal_stride, h and w.

    Raises:
        ValueError: One of the three does not divide; the message names it and the nearest sizes that do.

    Example:
        >>> block_grid(16, 64, 96, frame_multiple=4, temporal_stride=4, spatial_stride=8)
        (4, 8, 12)
    """
    check_int(frames=frames, height=height, width=width)
    for name, size, multiple, unit, remedy in (
        ("frames", frames, frame_multiple, "", "take clips of"),
        ("height", height, spatial_stride, " pixels", "resize or crop the clips to"),
        ("width", width, spatial_stride, " pixels", "resize or crop the clips to"),
    ):
        if size < multiple or size % multiple:
            low = max(size // multiple * multiple, multiple)
            near = f"{low} or {low + multiple}" if size > multiple else str(low)
            raise ValueError(f"{name} must be a multiple of {multiple}{unit}, got {size}; {remedy} {near}")
    return frames // temporal_stride, height // spatial_stride, width // spatial_stride


def check_video(video: Tensor) -> None:
    """Raises unless the video is a batch of clips in [-1, 1].

    Args:
        video: To be floating point, (B, 3, T, H, W).

    Raises:
        ValueError: It is not.

    Example:
        >>> import torch
        >>> check_video(torch.zeros(1, 3, 4, 16, 16))
    """
    check_tensor(video=video)
    if video.ndim != 5 or video.shape[1] != 3 or not video.is_floating_point():
        raise ValueError(
            f"video must be floating point of shape (B, 3, T, H, W) in [-1, 1], got {video.dtype} of shape "
            f"{tuple(video.shape)}; to_unit_range makes it from uint8 clips"
        )


def check_ids(ids: Tensor, codebook_size: int) -> None:
    """Raises unless the ids are a batch of grids.

    Args:
        ids: To be integers, (B, t, h, w), 0 to codebook_size - 1.
        codebook_size: V.

    Raises:
        ValueError: The shape, dtype or range does not fit.

    Example:
        >>> import torch
        >>> check_ids(torch.tensor([[[[0, 7]]]]), 8)
    """
    check_tensor(ids=ids)
    if ids.ndim != 4 or ids.is_floating_point() or ids.numel() == 0:
        raise ValueError(
            f"ids must be integers of shape (B, t, h, w), got {ids.dtype} of shape {tuple(ids.shape)}; "
            "flat ids (B, N) need .view(B, *grid)"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= codebook_size:
        raise ValueError(
            f"ids must be 0 to {codebook_size - 1}, got {low} to {high}; were they made by another tokenizer?"
        )


def check_loaded(found: Mapping[str, Iterable[object]], folder: str | os.PathLike[str]) -> None:
    """Raises unless all weights of a network were read, each into its place.

    Args:
        found: What ``from_pretrained`` of transformers and diffusers returns for ``output_loading_info=True``.
        folder: What was read.

    Raises:
        ValueError: Weights are missing, left over or of other shapes.

    Example:
        >>> check_loaded({"missing_keys": set(), "error_msgs": []}, "emu3")
    """
    wrong = {name: sorted(map(str, keys)) for name, keys in found.items() if keys and name.endswith("_keys")}
    if wrong:
        raise ValueError(f"folder {os.fspath(folder)!r} holds other weights than its config.json says: {wrong}")
