# SPDX-License-Identifier: Apache-2.0
"""The Fréchet video distance (Unterthiner et al., arXiv 1812.01717), by named protocols.

Features of real and of generated clips are each taken for a normal distribution; the distance is that of the two.
"""

from __future__ import annotations

import os
import zipfile
from typing import Any, Literal

import torch
from torch import Tensor

from reco_lightning.metrics.features import (
    KNOWN_FILES,
    FeatureExtractor,
    RandomConvFeatures,
    TorchScriptFeatures,
    git_blob_id,
)
from reco_lightning.metrics.i3d.network import load_i3d
from reco_lightning.metrics.moments import Moments
from reco_lightning.metrics.moments_metric import MomentMetric
from reco_lightning.metrics.protocols import FVDProtocol, check_clips, fvd_protocol
from reco_lightning.support.argument_checks import check_int, check_path, check_tensor

__all__ = [
    "FrechetVideoDistance",
    "RandomFeatureDistance",
    "frechet_distance",
    "frechet_from_moments",
    "frechet_gaussians",
    "frechet_video_distance",
    "fvd_extractor",
]


def frechet_gaussians(mean_1: Tensor, covariance_1: Tensor, mean_2: Tensor, covariance_2: Tensor) -> Tensor:
    r"""Returns the squared Fréchet distance of two normal distributions.

    .. math::

        d^2 = |\mu_1 - \mu_2|^2 + \mathrm{tr}\,\Sigma_1 + \mathrm{tr}\,\Sigma_2
        - 2\,\mathrm{tr}\big(\Sigma_1^{1/2}\,\Sigma_2\,\Sigma_1^{1/2}\big)^{1/2}

    Both roots by eigenvalues of symmetric matrices in float64, those below 0 taken for 0: singular covariances are no
    special case.

    Args:
        mean_1: (D,).
        covariance_1: (D, D), symmetric.
        mean_2: (D,).
        covariance_2: (D, D), symmetric.

    Returns:
        A scalar of float64, 0 or more.

    Example:
        >>> one = torch.eye(2)
        >>> frechet_gaussians(torch.zeros(2), one, torch.ones(2), 4 * one).item()
        4.0
    """
    mean_1, covariance_1, mean_2, covariance_2 = (
        tensor.double() for tensor in (mean_1, covariance_1, mean_2, covariance_2)
    )
    values, vectors = torch.linalg.eigh(covariance_1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ covariance_2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2)
    traces = covariance_1.trace() + covariance_2.trace() - 2 * eigenvalues.clamp(min=0).sqrt().sum()
    return ((mean_1 - mean_2).square().sum() + traces).clamp(min=0)


def frechet_from_moments(real: Moments, generated: Moments, *, ddof: int = 1) -> Tensor:
    """Returns the squared Fréchet distance of two sets of features, from their sums.

    Args:
        real: Sums of the one set.
        generated: Sums of the other.
        ddof: 1 divides the covariances by N - 1, 0 by N.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: If a set is too small for a covariance.

    Example:
        >>> sums = Moments.of(torch.tensor([[0.0], [2.0]]))
        >>> frechet_from_moments(sums, sums).item()
        0.0
    """
    return frechet_gaussians(real.mean, real.covariance(ddof), generated.mean, generated.covariance(ddof))


def frechet_distance(real: Tensor, generated: Tensor, *, ddof: int = 1) -> Tensor:
    """Returns the squared Fréchet distance of two sets of features.

    Args:
        real: (N, D).
        generated: (M, D).
        ddof: 1 divides the covariances by N - 1, 0 by N.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or a set is too small for a covariance.

    Example:
        >>> x = torch.tensor([[0.0], [2.0]])
        >>> frechet_distance(x, 2 * x + 3, ddof=0).item()  # means 1 and 5, deviations 1 and 2
        17.0
    """
    check_tensor(real=real, generated=generated)
    check_int(ddof=ddof)
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be of shapes (N, D) and (M, D), got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    return frechet_from_moments(Moments.of(real), Moments.of(generated), ddof=ddof)


def fvd_extractor(path: str | os.PathLike[str], protocol: str | FVDProtocol) -> FeatureExtractor:
    """Returns the extractor that a file holds: weights of Inception-I3D, or StyleGAN-V's program in TorchScript.

    The program is known by its hash; no other is loaded, so that a file from a stranger runs nothing.

    Args:
        path: The file of `reco convert-i3d`, `i3d_pretrained_400.pt`, or StyleGAN-V's `i3d_torchscript.pt`.
        protocol: Name in `PROTOCOLS`, or a protocol.

    Returns:
        The extractor.

    Raises:
        ValueError: If the file is none of those, or does not follow the protocol; a program of your own is given as
            `TorchScriptFeatures`.
    """
    check_path(path=path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.split("/")[1:2] == ["code"] for name in archive.namelist()):
                if git_blob_id(path) not in KNOWN_FILES:
                    raise ValueError(
                        "path must hold weights, or be StyleGAN-V's i3d_torchscript.pt, got "
                        f"{os.fspath(path)!r}, another program in TorchScript, which may run code when it is loaded; "
                        "if you trust its source, give TorchScriptFeatures(path, protocol)"
                    )
                return TorchScriptFeatures(path, protocol)
    return load_i3d(path, protocol)


def frechet_video_distance(
    real: Tensor, generated: Tensor, extractor: FeatureExtractor, protocol: str | FVDProtocol = "styleganv"
) -> Tensor:
    """Returns the Fréchet video distance of two sets of clips in memory; `FrechetVideoDistance` takes batches.

    Args:
        real: uint8, (N, 3, T, H, W).
        generated: uint8, (M, 3, T, H, W).
        extractor: Clips to features (B, D).
        protocol: Name in `PROTOCOLS`, or a protocol; its number of frames and its covariance are used, the rest is the
            extractor's.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: If the clips do not fit the protocol or are too few.

    Example:
        >>> clips = torch.zeros(4, 3, 16, 16, 16, dtype=torch.uint8)
        >>> frechet_video_distance(clips, clips, RandomConvFeatures()).item()
        0.0
    """
    protocol = fvd_protocol(protocol)
    if not callable(extractor):
        raise ValueError(f"extractor must be a function from clips to features, got {extractor!r}")
    for clips in (real, generated):
        check_clips(clips, protocol.frames)
    return frechet_distance(extractor(real), extractor(generated), ddof=protocol.ddof)


class FrechetVideoDistance(MomentMetric):
    """Fréchet video distance (FVD) of generated from real clips; lower is better.

    Formula: `frechet_gaussians`, of the features' means and covariances. `update(clips, real=...)` takes uint8 clips
    (B, 3, T, H, W); `compute` returns a scalar of float64; `describe` prints it with its protocol.

    Args:
        extractor: A file as in `fvd_extractor`, weights of Inception-I3D as `reco convert-i3d` writes them, or a
            function from clips (B, 3, T, H, W) uint8 to features (B, D).
        protocol: Name in `PROTOCOLS` ("styleganv", "tats", "omnitokenizer", "larp"), or a protocol. With a function of
            your own only its number of frames and its covariance are used.
        width: D, for a function without attribute `width`.
        few: What to do with fewer clips than features: "warn" or "error".
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is none of those, or the extractor was made for another protocol.

    Example:
        >>> import torch
        >>> fvd = FrechetVideoDistance(RandomConvFeatures(), protocol="omnitokenizer")
        >>> clips = torch.randint(0, 256, (40, 3, 17, 16, 16), dtype=torch.uint8)
        >>> fvd.update(clips, real=True)
        >>> fvd.update(clips, real=False)
        >>> round(fvd.compute().item(), 6)
        0.0
    """

    def __init__(
        self,
        extractor: FeatureExtractor | str | os.PathLike[str],
        protocol: str | FVDProtocol = "styleganv",
        *,
        width: int | None = None,
        few: Literal["warn", "error"] = "warn",
        **kwargs: Any,
    ) -> None:
        protocol = fvd_protocol(protocol)
        if few not in ("warn", "error"):
            raise ValueError(f"few must be 'warn' or 'error', got {few!r}")
        if isinstance(extractor, (str, os.PathLike)):
            extractor = fvd_extractor(extractor, protocol)
        made_for = getattr(extractor, "protocol", None)
        if isinstance(made_for, FVDProtocol) and made_for != protocol:
            raise ValueError(
                f"extractor must be made for {protocol.describe()}, got one for {made_for.describe()}; make it anew"
            )
        own = "" if isinstance(made_for, FVDProtocol) else ", resizing and output the extractor's own"
        settings = {"protocol": protocol.describe() + own}
        super().__init__(extractor, frames=protocol.frames, width=width, settings=settings, **kwargs)
        self.protocol, self.few = protocol, few

    def distance(self, real: Moments, generated: Moments) -> Tensor:
        """Returns the distance, from the sums of both sets; see `compute`."""
        if self.few == "error" and min(real.clips, generated.clips) < self.width:
            raise ValueError(
                f"clips of each kind must be {self.width} or more, as many as features, got {real.clips} real and "
                f"{generated.clips} generated; take more, or few='warn'"
            )
        self._warn_few(real, generated)
        return frechet_from_moments(real, generated, ddof=self.protocol.ddof)


class RandomFeatureDistance(MomentMetric):
    """Fréchet distance of features of a random network: for demos and tests, where no weights can be had. No FVD.

    It tells which of two sets of clips is nearer to the data in colour, texture and motion, on the same data and at the
    same size. Its numbers are of another scale than those of FVD and must not be reported as such.

    Args:
        frames: T of every clip; None allows any, but the same for all.
        seed: Of the random weights.
        kwargs: Of `torchmetrics.Metric`.

    Example:
        >>> import torch
        >>> metric = RandomFeatureDistance()
        >>> clips = torch.randint(0, 256, (40, 3, 5, 16, 16), dtype=torch.uint8)
        >>> metric.update(clips, real=True)
        >>> metric.update(clips // 2, real=False)
        >>> bool(metric.compute() > 0)
        True
    """

    def __init__(self, *, frames: int | None = None, seed: int = 0, **kwargs: Any) -> None:
        check_int(seed=seed)
        settings = {"protocol": f"no FVD: random convolutions, seed {seed}"}
        super().__init__(RandomConvFeatures(seed=seed), frames=frames, width=None, settings=settings, **kwargs)

    def distance(self, real: Moments, generated: Moments) -> Tensor:
        """Returns the distance, from the sums of both sets; see `compute`."""
        self._warn_few(real, generated)
        return frechet_from_moments(real, generated)
