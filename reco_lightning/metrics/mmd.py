# SPDX-License-Identifier: Apache-2.0
"""Maximum mean discrepancy with a polynomial kernel, the distance of JEDi (Luo et al., arXiv 2410.05203).

It takes features for no normal distribution, and settles with fewer clips than a Fréchet distance. With degree 2 it
needs the same running sums, so clips are never kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reco_lightning.metrics.features import FeatureExtractor
from reco_lightning.metrics.moments import Moments
from reco_lightning.metrics.moments_metric import MomentMetric
from reco_lightning.support.argument_checks import check_flag, check_tensor

__all__ = ["PolynomialVideoMMD", "mmd_from_moments", "polynomial_mmd"]


def mmd_from_moments(real: Moments, generated: Moments, *, unbiased: bool = False) -> Tensor:
    r"""Returns the squared discrepancy of two sets of features under the kernel (x·y / D)², times 100, from their sums.

    The mean of the kernel over all pairs of two sets is the inner product of their second moments, so that

    .. math::

        d = \frac{100}{D^2}\,\big\|M_1 - M_2\big\|_F^2, \qquad M = \frac{1}{N} \sum x\,x^\top

    Args:
        real: Sums of the one set.
        generated: Sums of the other.
        unbiased: Leave out the pairs of a clip with itself. The mean over draws of the same N is then right whatever N
            is, at a price: a single value can be below 0. JEDi does not.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: If a set has fewer clips than 1, or 2 where unbiased.

    Example:
        >>> zero, one = Moments.of(torch.zeros(2, 1)), Moments.of(torch.ones(2, 1))
        >>> mmd_from_moments(zero, one).item()
        100.0
    """
    least = 2 if unbiased else 1
    if min(real.clips, generated.clips) < least:
        raise ValueError(f"clips of each kind must be {least} or more, got {real.clips} and {generated.clips}")
    second_1, second_2 = real.outer / real.count, generated.outer / generated.count
    if unbiased:
        within = sum(
            (one.outer.square().sum() - one.fourth) / (one.count * (one.count - 1)) for one in (real, generated)
        )
        squared = within - 2 * (second_1 * second_2).sum()
    else:
        squared = (second_1 - second_2).square().sum()
    return 100 * torch.as_tensor(squared) / real.width**2


def polynomial_mmd(real: Tensor, generated: Tensor, *, unbiased: bool = False) -> Tensor:
    """Returns the squared discrepancy of two sets of features under the kernel (x·y / D)², times 100.

    Args:
        real: (N, D).
        generated: (M, D).
        unbiased: Leave out the pairs of a clip with itself.

    Returns:
        A scalar of float64.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or there are too few.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> polynomial_mmd(x, 0 * x).item()  # both kernels with itself 1 / 4, mean over four pairs 1 / 8
        12.5
    """
    check_tensor(real=real, generated=generated)
    check_flag(unbiased=unbiased)
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features must be of shapes (N, D) and (M, D), got {tuple(real.shape)} and {tuple(generated.shape)}"
        )
    return mmd_from_moments(Moments.of(real), Moments.of(generated), unbiased=unbiased)


class PolynomialVideoMMD(MomentMetric):
    """Polynomial maximum mean discrepancy of generated from real clips; lower is better, and few clips suffice.

    Formula: `mmd_from_moments`. It is JEDi's distance; JEDi's numbers also need its features, those of V-JEPA. The
    kernel does not see the sign of features: x and -x are alike to it.

    Args:
        extractor: Clips (B, 3, T, H, W) uint8 to features (B, D); `fvd_extractor` makes one from a file.
        frames: T of every clip; None allows any, but the same for all.
        width: D, for a function without attribute `width`.
        unbiased: Leave out the pairs of a clip with itself.
        kwargs: Of `torchmetrics.Metric`.

    Raises:
        ValueError: If the extractor is not callable, or D is not known.

    Example:
        >>> import torch
        >>> mmd = PolynomialVideoMMD(lambda clips: clips.float().mean((2, 3, 4)), width=3)
        >>> clips = torch.randint(0, 256, (8, 3, 5, 4, 4), dtype=torch.uint8)
        >>> mmd.update(clips, real=True)
        >>> mmd.update(clips, real=False)
        >>> mmd.compute().item()
        0.0
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        *,
        frames: int | None = None,
        width: int | None = None,
        unbiased: bool = False,
        **kwargs: Any,
    ) -> None:
        check_flag(unbiased=unbiased)
        protocol = getattr(getattr(extractor, "protocol", None), "describe", lambda: "the extractor's own")()
        settings = {"kernel": "(x.y / D)^2, times 100", "unbiased": unbiased, "protocol": protocol}
        super().__init__(extractor, frames=frames, width=width, settings=settings, **kwargs)
        self.unbiased = unbiased

    def distance(self, real: Moments, generated: Moments) -> Tensor:
        """Returns the distance, from the sums of both sets; see `compute`."""
        return mmd_from_moments(real, generated, unbiased=self.unbiased)
