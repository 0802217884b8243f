# SPDX-License-Identifier: Apache-2.0
"""Extracts features of clips with random convolutions or a TorchScript network.

An extractor is any function from clips (B, 3, T, H, W) uint8 to features (B, D). `width` (D) and `weights` (a hash) are
read from it where it has them.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reco_lightning.metrics.protocols import FVDProtocol, fvd_protocol, resize_frames
from reco_lightning.support.argument_checks import check_int, check_path
from reco_lightning.support.fingerprint import fingerprint

__all__ = ["KNOWN_FILES", "FeatureExtractor", "RandomConvFeatures", "TorchScriptFeatures", "git_blob_id", "weights_id"]

#: Files of FVD networks by their git object id, which `git hash-object FILE` prints.
KNOWN_FILES = {
    "fa7df95674dbf3579e7fccd954e51e706b4734c1": "DeepMind's rgb_scratch",
    "2958652e0c9c48a65010c0ebda5c9cfd4edc7c18": "DeepMind's rgb_imagenet",
    "93daef59c7ae0e9e8f76225521407e60cbafa6aa": "i3d_torchscript.pt of StyleGAN-V",
    "a867b87ac3a9097d200598b1d48a1b890d8ec744": "i3d_pretrained_400.pt of VideoGPT",
}


@runtime_checkable
class FeatureExtractor(Protocol):
    """A function from clips to features. Anything callable is one; nothing needs to be inherited.

    Example:
        >>> isinstance(lambda clips: clips.float().mean((2, 3, 4)), FeatureExtractor)
        True
    """

    def __call__(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) uint8 to features (B, D)."""
        ...


def git_blob_id(path: str | os.PathLike[str]) -> str:
    """Returns the id that git gives to a file's content, by which a download can be compared with public repositories.

    Args:
        path: The file.

    Returns:
        40 hexadecimal digits.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "empty"
        >>> file.touch()
        >>> git_blob_id(file)
        'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    digest = hashlib.sha1(b"blob %d\0" % Path(path).stat().st_size, usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def weights_id(extractor: object) -> str:
    """Returns what identifies an extractor's weights: its attribute `weights`, or a hash of a module's tensors.

    Args:
        extractor: The extractor.

    Returns:
        A text; "unknown" for a function without either.

    Example:
        >>> weights_id(lambda clips: clips)
        'unknown'
    """
    named = getattr(extractor, "weights", None)
    if isinstance(named, str):
        return named
    digest = fingerprint(extractor)
    return f"sha256 {digest[:16]}" if digest else "unknown"


class RandomConvFeatures(nn.Module):
    """Features of a small 3-D convolutional network with fixed random weights; needs no download.

    Three layers of 3 x 3 x 3 convolution, rectified; mean over all places of the last. They see colour, texture and
    motion, and tell a better generator from a worse one on the same data, in a demo or a test. They are no features of
    I3D, and a distance between them is no FVD.

    Args:
        seed: Of the weights; another seed makes another measure.
        width: D, the number of features.

    Raises:
        ValueError: If width is not 1 or more.

    Example:
        >>> RandomConvFeatures()(torch.zeros(2, 3, 5, 16, 16, dtype=torch.uint8)).shape
        torch.Size([2, 32])
    """

    def __init__(self, *, seed: int = 0, width: int = 32) -> None:
        super().__init__()
        check_int(seed=seed)
        check_int(at_least=1, width=width)
        generator = torch.Generator().manual_seed(seed)
        self.width = width
        for number, (inside, outside) in enumerate(((3, 16), (16, 32), (32, width))):
            weight = torch.randn(outside, inside, 3, 3, 3, generator=generator) * (2 / (27 * inside)) ** 0.5
            self.register_buffer(f"layer_{number}", weight)

    @torch.no_grad()
    def forward(self, clips: Tensor) -> Tensor:
        """Maps clips (B, 3, T, H, W) uint8 to features (B, D) float32."""
        x = clips.float() / 127.5 - 1.0
        for weight in self.buffers():
            x = F.conv3d(x, weight, stride=(1, 2, 2), padding=1).relu()
        return x.mean((2, 3, 4))


class TorchScriptFeatures:
    """Features of a network in a TorchScript file: StyleGAN-V's `i3d_torchscript.pt`, or your own.

    StyleGAN-V's network has the switches `rescale`, `resize` and `return_features`. Where the protocol squashes frames,
    it gets the stored clips and resizes them itself, as in StyleGAN-V; otherwise they are resized before. A network
    without these switches gets the clips (B, 3, T, H, W) uint8 as they are, and returns (B, D).

    TorchScript is a program, and parts of it run when the file is read (`__setstate__`): give files only from a source
    that you trust.

    Args:
        path: The file.
        protocol: Name in `PROTOCOLS`, or a protocol; what it says of resizing is used, as told above.
        width: D.
        batch_size: Clips at a time, 1 or more.

    Raises:
        ValueError: If there is no such file, it is no TorchScript, an argument is out of its range, or the protocol
            asks StyleGAN-V's network for what it does not give.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        protocol: str | FVDProtocol = "styleganv",
        *,
        width: int = 400,
        batch_size: int = 8,
    ) -> None:
        check_path(path=path)
        check_int(at_least=1, width=width, batch_size=batch_size)
        if not Path(path).is_file():
            raise ValueError(f"path must be an existing TorchScript file, got {os.fspath(path)!r} (no such file)")
        self.path, self.protocol = os.fspath(path), fvd_protocol(protocol)
        self.width, self.batch_size = width, batch_size
        self.network = _load_script(self.path)
        names = {argument.name for argument in self.network.forward.schema.arguments}
        self.switches = {"rescale", "resize", "return_features"} <= names
        if self.switches and (self.protocol.output != "logits" or self.protocol.norm_epsilon != 1e-3):
            raise ValueError(
                "path must be a network that follows the protocol, got StyleGAN-V's, which gives logits with a "
                f"batch-norm epsilon of 0.001, for {self.protocol.describe()}; give weights, as load_i3d takes them"
            )
        blob = git_blob_id(path)
        self.weights = f"git {blob[:12]} ({KNOWN_FILES.get(blob, 'TorchScript of your own')})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.path, self.protocol, self.width, self.batch_size)

    def to(self, device: torch.device) -> TorchScriptFeatures:
        """Moves the network."""
        self.network.to(device)
        return self

    @torch.no_grad()
    def __call__(self, clips: Tensor) -> Tensor:
        """Clips (B, 3, T, H, W) uint8 to features (B, D) float32."""
        parts = clips.split(self.batch_size)
        if not clips.is_cuda:
            return torch.cat([self._features(part) for part in parts])
        with torch.jit.fuser("none"):  # the fuser compiles at run time, which fails where NVRTC is not found
            return torch.cat([self._features(part) for part in parts])

    def _features(self, clips: Tensor) -> Tensor:
        if not self.switches:
            return self.network(clips)
        inside, video = self.protocol.resize == "squash", clips.float()
        if not inside:
            video = resize_frames(video, self.protocol.resize) / 127.5 - 1.0
        return self.network(video, rescale=inside, resize=inside, return_features=True)


def _rebuild(path: str, protocol: FVDProtocol, width: int, batch_size: int) -> TorchScriptFeatures:
    return TorchScriptFeatures(path, protocol, width=width, batch_size=batch_size)


def _load_script(path: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # torch 2.13 advises torch.export, which reads other files
            return torch.jit.load(path, map_location="cpu").eval()
    except RuntimeError as error:
        raise ValueError(
            f"path must be a TorchScript file, got {path!r}; weights alone are loaded by load_i3d ({error})"
        ) from error
