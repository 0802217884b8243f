# SPDX-License-Identifier: Apache-2.0
"""Groups the clips of a data set by mean optical flow and stores the result.

`motion_groups` measures a distance such as FVD in each group (arXiv 2604.07402, Table 6).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reco_lightning.metrics.optical_flow import FARNEBACK, mean_flow
from reco_lightning.support.argument_checks import check_int, check_path, check_size, check_tensor
from reco_lightning.support.atomic_write import atomic_write

__all__ = ["BOUNDS", "GROUPS", "MotionManifest", "measure_motion", "motion_group"]

GROUPS = ("low", "medium", "high")

#: Borders of the groups in pixels per frame: [0, 3), [3, 6], (6, inf).
BOUNDS = (3.0, 6.0)

_MEASURE = "mean Farneback flow between adjacent frames, pixels per frame"


def motion_group(flow: Tensor) -> Tensor:
    """Returns the index in ``GROUPS`` of the group of a mean flow: low [0, 3), medium [3, 6], high (6, inf).

    Args:
        flow: Pixels per frame, (n,), 0 or more.

    Returns:
        0, 1 or 2, (n,) int64.

    Example:
        >>> motion_group(torch.tensor([0.0, 3.0, 6.0, 6.1])).tolist()
        [0, 1, 1, 2]
    """
    check_tensor(flow=flow)
    return (flow >= BOUNDS[0]).long() + (flow > BOUNDS[1]).long()


@dataclass(frozen=True)
class MotionManifest:
    """The mean flow of named clips, and how it was measured.

    Args:
        flows: Pixels per frame of each clip, by its name.
        size: Height and width in pixels that it was measured at.
        frames: T, frames of a clip.
        stride: Frames of the file from one frame of a clip to the next.
        farneback: Settings of the flow.

    Example:
        >>> manifest = MotionManifest({"a.mp4": 0.5, "b.mp4": 7.0}, size=(256, 256), frames=17, stride=1)
        >>> manifest.groups(["b.mp4", "a.mp4"]).tolist()
        [2, 0]
    """

    flows: Mapping[str, float]
    size: tuple[int, int]
    frames: int
    stride: int
    farneback: Mapping[str, Any] = field(default_factory=lambda: dict(FARNEBACK))

    def groups(self, names: Sequence[str]) -> Tensor:
        """Returns the number of the group in ``GROUPS`` of each named clip.

        Args:
            names: n names.

        Returns:
            0, 1 or 2, (n,) int64.

        Raises:
            ValueError: If a clip is not in the manifest.
        """
        if unknown := [name for name in names if name not in self.flows]:
            raise ValueError(
                f"names must be clips of the manifest, which holds {len(self.flows)}, got {unknown[0]!r} (and "
                f"{len(unknown) - 1} more unknown ones); measure_motion makes a manifest of other clips"
            )
        return motion_group(torch.tensor([self.flows[name] for name in names], dtype=torch.float64))

    def counts(self) -> dict[str, int]:
        """Returns the number of clips of each group, by its name."""
        found = torch.bincount(self.groups(list(self.flows)), minlength=len(GROUPS)).tolist()
        return dict(zip(GROUPS, found, strict=True))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the manifest as JSON; the file appears under its name only when it is complete.

        Args:
            path: Where to; missing folders are made.

        Returns:
            The path written.
        """
        record = {"measure": _MEASURE, "bounds": list(BOUNDS)} | asdict(self) | {"flows": dict(self.flows)}
        with atomic_write(path) as part:
            part.write_text(json.dumps(record, indent=1), encoding="utf-8")
        return Path(path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        size: tuple[int, int] | None = None,
        frames: int | None = None,
        stride: int | None = None,
    ) -> MotionManifest:
        """Reads a manifest.

        Args:
            path: A file that ``save`` wrote.
            size: What it has to be measured at, where this matters; the same for the next two.
            frames: As above.
            stride: As above.

        Returns:
            The manifest.

        Raises:
            ValueError: If the file holds none, or one that was measured otherwise.
        """
        check_path(path=path)
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            flows = {str(name): float(flow) for name, flow in record["flows"].items()}
            found: dict[str, Any] = {
                "size": tuple(record["size"]),
                "frames": record["frames"],
                "stride": record["stride"],
            }
            how = {"measure": record["measure"], "bounds": record["bounds"], "farneback": record["farneback"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"path must be a file that MotionManifest.save wrote, got {os.fspath(path)!r} "
                f"({type(error).__name__}: {error}); measure_motion makes one"
            ) from error
        asked = {"size": size and tuple(size), "frames": frames, "stride": stride}
        expected: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        expected |= {"measure": _MEASURE, "bounds": list(BOUNDS), "farneback": FARNEBACK}
        for name, value in expected.items():
            if (found | how)[name] != value:
                raise ValueError(
                    f"{os.fspath(path)} was measured with {name}={(found | how)[name]}, but {name}={value} is asked "
                    "for; flow and groups depend on it: measure anew, or take the manifest's own"
                )
        return cls(flows, **found)


def measure_motion(
    clips: Iterable[tuple[str, Tensor]], *, size: tuple[int, int] = (256, 256), stride: int = 1
) -> MotionManifest:
    """Measures the mean flow of clips.

    Args:
        clips: Name and frames of each clip, uint8 (3, T, H, W); T is the same for all.
        size: Height and width in pixels to measure at, as in ``mean_flow``.
        stride: Frames of the file from one frame of a clip to the next, for the record.

    Returns:
        The manifest.

    Raises:
        ValueError: If there is no clip, two have one name, or they differ in T.

    Example:
        >>> still = torch.zeros(3, 5, 32, 32, dtype=torch.uint8)
        >>> measure_motion([("still.mp4", still)], size=(32, 32)).counts()
        {'low': 1, 'medium': 0, 'high': 0}
    """
    check_size(size=size)
    check_int(at_least=1, stride=stride)
    flows: dict[str, float] = {}
    lengths = set()
    for name, frames in clips:
        if name in flows:
            raise ValueError(f"clips must have different names, got {name!r} twice")
        flows[name] = mean_flow(frames[None], size=size).item()
        lengths.add(frames.shape[1])
    if len(lengths) != 1:
        raise ValueError(f"clips must be one or more, all of one number of frames, got {sorted(lengths)}")
    return MotionManifest(flows, size=(size[0], size[1]), frames=lengths.pop(), stride=stride)
