# SPDX-License-Identifier: Apache-2.0
"""`GenerationRequests`: requests for videos as the data of `reco predict`.

The trainer deals the requests out to its processes. A video depends on the seed and its own index alone, so any number
of processes and any batch size give the same set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import lightning.pytorch as pl
import numpy as np
import torch
from torch.utils.data import DataLoader
from typing_extensions import override

from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.support.argument_checks import check_int, check_int_sequence, check_path

__all__ = ["GenerationRequests"]


class GenerationRequests(pl.LightningDataModule):
    """Requests for n videos, as batches for `VideoModel.predict_step`.

    Args:
        n: Number of videos, 1 or more.
        labels: Classes; video i has the one at i modulo their number. ``None`` is unconditional.
        prefix: Path of an ``.npy`` file of ids that stand in front of the tokens, (n, C), for a network with
            ``condition_tokens``; not together with ``labels``.
        first_tokens: Path of an ``.npy`` file of ids to continue, (n, m) or (n, blocks, h, w), such as those of first
            frames.
        batch_size: Videos sampled side by side in a process, 1 or more.
        sampling: The fields of `VideoSamplingOptions` by name.

    Raises:
        ValueError: If an argument is out of its range, or the file holds no ids for n videos.

    Example:
        >>> batches = GenerationRequests(3, labels=[5, 7], batch_size=2).predict_dataloader()
        >>> [(batch["index"].tolist(), batch["condition"].tolist()) for batch in batches]
        [([0, 1], [5, 7]), ([2], [5])]
    """

    def __init__(
        self,
        n: int = 8,
        *,
        labels: Sequence[int] | None = None,
        prefix: str | None = None,
        first_tokens: str | None = None,
        batch_size: int = 16,
        **sampling: Any,
    ) -> None:
        super().__init__()
        check_int(at_least=1, n=n, batch_size=batch_size)
        check_int_sequence(labels=labels, or_none=True)
        check_path(prefix=prefix, first_tokens=first_tokens, or_none=True)
        if labels is not None and not len(labels):
            raise ValueError(f"labels must hold a class or more, or be None, got {labels!r}")
        if labels is not None and min(labels) < 0:
            raise ValueError(f"labels must be 0 or more, got {labels!r}")
        if labels is not None and prefix is not None:
            raise ValueError(f"prefix must be None where labels are given, got {prefix!r}; a network takes one of them")
        self.options = asdict(VideoSamplingOptions(**sampling))
        self.n, self.batch_size = n, batch_size
        self.labels = None if labels is None else torch.tensor(list(labels))
        self.prefix = None if prefix is None else _read_ids("prefix", prefix, n)
        self.first_tokens = None if first_tokens is None else _read_ids("first_tokens", first_tokens, n)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Returns the batches of requests, in the order of the videos' indices."""
        numbers: Any = range(self.n)
        return DataLoader(numbers, batch_size=self.batch_size, collate_fn=self._request)

    def _request(self, numbers: list[int]) -> dict[str, Any]:
        index = torch.tensor(numbers)
        request: dict[str, Any] = {"index": index, "options": self.options}
        if self.labels is not None:
            request["condition"] = self.labels[index % len(self.labels)]
        if self.prefix is not None:
            request["condition"] = self.prefix[index]
        if self.first_tokens is not None:
            request["first_tokens"] = self.first_tokens[index]
        return request


def _read_ids(name: str, path: str, n: int) -> torch.Tensor:
    if not Path(path).is_file():
        raise ValueError(f"{name} must be an existing .npy file of ids, got {path!r} (no such file)")
    try:
        with open(path, "rb") as file:
            ids = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"{name} must be an .npy file of ids, but {path!r} cannot be read as one: {error}") from error
    if not isinstance(ids, np.ndarray):
        raise ValueError(f"{name} must be an .npy file of ids, got {path!r}, which holds several arrays")
    if ids.ndim < 2 or len(ids) != n or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"{name} must hold integers, (n, m) or (n, blocks, h, w) with n={n}, got {ids.dtype} of shape "
            f"{ids.shape} in {path!r}"
        )
    return torch.from_numpy(ids.reshape(n, -1).astype(np.int64))
