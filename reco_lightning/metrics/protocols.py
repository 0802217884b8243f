# SPDX-License-Identifier: Apache-2.0
"""The protocols under which papers report the Fréchet video distance; numbers of two protocols cannot be compared.

A protocol says how many frames a clip has, how it is resized for Inception-I3D, what is read from the network and how
the covariance is normalised. The names are those of the projects whose evaluation code was read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from reco_lightning.support.argument_checks import (
    check_choice,
    check_finite,
    check_int,
    check_str,
    check_tensor,
)

__all__ = ["PROTOCOLS", "FVDProtocol", "check_clips", "fvd_protocol", "resize_frames"]

#: Height and width that Inception-I3D takes, in pixels.
I3D_SIZE = 224


@dataclass(frozen=True)
class FVDProtocol:
    """The protocol by which a Fréchet video distance is measured.

    Args:
        name: What tables call it.
        frames: Frames of a clip, T, 9 or more: with fewer, Inception-I3D has nothing to pool.
        clips: Clips of each kind, N, that the protocol measures; printed beside the N that was measured.
        resize: How frames become 224 x 224 pixels: "squash" ignores the aspect ratio, "short_side_crop" resizes the
            short side and crops the centre. Both bilinear, without antialiasing.
        output: "logits", the 400 class scores before the softmax, or "features", the 1024 pooled values before them;
            both averaged over time.
        ddof: 1 divides the covariance by N - 1, 0 by N.
        norm_epsilon: Epsilon of batch normalisation: 1e-3 in DeepMind's network and in StyleGAN-V's TorchScript copy,
            1e-5 in VideoGPT's copy, which TATS and OmniTokenizer took over.
        place: Which frames of a longer video: "first" or "centre".

    Raises:
        ValueError: If an argument is none of those.

    Example:
        >>> FVDProtocol("mine", frames=16, clips=256).describe()
        'mine (16 frames, 256 clips, squash to 224, logits, covariance / (N - 1), batch-norm epsilon 0.001)'
    """

    name: str
    frames: int
    clips: int = 2048
    resize: Literal["squash", "short_side_crop"] = "squash"
    output: Literal["logits", "features"] = "logits"
    ddof: int = 1
    norm_epsilon: float = 1e-3
    place: Literal["first", "centre"] = "first"

    def __post_init__(self) -> None:
        check_str(name=self.name)
        check_int(at_least=9, frames=self.frames)  # Inception-I3D pools over nine
        check_int(at_least=1, clips=self.clips)
        check_int(ddof=self.ddof)  # True would pass as a choice
        check_finite(above=0, norm_epsilon=self.norm_epsilon)
        check_choice(("squash", "short_side_crop"), resize=self.resize)
        check_choice(("logits", "features"), output=self.output)
        check_choice((0, 1), ddof=self.ddof)
        check_choice(("first", "centre"), place=self.place)

    def cut(self, clips: Tensor) -> Tensor:
        """Returns the frames that the protocol measures, of longer videos.

        Args:
            clips: (B, C, T, H, W), T no less than `frames`.

        Returns:
            (B, C, `frames`, H, W).

        Raises:
            ValueError: If the videos are too short; protocols drop those.

        Example:
            >>> import torch
            >>> clips = torch.arange(20).view(1, 1, 20, 1, 1)
            >>> PROTOCOLS["omnitokenizer"].cut(clips).flatten().tolist()
            [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
        """
        length = clips.shape[2]
        if length < self.frames:
            raise ValueError(f"clips must have {self.frames} frames or more, got {length}; leave out shorter videos")
        start = length // 2 - self.frames // 2 if self.place == "centre" else 0
        return clips[:, :, start : start + self.frames]

    def describe(self) -> str:
        """Returns the protocol in one line."""
        where = " of the centre" if self.place == "centre" else ""
        divisor = "N" if self.ddof == 0 else "(N - 1)"
        return (
            f"{self.name} ({self.frames} frames{where}, {self.clips} clips, {self.resize} to {I3D_SIZE}, "
            f"{self.output}, covariance / {divisor}, batch-norm epsilon {self.norm_epsilon:g})"
        )


#: The protocols of the literature, by name.
PROTOCOLS: Mapping[str, FVDProtocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            FVDProtocol("styleganv", frames=16, ddof=0),
            FVDProtocol("tats", frames=16, norm_epsilon=1e-5),
            FVDProtocol("omnitokenizer", frames=17, resize="short_side_crop", norm_epsilon=1e-5, place="centre"),
            FVDProtocol("larp", frames=16, clips=10_000, ddof=0),
        )
    }
)


def fvd_protocol(protocol: str | FVDProtocol) -> FVDProtocol:
    """Returns a protocol by its name; one of your own passes unchanged.

    Args:
        protocol: A name in `PROTOCOLS`, or a protocol.

    Raises:
        ValueError: If there is no protocol of that name.

    Example:
        >>> fvd_protocol("omnitokenizer").frames
        17
    """
    if isinstance(protocol, FVDProtocol):
        return protocol
    if not isinstance(protocol, str) or protocol not in PROTOCOLS:
        raise ValueError(
            f"protocol must be one of {', '.join(PROTOCOLS)}, or an FVDProtocol of your own, got {protocol!r}"
        )
    return PROTOCOLS[protocol]


def resize_frames(video: Tensor, how: str, size: int = I3D_SIZE) -> Tensor:
    """Resizes every frame to a square, bilinearly, without antialiasing.

    Args:
        video: Floating point, (B, C, T, H, W).
        how: "squash" or "short_side_crop", as in `FVDProtocol`.
        size: Side of the square in pixels.

    Returns:
        (B, C, T, size, size).

    Example:
        >>> import torch
        >>> resize_frames(torch.zeros(1, 3, 2, 48, 64), "short_side_crop", 24).shape
        torch.Size([1, 3, 2, 24, 24])
    """
    height, width = video.shape[-2:]
    target = (size, size)
    if how == "short_side_crop":
        scale = size / min(height, width)
        target = (math.ceil(height * scale), size) if width <= height else (size, math.ceil(width * scale))
    if target != (height, width):
        frames = video.transpose(1, 2).flatten(0, 1)  # (B * T, C, H, W)
        frames = F.interpolate(frames, size=target, mode="bilinear", align_corners=False)
        video = frames.unflatten(0, (video.shape[0], video.shape[2])).transpose(1, 2)  # (B, C, T, H', W')
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return video[..., top : top + size, left : left + size]


def check_clips(clips: Tensor, frames: int | None = None) -> None:
    """Raises unless the clips are a batch as it is stored.

    Args:
        clips: To be uint8, (B, 3, T, H, W), 0 to 255.
        frames: T, or None for any.

    Raises:
        ValueError: If they are not.

    Example:
        >>> import torch
        >>> check_clips(torch.zeros(2, 3, 16, 8, 8, dtype=torch.uint8), frames=16)
    """
    check_tensor(clips=clips)
    if clips.dtype != torch.uint8 or clips.ndim != 5 or clips.shape[1] != 3:
        raise ValueError(
            f"clips must be uint8 of shape (B, 3, T, H, W), got {clips.dtype} of shape {tuple(clips.shape)}; stored "
            "clips (B, T, H, W, 3) need .permute(0, 4, 1, 2, 3), a tokenizer's output needs to_uint8 before that"
        )
    if frames is not None and clips.shape[2] != frames:
        raise ValueError(
            f"clips must have {frames} frames, got {clips.shape[2]}: the distance depends on the number of frames, and "
            "another one cannot be compared; cut longer videos, leave out shorter ones"
        )
