# SPDX-License-Identifier: Apache-2.0
"""CLIP score: how well frames match their caption (arXiv 2604.07402, Table 5).

Measures decoded text-to-video samples. Weights come from a local folder; neither torchvision nor Pillow is needed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.metrics.interval import check_videos
from reco_lightning.support.argument_checks import check_int, check_path
from reco_lightning.support.fingerprint import fingerprint
from reco_lightning.support.plots import frame_scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["CLIP", "CLIPScore", "PictureTextEncoder", "clip_pixels", "clip_score"]

# Mean and deviation of the pictures that OpenAI's networks were trained on.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_PICTURES = 64  # at a time; 64 of 224 x 224 take about 2 GB in ViT-L


class PictureTextEncoder(Protocol):
    """The network that CLIPScore needs: vectors of pictures and of texts, in one space."""

    @property
    def weights_hash(self) -> str:
        """Names the weights beside a number."""
        ...

    def pictures(self, frames: Tensor, device: torch.device) -> Tensor:
        """Returns the vectors of frames uint8 (n, 3, H, W), (n, D) on ``device``."""
        ...

    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Returns the vectors of n texts, (n, D) on ``device``."""
        ...


def clip_pixels(frames: Tensor, size: int, *, mean: Sequence[float] = _MEAN, std: Sequence[float] = _STD) -> Tensor:
    """Brings pictures into the form that CLIP sees: short side to ``size`` (bicubic), centre crop, normalised.

    Args:
        frames: uint8, (n, 3, H, W), 0 to 255.
        size: Side in pixels.
        mean: Of each channel, for values of 0 to 1.
        std: Of each channel.

    Returns:
        float32, (n, 3, size, size); within one grey level of what Pillow's bicubic resizing gives.

    Example:
        >>> clip_pixels(torch.zeros(2, 3, 30, 40, dtype=torch.uint8), 24).shape
        torch.Size([2, 3, 24, 24])
    """
    height, width = frames.shape[-2:]
    short = min(height, width)
    shape = (size * height // short, size * width // short)
    pixels = frames.float()
    for step in ((height, shape[1]), shape):  # Pillow's order: columns, then rows, each rounded to whole levels
        if pixels.shape[-2:] != step:
            pixels = F.interpolate(pixels, step, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = (shape[0] - size) // 2, (shape[1] - size) // 2
    pixels = pixels[:, :, top : top + size, left : left + size] / 255
    return (pixels - pixels.new_tensor(mean).view(3, 1, 1)) / pixels.new_tensor(std).view(3, 1, 1)


class CLIP:
    """A CLIP network of transformers, from a local folder.

    No ``nn.Module``: held by a metric or a LightningModule, its weights enter no checkpoint.

    Args:
        folder: Where ``CLIPModel`` and ``CLIPTokenizer`` were saved: config.json, weights, tokenizer files. Mean and
            deviation are taken from its preprocessor_config.json, or are OpenAI's.

    Raises:
        ValueError: If the folder holds no CLIP network or no tokenizer.
        ModuleNotFoundError: If transformers is missing.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        check_path(folder=folder)
        try:
            from transformers import CLIPModel, CLIPTokenizer
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError('CLIPScore needs transformers: pip install "reco_lightning[hf]"') from error
        config = Path(folder, "config.json")
        kind = json.loads(config.read_text(encoding="utf-8")).get("model_type") if config.is_file() else None
        if kind != "clip":
            found = f"one of type {kind!r}" if kind else "no config.json"
            raise ValueError(
                f"folder must hold a CLIP network of transformers, got {os.fspath(folder)!r} with {found}; "
                "download one, such as openai/clip-vit-base-patch32, and give its folder"
            )
        if not any(Path(folder, name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise ValueError(
                f"folder must hold CLIP's tokenizer beside its weights, got {os.fspath(folder)!r} without "
                "tokenizer.json and vocab.json"
            )
        self.network = CLIPModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
        self.tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        self.mean, self.std = _normalisation(Path(folder, "preprocessor_config.json"))
        self._hash = ""

    @property
    def weights_hash(self) -> str:
        """SHA-256 of the weights, 64 hexadecimal digits."""
        self._hash = self._hash or fingerprint(self.network)
        return self._hash

    @torch.no_grad()
    def pictures(self, frames: Tensor, device: torch.device) -> Tensor:
        """Returns the vectors of pictures.

        Args:
            frames: uint8, (n, 3, H, W), 0 to 255.
            device: Where to compute.

        Returns:
            float32, (n, D) on ``device``.
        """
        network = self.network.to(device)
        size = network.config.vision_config.image_size
        parts = []
        for part in frames.split(_PICTURES):
            pixels = clip_pixels(part.to(device), size, mean=self.mean, std=self.std)
            parts.append(network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output))
        return torch.cat(parts)

    @torch.no_grad()
    def texts(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Returns the vectors of texts; what is longer than the network takes (77 tokens in OpenAI's) is cut off.

        Args:
            texts: n texts.
            device: Where to compute.

        Returns:
            float32, (n, D) on ``device``.
        """
        network = self.network.to(device)
        longest = network.config.text_config.max_position_embeddings
        ids = self.tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        states = network.text_model(
            input_ids=ids["input_ids"].to(device), attention_mask=ids["attention_mask"].to(device)
        )
        return network.text_projection(states.pooler_output)


def clip_score(videos: Tensor, texts: Sequence[str], encoder: PictureTextEncoder, *, frames: int) -> Tensor:
    r"""Returns the cosine between a video's frames and its text.

    .. math:: S_{b,f} = \frac{I(x_{b,f}) \cdot T(c_b)}{\lVert I(x_{b,f}) \rVert \, \lVert T(c_b) \rVert}

    Args:
        videos: uint8, (B, 3, T, H, W), 0 to 255.
        texts: The text of each video, B of them.
        encoder: The network, such as ``CLIP``.
        frames: F, how many frames of each video are scored, evenly spaced from the first to the last; 1 to T.

    Returns:
        Cosines, -1 to 1, (B, F) float64 on the videos' device.

    Raises:
        ValueError: If an argument is not as described.
    """
    check_videos(videos)
    _check_encoder(encoder)
    listed = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
    if isinstance(texts, str) or not listed or len(texts) != len(videos):
        found = "one string" if isinstance(texts, str) else f"{len(texts)}" if listed else repr(texts)
        raise ValueError(f"texts must be a list of one text for each of {len(videos)} videos, got {found}")
    check_int(frames=frames)
    length = videos.shape[2]
    if not 1 <= frames <= length:
        raise ValueError(f"frames must lie from 1 to {length}, the length of the videos, got {frames}")
    places = torch.linspace(0, length - 1, frames, dtype=torch.float64).round().long()
    chosen = videos[:, :, places.to(videos.device)].transpose(1, 2)  # (B, F, 3, H, W)
    images = encoder.pictures(chosen.flatten(0, 1), videos.device).double().unflatten(0, (-1, frames))  # (B, F, D)
    words = encoder.texts(texts, videos.device).double()[:, None]  # (B, 1, D)
    return F.cosine_similarity(images, words, dim=-1)


def _check_encoder(encoder: object) -> None:
    if not callable(getattr(encoder, "pictures", None)):
        raise ValueError(f"encoder must be a folder with CLIP or have the methods of CLIP, got {encoder!r}")


class CLIPScore(Metric):
    r"""Mean cosine between the frames of generated videos and the texts they were made from, and the same by frame.

    :math:`S = \frac{1}{BF} \sum_{b,f} S_{b,f}` with ``clip_score``. Some report a hundred times this.

    - ``update(videos, texts)``: uint8 (B, 3, T, H, W) and B texts.
    - ``compute()``: ``score`` () and ``frame`` (F,), float64, -1 to 1; one frame alone is ().

    Args:
        encoder: Folder of a CLIP network, as in ``CLIP``, or any ``PictureTextEncoder``.
        frames: F, how many frames of each video are scored, evenly spaced from the first to the last.
        kwargs: Arguments of ``torchmetrics.Metric``.

    Raises:
        ValueError: If an argument is not as described.
        ModuleNotFoundError: If transformers is missing and a folder was given.

    Example:
        >>> class Sizes:  # vectors of what a picture and a text consist of
        ...     weights_hash = ""
        ...     def pictures(self, frames, device):
        ...         return frames.float().mean((2, 3))
        ...     def texts(self, texts, device):
        ...         return torch.tensor([["r" in t, "g" in t, "b" in t] for t in texts], dtype=torch.float)
        >>> metric = CLIPScore(Sizes(), frames=2)
        >>> videos = torch.zeros(1, 3, 4, 8, 8, dtype=torch.uint8)
        >>> videos[:, 0, 2:] = 255
        >>> videos[:, 1, :2] = 255
        >>> metric.update(videos, ["r"])
        >>> metric.compute()["frame"].tolist()
        [0.0, 1.0]
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    totals: Tensor
    count: Tensor

    def __init__(
        self, encoder: str | os.PathLike[str] | PictureTextEncoder, *, frames: int = 17, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        check_int(at_least=1, frames=frames)
        self.frames = frames
        self.encoder = CLIP(encoder) if isinstance(encoder, (str, os.PathLike)) else encoder
        _check_encoder(self.encoder)
        self.add_state("totals", torch.zeros(frames, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    @override
    def update(self, videos: Tensor, texts: Sequence[str]) -> None:
        """Adds videos.

        Args:
            videos: uint8, (B, 3, T, H, W), 0 to 255.
            texts: The text of each video, B of them.

        Raises:
            ValueError: If they are not as described, or shorter than the number of frames that are scored.
        """
        scores = clip_score(videos.to(self.totals.device), texts, self.encoder, frames=self.frames)
        self.totals = self.totals + scores.sum(0)
        self.count = self.count + len(videos)

    @override
    def compute(self) -> dict[str, Tensor]:
        """Means over the videos.

        Returns:
            ``score`` () and ``frame`` (F,), float64, -1 to 1.
        """
        frame = self.totals / self.count
        return {"score": frame.mean(), "frame": frame}

    def record(self) -> dict[str, Any]:
        """Returns the score, and everything without which it means nothing; JSON values."""
        value = {name: line.tolist() for name, line in self.compute().items()}
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            clips = int(self.count)
        about = {"clips": {"generated": clips}, "frames": self.frames, "weights": self.encoder.weights_hash}
        return {"metric": type(self).__name__, "value": value} | about

    @override
    def plot(self, val: Mapping[str, Tensor] | None = None, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draws the score against the frame's place in the video.

        Args:
            val: What ``compute`` returned; None computes.
            ax: Axes to draw into; None makes a figure.

        Returns:
            The figure and its axes.
        """
        val = self.compute() if val is None else val
        name = f"generated (mean {float(val['score']):.4f})"
        return frame_scores({name: val["frame"].reshape(-1).tolist()}, y_label="CLIP score (cosine)", ax=ax)


def _normalisation(path: Path) -> tuple[Sequence[float], Sequence[float]]:
    if not path.is_file():
        return _MEAN, _STD
    settings = json.loads(path.read_text(encoding="utf-8"))
    return settings.get("image_mean", _MEAN), settings.get("image_std", _STD)
