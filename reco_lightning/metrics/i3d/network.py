# SPDX-License-Identifier: Apache-2.0
"""Inception-I3D (Carreira and Zisserman, arXiv 1705.07750), the network behind the Fréchet video distance.

Its tensors have the names of the public PyTorch copies, so that `i3d_pretrained_400.pt` loads unchanged; DeepMind's own
TensorFlow checkpoint is turned into such a file by `convert_i3d`. Only evaluation: no dropout, running statistics.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_lightning.metrics.features import KNOWN_FILES, git_blob_id
from reco_lightning.metrics.protocols import FVDProtocol, fvd_protocol, resize_frames
from reco_lightning.support.argument_checks import check_finite, check_int, check_path
from reco_lightning.support.fingerprint import fingerprint

__all__ = ["I3DFeatures", "InceptionI3D", "load_i3d", "same_padding"]

Size = tuple[int, int, int]

#: Channels of the six convolutions of each mixed layer: b0, b1a, b1b, b2a, b2b, b3b.
MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
# Pooling before a mixed layer: kernel and stride.
_POOLS: dict[str, tuple[Size, Size]] = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


def same_padding(sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int]) -> list[int]:
    """Returns the zeros that TensorFlow's padding "SAME" puts around a volume: what is odd goes to the end.

    Args:
        sizes: Length along each axis, (T, H, W).
        kernel: Kernel along each axis.
        stride: Stride along each axis.

    Returns:
        Zeros before and after, from the last axis to the first, as `torch.nn.functional.pad` takes them.

    Example:
        >>> same_padding((17, 224, 224), (7, 7, 7), (2, 2, 2))
        [2, 3, 2, 3, 3, 3]
    """
    pad = []
    for size, k, s in zip(reversed(sizes), reversed(kernel), reversed(stride), strict=True):
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pad += [total // 2, total - total // 2]
    return pad


class _Unit(nn.Module):
    """Convolution with "SAME" padding, then batch normalisation and rectification where `norm` is set."""

    def __init__(self, inside: int, outside: int, kernel: int, *, stride: int = 1, norm: float | None) -> None:
        super().__init__()
        self.conv3d = nn.Conv3d(inside, outside, kernel, stride, bias=norm is None)
        self.bn = nn.BatchNorm3d(outside, eps=norm) if norm is not None else None

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv3d
        x = conv(F.pad(x, same_padding(x.shape[2:], conv.kernel_size, conv.stride)))
        return x if self.bn is None else self.bn(x).relu_()


class _Mixed(nn.Module):
    """Four branches side by side, as in Inception-v1."""

    def __init__(self, inside: int, channels: Sequence[int], norm: float) -> None:
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = channels
        self.b0 = _Unit(inside, b0, 1, norm=norm)
        self.b1a = _Unit(inside, b1a, 1, norm=norm)
        self.b1b = _Unit(b1a, b1b, 3, norm=norm)
        self.b2a = _Unit(inside, b2a, 1, norm=norm)
        self.b2b = _Unit(b2a, b2b, 3, norm=norm)
        self.b3b = _Unit(inside, b3b, 1, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        pooled = _pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class InceptionI3D(nn.Module):
    """Inception-I3D on colour frames, with 400 classes.

    Args:
        norm_epsilon: Epsilon of batch normalisation; 1e-3 in DeepMind's network, 1e-5 in VideoGPT's copy. The
            scale of batch normalisation is 1 there: their checkpoints have none.

    Example:
        >>> sum(p.numel() for p in InceptionI3D().parameters())
        12697264
    """

    def __init__(self, *, norm_epsilon: float = 1e-3) -> None:
        super().__init__()
        check_finite(above=0, norm_epsilon=norm_epsilon)
        norm = norm_epsilon
        self.Conv3d_1a_7x7 = _Unit(3, 64, 7, stride=2, norm=norm)
        self.Conv3d_2b_1x1 = _Unit(64, 64, 1, norm=norm)
        self.Conv3d_2c_3x3 = _Unit(64, 192, 3, norm=norm)
        inside = 192
        for name, channels in MIXED.items():
            self.add_module(name, _Mixed(inside, channels, norm))
            inside = channels[0] + channels[2] + channels[4] + channels[5]
        self.logits = _Unit(inside, 400, 1, norm=None)
        self.eval().requires_grad_(False)

    def features(self, video: Tensor) -> Tensor:
        """Returns what the last layer sees, before its average over time.

        Args:
            video: Floating point in [-1, 1], (B, 3, T, 224, 224), T 9 or more.

        Returns:
            (B, 1024, t, 1, 1), t = T / 8 rounded up, less 1.

        Raises:
            ValueError: If the video is too short or of another size.
        """
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] < 9 or video.shape[3:] != (224, 224):
            raise ValueError(f"video must be of shape (B, 3, T, 224, 224) with T 9 or more, got {tuple(video.shape)}")
        x = _pool(self.Conv3d_1a_7x7(video), (1, 3, 3), (1, 2, 2))
        x = self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x))
        for name in MIXED:
            if name in _POOLS:
                x = _pool(x, *_POOLS[name])
            x = self.get_submodule(name)(x)
        return F.avg_pool3d(x, (2, 7, 7), stride=1)  # (B, 1024, t, 1, 1)

    def forward(self, video: Tensor, *, output: str = "logits") -> Tensor:
        """Scores or features of clips, averaged over time.

        Args:
            video: Floating point in [-1, 1], (B, 3, T, 224, 224), T 9 or more.
            output: "logits" or "features".

        Returns:
            (B, 400) scores before the softmax, or (B, 1024).
        """
        x = self.features(video)
        if output == "logits":
            x = self.logits(x)
        return x.mean((2, 3, 4))


class I3DFeatures(nn.Module):
    """Features of clips by Inception-I3D, resized and read out as a protocol says.

    Args:
        network: The network, with the protocol's epsilon.
        protocol: Name in `PROTOCOLS`, or a protocol.
        weights: What identifies the network's weights; None hashes them.
        batch_size: Clips at a time, 1 or more.

    Raises:
        ValueError: If batch_size is out of its range, or the network's epsilon is not the protocol's.
    """

    def __init__(
        self,
        network: InceptionI3D,
        protocol: str | FVDProtocol = "styleganv",
        *,
        weights: str | None = None,
        batch_size: int = 8,
    ) -> None:
        super().__init__()
        check_int(at_least=1, batch_size=batch_size)
        if not isinstance(network, InceptionI3D):
            raise ValueError(f"network must be an InceptionI3D, got a {type(network).__name__}")
        self.protocol = fvd_protocol(protocol)
        epsilon = network.get_submodule("Conv3d_1a_7x7.bn").eps
        if epsilon != self.protocol.norm_epsilon:
            raise ValueError(
                f"network must have the batch-norm epsilon {self.protocol.norm_epsilon:g} of the protocol "
                f"{self.protocol.name}, got {epsilon}; build it with norm_epsilon={self.protocol.norm_epsilon:g}"
            )
        self.network = network
        self.batch_size = batch_size
        self.width = 400 if self.protocol.output == "logits" else 1024
        self.weights = weights or f"sha256 {fingerprint(network)[:16]}"
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Maps clips (B, 3, T, H, W) uint8 to features (B, D) float32."""
        return torch.cat([self._features(part) for part in clips.split(self.batch_size)])

    def _features(self, clips: Tensor) -> Tensor:
        video = resize_frames(clips.float(), self.protocol.resize) / 127.5 - 1.0
        return self.network(video, output=self.protocol.output)


def load_i3d(
    path: str | os.PathLike[str], protocol: str | FVDProtocol = "styleganv", *, batch_size: int = 8
) -> I3DFeatures:
    """Loads Inception-I3D from the file that `convert_i3d` wrote, or from `i3d_pretrained_400.pt`.

    Args:
        path: The file; no code in it is run.
        protocol: Name in `PROTOCOLS`, or a protocol.
        batch_size: Clips at a time.

    Returns:
        The extractor, on the CPU.

    Raises:
        ValueError: If there is no such file, or its tensors are not those of the network; the message names them.

    Example:
        >>> load_i3d("nowhere.pt")
        Traceback (most recent call last):
            ...
        ValueError: path must be an existing file of Inception-I3D weights, got 'nowhere.pt' (no such file); ...
    """
    check_path(path=path)
    check_int(at_least=1, batch_size=batch_size)
    protocol, name = fvd_protocol(protocol), os.fspath(path)
    if not Path(path).is_file():
        raise ValueError(
            f"path must be an existing file of Inception-I3D weights, got {name!r} (no such file); reco convert-i3d "
            "makes one"
        )
    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle fail in many ways
        raise ValueError(f"path must be a file of Inception-I3D weights, got {name!r}: {error}") from error
    stored = stored if isinstance(stored, dict) else {}
    source = stored.get("source")
    tensors = stored.get("weights", stored)
    network = InceptionI3D(norm_epsilon=protocol.norm_epsilon)
    wanted = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    found = {key: tuple(value.shape) for key, value in tensors.items() if isinstance(value, Tensor)}
    if wanted != found:
        missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        other = [
            f"{key} {found[key]} for {wanted[key]}" for key in wanted if found.get(key, wanted[key]) != wanted[key]
        ]
        raise ValueError(
            f"path must hold the {len(wanted)} tensors of Inception-I3D with 400 classes, got {name!r} with "
            f"{len(missing)} missing {missing[:3]}, {len(foreign)} unknown {foreign[:3]}, {len(other)} of other shapes "
            f"{other[:3]}; convert DeepMind's rgb_scratch with reco convert-i3d"
        )
    network.load_state_dict(tensors)
    for key, value in network.named_buffers():
        if key.endswith("num_batches_tracked"):
            value.zero_()  # unused, and the same weights are to have the same hash
    if source is None:
        blob = git_blob_id(path)
        source = f"git {blob[:12]} ({KNOWN_FILES.get(blob, 'unknown file')})"
    weights = f"sha256 {fingerprint(network)[:16]}, from {source}"
    return I3DFeatures(network, protocol, weights=weights, batch_size=batch_size)


def _pool(x: Tensor, kernel: Size, stride: Size) -> Tensor:
    # zeros are as good as minus infinity: what is pooled is rectified
    return F.max_pool3d(F.pad(x, same_padding(x.shape[2:], kernel, stride)), kernel, stride)
