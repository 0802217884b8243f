# SPDX-License-Identifier: Apache-2.0
"""A litdata loader whose epochs follow each other under Lightning, also after a resume."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from reco_lightning.data.tokens.shards import TokenItem

__all__ = ["LitTokenLoader"]


class LitTokenLoader:
    """Batches from a `litdata.StreamingDataLoader`, epoch after epoch, resumable inside each under Lightning.

    litdata forgets a loaded state only when one batch more is asked for than there are, which Lightning never does:
    without this class every epoch after a resumed one would be the rest of that one again.

    Args:
        loader: A `litdata.StreamingDataLoader`.

    Example:
        >>> class Batches(list):
        ...     restore, current_epoch = False, 0
        >>> list(LitTokenLoader(Batches("ab")))
        ['a', 'b']
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader
        self.sampler, self.batch_sampler = self, None  # where Lightning looks for `set_epoch`
        self._loaded = False

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[TokenItem]:
        self.loader.restore, self._loaded = self.loader.restore and self._loaded, False
        yield from self.loader

    def set_epoch(self, epoch: int) -> None:
        """Begins with this epoch, from 0; without effect once one was served or loaded, as the others follow."""
        self.loader.current_epoch = self.loader.current_epoch or epoch

    def state_dict(self) -> dict[str, Any]:
        """Returns where the loader is: litdata's own state."""
        return copy.deepcopy(self.loader.state_dict())  # litdata goes on writing into what it returns

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on with what was left of an epoch; litdata refuses the state of another dataset, seed or order."""
        state = copy.deepcopy(state_dict)
        self.loader.load_state_dict(state)
        # workers have copies of the dataset: left to itself, this one would tell the next state_dict of epoch 1
        self.loader.dataset.current_epoch = state["dataset"]["current_epoch"]
        self._loaded = True
