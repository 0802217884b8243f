# SPDX-License-Identifier: Apache-2.0
"""Layers of a causal video network, and the encoder and decoder made of them.

All take and give (B, C, T, H, W).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "PATCH",
    "CausalConv3d",
    "FrameNorm",
    "ResidualBlock",
    "Unpatch",
    "build_decoder",
    "build_encoder",
    "unpatch",
]

PATCH = 4  # pixels per side, and frames, that the first layer takes at once


def unpatch(x: Tensor, *, time: int, space: int) -> Tensor:
    """Unfolds channels into frames and pixels; of the first latent frame only the last of its `time` frames is kept.

    Args:
        x: (B, time * space**2 * C, t, h, w).
        time: Frames per latent frame after the first.
        space: Pixels per cell along each side.

    Returns:
        (B, C, 1 + (t - 1) * time, h * space, w * space).

    Example:
        >>> import torch
        >>> unpatch(torch.zeros(1, 4 * 2 * 2 * 3, 5, 8, 8), time=4, space=2).shape
        torch.Size([1, 3, 17, 16, 16])
    """
    batch, channels, t, h, w = x.shape
    channels //= time * space * space
    x = x.view(batch, channels, time, space, space, t, h, w).permute(
        0, 1, 5, 2, 6, 3, 7, 4
    )  # (B, C, t, time, h, s, w, s)
    return x.reshape(batch, channels, t * time, h * space, w * space)[:, :, time - 1 :]


class CausalConv3d(nn.Conv3d):
    """3-D convolution that looks back in time only: missing past frames are copies of the first one.

    With a temporal kernel of at least the temporal stride, frame 0 of the output depends on frame 0 of the input alone,
    and 1 + k * stride frames become 1 + k.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        kernel: (time, space): kernel sizes; space is odd, or equal to the spatial stride (patches, no padding).
        stride: (time, space).

    Example:
        >>> import torch
        >>> CausalConv3d(3, 8, (4, 2), (4, 2))(torch.zeros(1, 3, 17, 16, 16)).shape
        torch.Size([1, 8, 5, 8, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: tuple[int, int], stride: tuple[int, int] = (1, 1)
    ) -> None:
        (time, space), (time_step, space_step) = kernel, stride
        padding = 0 if space == space_step else (space - 1) // 2
        super().__init__(
            in_channels,
            out_channels,
            (time, space, space),
            stride=(time_step, space_step, space_step),
            padding=(0, padding, padding),
        )
        self.past = time - 1

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to (B, C', 1 + (T - 1) / stride, H', W')."""
        if self.past:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.past, -1, -1), x], dim=2)
        return super().forward(x)


class FrameNorm(nn.GroupNorm):
    """Group normalisation of every frame by itself, so that statistics do not carry the future into the past."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        batch, channels, frames, height, width = x.shape
        x = x.transpose(1, 2).reshape(batch * frames, channels, height, width)
        return super().forward(x).view(batch, frames, channels, height, width).transpose(1, 2)


class ResidualBlock(nn.Module):
    """Normalisation, causal convolution, 1 x 1 convolution, added to the input; starts as the identity.

    Args:
        channels: C, a multiple of 8.
        time: Temporal kernel size; 1 looks at single frames.
    """

    def __init__(self, channels: int, time: int) -> None:
        super().__init__()
        self.norm = FrameNorm(8, channels)
        self.mix = CausalConv3d(channels, channels, (time, 3))
        self.out = CausalConv3d(channels, channels, (1, 1))
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)  # type: ignore[arg-type]  # nn.Conv3d types its bias as optional

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, T, H, W) to the same shape."""
        return x + self.out(F.silu(self.mix(F.silu(self.norm(x)))))


class Unpatch(nn.Module):
    """Causal convolution and `unpatch`: the way up in space, and in time.

    Args:
        in_channels: Channels in.
        out_channels: Channels out.
        time: Frames per latent frame after the first.
        space: Pixels per cell along each side.
        kernel: (time, space) of the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, time: int, space: int, kernel: tuple[int, int]) -> None:
        super().__init__()
        self.time, self.space = time, space
        self.conv = CausalConv3d(in_channels, out_channels * time * space * space, kernel)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, t, h, w) to (B, C', 1 + (t - 1) * time, h * space, w * space)."""
        return unpatch(self.conv(x), time=self.time, space=self.space)


def build_encoder(*, spatial_stride: int, width: int, depth: int, code_dim: int) -> nn.Sequential:
    """Builds the encoder: clips (B, 3, T, H, W) to features (B, code_dim, 1 + (T - 1) / 4, H / stride, W / stride).

    Time is shortened by the first layer, so that all others are cheap.

    Args:
        spatial_stride: 8 or 16.
        width: Channels of the first layer; they double whenever the grid is halved.
        depth: Residual blocks per resolution.
        code_dim: Channels of the features.
    """
    layers: list[nn.Module] = [CausalConv3d(3, width, (PATCH, PATCH), (PATCH, PATCH))]
    channels = width
    for _ in range(_halvings(spatial_stride)):
        layers += [ResidualBlock(channels, 1) for _ in range(depth)]
        layers += [CausalConv3d(channels, 2 * channels, (1, 3), (1, 2))]
        channels *= 2
    layers += [ResidualBlock(channels, 3) for _ in range(depth)]
    layers += [FrameNorm(8, channels), nn.SiLU(), CausalConv3d(channels, code_dim, (1, 1))]
    return nn.Sequential(*layers)


def build_decoder(*, spatial_stride: int, width: int, depth: int, code_dim: int) -> nn.Sequential:
    """Builds the way back of `build_encoder`; causal too, so that a clip can be decoded as far as its ids are known.

    Args:
        spatial_stride: 8 or 16.
        width: Channels of the last layer.
        depth: Residual blocks per resolution.
        code_dim: Channels of the features.
    """
    halvings = _halvings(spatial_stride)
    channels = width * 2**halvings
    layers: list[nn.Module] = [CausalConv3d(code_dim, channels, (1, 3))]
    layers += [ResidualBlock(channels, 3) for _ in range(depth)]
    for _ in range(halvings):
        layers += [Unpatch(channels, channels // 2, time=1, space=2, kernel=(1, 3))]
        channels //= 2
        layers += [ResidualBlock(channels, 1) for _ in range(depth)]
    layers += [FrameNorm(8, channels), nn.SiLU(), Unpatch(channels, 3, time=PATCH, space=PATCH, kernel=(3, 3))]
    return nn.Sequential(*layers)


def _halvings(spatial_stride: int) -> int:
    return int(math.log2(spatial_stride // PATCH))
