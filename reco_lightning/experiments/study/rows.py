# SPDX-License-Identifier: Apache-2.0
"""The rows of a study's table: numbers of finished runs with confidence intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reco_lightning.experiments.study.plan import Line

__all__ = ["Estimate", "Row", "estimate"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        mean: The mean.
        half_width: Half of its 95 % confidence interval; None for a single seed, which has none.
        n: Seeds.
    """

    mean: float
    half_width: float | None
    n: int

    def text(self, digits: int, *, sign: bool = False) -> str:
        """As tables show it."""
        mean = f"{self.mean:+.{digits}f}" if sign else f"{self.mean:.{digits}f}"
        return mean if self.half_width is None else f"{mean} ± {self.half_width:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate | None:
    """Computes the mean and the 95 % confidence interval by Student's t.

    Args:
        values: One number a seed.

    Returns:
        The estimate; None for no values.

    Example:
        >>> estimate([1.0, 2.0, 3.0]).text(2)
        '2.00 ± 2.48'
    """
    if not values:
        return None
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean, None, 1)
    from scipy.stats import t

    quantile = float(t.ppf(0.975, len(values) - 1))
    return Estimate(mean, quantile * statistics.stdev(values) / math.sqrt(len(values)), len(values))


@dataclass(frozen=True)
class Row:
    """A line of the plan with its finished runs.

    Args:
        line: The line.
        records: By seed.
    """

    line: Line
    records: dict[int, dict[str, Any]]

    def of(self, *names: str) -> Estimate | None:
        """Returns a measured number over the seeds; names lead into the record."""
        return estimate([value for value in (_dig(one, names) for one in self.records.values()) if value is not None])

    def against(self, other: Row, *names: str) -> Estimate | None:
        """Returns the difference to another row, seed by seed."""
        pairs = [
            (_dig(self.records[s], names), _dig(other.records[s], names)) for s in self.records if s in other.records
        ]
        return estimate([mine - theirs for mine, theirs in pairs if mine is not None and theirs is not None])


def _dig(record: Any, names: Sequence[str]) -> float | None:
    for name in names:
        if isinstance(record, list):
            record = record[int(name)] if int(name) < len(record) else None
        else:
            record = record.get(name)
        if record is None:
            return None
    return float(record)
