# SPDX-License-Identifier: Apache-2.0
"""Running float64 sums of features, enough for every distance between two sets of clips.

The sums of two parts of a data set add up to those of the whole, so processes can share the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reco_lightning.support.argument_checks import check_path
from reco_lightning.support.atomic_write import atomic_write

__all__ = ["Moments", "load_moments", "save_moments"]

_FORMAT = "reco_lightning moments 1"


@dataclass(frozen=True)
class Moments:
    """Sums over the features x of N clips.

    Args:
        count: N, a scalar of float64.
        total: Sum of x, (D,) float64.
        outer: Sum of the outer products x xᵀ, (D, D) float64.
        fourth: Sum of the fourth powers of the norms of x, a scalar of float64.

    Example:
        >>> moments = Moments.of(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
        >>> moments.mean.tolist(), moments.covariance(ddof=1).tolist()
        ([2.0, 1.0], [[2.0, 2.0], [2.0, 2.0]])
    """

    count: Tensor
    total: Tensor
    outer: Tensor
    fourth: Tensor

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Sums over a batch.

        Args:
            features: (N, D).

        Raises:
            ValueError: If there are not two dimensions, or a value is not finite.
        """
        if features.ndim != 2:
            raise ValueError(f"features must be of shape (N, D), got {tuple(features.shape)}")
        x = features.detach().double()
        if not bool(torch.isfinite(x).all()):
            raise ValueError("features must be finite, got NaN or infinity; look at the clips or the extractor's dtype")
        count = torch.tensor(float(len(x)), dtype=torch.float64, device=x.device)
        return cls(count, x.sum(0), x.T @ x, x.square().sum(1).square().sum())

    @classmethod
    def zero(cls, width: int) -> Moments:
        """Sums over no clip at all, of features of `width` D."""
        scalar, total, outer = (torch.zeros(shape, dtype=torch.float64) for shape in ((), (width,), (width, width)))
        return cls(scalar, total, outer, scalar.clone())

    def __add__(self, other: Moments) -> Moments:
        pairs = ((getattr(self, field.name), getattr(other, field.name)) for field in fields(self))
        return Moments(*(mine + theirs.to(mine.device) for mine, theirs in pairs))

    @property
    def clips(self) -> int:
        """N."""
        return round(float(self.count))

    @property
    def width(self) -> int:
        """D."""
        return len(self.total)

    @property
    def mean(self) -> Tensor:
        """Mean feature, (D,)."""
        return self.total / self.count

    def covariance(self, ddof: int) -> Tensor:
        """Returns the covariance, (D, D).

        Args:
            ddof: 1 divides by N - 1, 0 by N.

        Raises:
            ValueError: If there are too few clips to divide.
        """
        if self.clips <= ddof:
            raise ValueError(f"a covariance needs {ddof + 1} clips or more, got {self.clips}; update with more clips")
        centred = self.outer - self.count * torch.outer(self.mean, self.mean)
        return centred / (self.count - ddof)


def save_moments(path: str | os.PathLike[str], moments: Moments, about: Mapping[str, Any]) -> None:
    """Writes sums to a file, with what they are of; the file appears whole or not at all.

    Args:
        path: The file, `.npz`; folders are made, a file of that name is replaced.
        moments: The sums.
        about: What has to agree where they are used again, as protocol and weights; JSON values.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_moments(folder / "real.npz", Moments.of(torch.ones(3, 2)), {"frames": 16})
        >>> moments, about = load_moments(folder / "real.npz", {"frames": 16})
        >>> moments.clips, about
        (3, {'frames': 16})
    """
    arrays = {field.name: getattr(moments, field.name).cpu().numpy() for field in fields(moments)}
    stored = json.dumps({"format": _FORMAT, "clips": moments.clips, **about}, sort_keys=True)
    with atomic_write(path) as part, open(part, "wb") as file:
        np.savez(file, about=np.array(stored), **arrays)


def load_moments(path: str | os.PathLike[str], about: Mapping[str, Any]) -> tuple[Moments, dict[str, Any]]:
    """Reads sums that `save_moments` wrote; no code in the file is run.

    Args:
        path: The file.
        about: What they have to be of. Only these entries are compared.

    Returns:
        The sums, on the CPU, and all that the file says of them.

    Raises:
        ValueError: If there is no such file, it holds something else, or an entry differs; the message names all that
            differ.
    """
    check_path(statistics=path)
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
            stored = json.loads(str(file["about"]))
            arrays = [torch.from_numpy(np.array(file[field.name], np.float64)) for field in fields(Moments)]
        known, clips = stored.pop("format", None), stored.pop("clips", None)
    except FileNotFoundError:
        raise ValueError(f"statistics must be an existing file, got {os.fspath(path)!r} (no such file)") from None
    except Exception as error:  # zip, JSON and numpy have each their own
        raise ValueError(f"statistics must be a file that save_real wrote, got {os.fspath(path)!r}: {error}") from error
    if known != _FORMAT:
        raise ValueError(f"statistics must have the format {_FORMAT!r}, got {known!r}: {os.fspath(path)}")
    wrong = [f"{key} {stored.get(key)!r}, to be {value!r}" for key, value in about.items() if stored.get(key) != value]
    if wrong:
        raise ValueError(
            f"statistics must be of the same protocol, clips and weights as this metric, got {os.fspath(path)!r} with "
            f"{'; '.join(wrong)}; make them anew with save_real"
        )
    moments = Moments(*arrays)
    width = moments.width
    if moments.outer.shape != (width, width) or moments.clips != clips:
        raise ValueError(f"statistics must be whole, got {os.fspath(path)!r} with contradicting sizes; make them anew")
    return moments, stored
