# SPDX-License-Identifier: Apache-2.0
"""The `VideoTokenizer` protocol, and the conversion between stored clips and its input range.

Sits between the video reader (uint8 clips) and the token shards (integer ids); the way back leads from ids to
uint8 clips.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from reco_lightning.support.argument_checks import check_int, check_tensor
from reco_lightning.support.fingerprint import fingerprint as fingerprint  # version 0.1 had it here

__all__ = ["ClipShape", "VideoTokenizer", "latent_grid", "to_uint8", "to_unit_range"]


class ClipShape(NamedTuple):
    """The clips that a tokenizer was trained on; a `VideoTokenizer` that knows it has it as `trained_on`.

    Attributes:
        frames: T.
        size: (H, W) in pixels.
        stride: Distance between two frames of a clip, in frames of the file.
    """

    frames: int
    size: tuple[int, int]
    stride: int = 1

    def __str__(self) -> str:
        return f"{self.frames} frames of {self.size[0]} x {self.size[1]} pixels at stride {self.stride}"


def to_unit_range(clips: Tensor) -> Tensor:
    """Turns stored clips into a tokenizer's input.

    Args:
        clips: uint8, (B, T, H, W, C), 0 to 255.

    Returns:
        float32, (B, C, T, H, W), -1 to 1; 0 becomes -1 and 255 becomes 1.

    Raises:
        ValueError: The dtype is not uint8 or there are not five dimensions.

    Example:
        >>> import torch
        >>> clips = torch.tensor([0, 255], dtype=torch.uint8).view(1, 2, 1, 1, 1)
        >>> to_unit_range(clips).flatten().tolist()
        [-1.0, 1.0]
    """
    check_tensor(clips=clips)
    if clips.dtype != torch.uint8 or clips.ndim != 5:
        raise ValueError(
            f"clips must be uint8 of shape (B, T, H, W, C), got {clips.dtype} of shape {tuple(clips.shape)}; "
            "clips already in [-1, 1] go to the tokenizer as they are"
        )
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_uint8(video: Tensor) -> Tensor:
    """Turns a tokenizer's output into clips to store or show; values outside [-1, 1] are clipped.

    Args:
        video: floating point, (B, C, T, H, W), nominally -1 to 1.

    Returns:
        uint8, (B, T, H, W, C), rounded to nearest.

    Raises:
        ValueError: The dtype is not floating point or there are not five dimensions.

    Example:
        >>> import torch
        >>> to_uint8(torch.tensor([-1.0, 0.0, 1.3]).view(1, 1, 3, 1, 1)).flatten().tolist()
        [0, 128, 255]
    """
    check_tensor(video=video)
    if not video.is_floating_point() or video.ndim != 5:
        raise ValueError(
            f"video must be floating point of shape (B, C, T, H, W), got {video.dtype} of shape "
            f"{tuple(video.shape)}; uint8 clips need no conversion"
        )
    pixels = (video.detach().float() + 1.0) * 127.5
    return pixels.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def latent_grid(
    frames: int, height: int, width: int, *, temporal_stride: int, spatial_stride: int
) -> tuple[int, int, int]:
    """Returns the shape (t, h, w) of the ids of a clip whose first frame is encoded alone.

    Args:
        frames: T, of the form 1 + k * temporal_stride.
        height: H in pixels, a multiple of spatial_stride.
        width: W in pixels, a multiple of spatial_stride.
        temporal_stride: Frames per latent frame after the first.
        spatial_stride: Pixels per latent cell, along each side.

    Returns:
        t = 1 + (frames - 1) / temporal_stride, h and w.

    Raises:
        ValueError: One of the three does not divide; the message names it and the nearest sizes that do.

    Example:
        >>> latent_grid(17, 64, 96, temporal_stride=4, spatial_stride=8)
        (5, 8, 12)
    """
    check_int(frames=frames, height=height, width=width)
    if frames < 1 or (frames - 1) % temporal_stride:
        low = 1 + max(frames - 1, 0) // temporal_stride * temporal_stride
        raise ValueError(
            f"frames must be 1 + a multiple of {temporal_stride} (the first frame is encoded alone), got {frames}; "
            f"use {low} or {low + temporal_stride}"
        )
    for name, size in (("height", height), ("width", width)):
        if size < spatial_stride or size % spatial_stride:
            low = max(size // spatial_stride * spatial_stride, spatial_stride)
            raise ValueError(
                f"{name} must be a multiple of {spatial_stride} pixels, got {size}; "
                f"resize or crop the clips to {low} or {low + spatial_stride}"
            )
    return 1 + (frames - 1) // temporal_stride, height // spatial_stride, width // spatial_stride


@runtime_checkable
class VideoTokenizer(Protocol):
    """A network that turns clips into integer ids and back.

    Anything with these members is one; nothing needs to be inherited. Shapes: B batch, T frames, H W pixels,
    (t, h, w) the grid of ids or N their number where they lie on none, V the codebook size.

    Attributes:
        codebook_size: V; ids lie in 0..V-1.
        temporal_stride: Frames per latent frame; of the later ones, where the first frame is encoded alone.
        spatial_stride: Pixels per id along each side.
        frame_aligned: True if ids lie on a (t, h, w) grid in time order, so that id blocks are blocks of frames. False
            if they are N ids of the whole clip, in no order of time.

    Example:
        >>> isinstance(object(), VideoTokenizer)
        False
    """

    codebook_size: int
    temporal_stride: int
    spatial_stride: int
    frame_aligned: bool

    def grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """Returns the shape, (t, h, w) or (N,), of the ids of a clip of T frames, H x W; else a ValueError."""
        ...

    def encode(self, video: Tensor) -> Tensor:
        """Encodes clips (B, 3, T, H, W), floating point in [-1, 1], to ids int64, (B, t, h, w) or (B, N)."""
        ...

    def decode(self, ids: Tensor, *, clamp: bool = False) -> Tensor:
        """Decodes ids (B, t, h, w) or (B, N) to clips (B, 3, T, H, W) on the [-1, 1] scale; `clamp` clips them."""
        ...
