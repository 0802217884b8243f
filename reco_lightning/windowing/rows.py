# SPDX-License-Identifier: Apache-2.0
"""Maps windows of tokens to rows of the network and the batch to groups.

Rows are positions of the network's sequence (B, T, D), prefix included; tokens are video tokens, prefix not included.
Row r predicts the token that stands at row r + 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from reco_lightning.windowing.sampler import Window

__all__ = ["Context", "HeadInput", "LossRows", "RowLayout", "WindowGroup", "WindowOutput", "split_batch"]

Context = Literal["frozen", "keys", "attached", "dropped"]


@dataclass(frozen=True)
class WindowGroup:
    """A part of the batch and the rows of the network that its window occupies.

    Args:
        window: The tokens that the group optimises.
        samples: The group's slice of the batch.
        first: First row that is run with gradient; 0 where that is the first token's, to which the prefix belongs.
        loss_start: First row whose logits enter the loss.
        stop: One past the window's last row.
    """

    window: Window
    samples: slice
    first: int
    loss_start: int
    stop: int


@dataclass(frozen=True)
class HeadInput:
    """Inputs of a deferred linear head: states, weight and bias, cast to the type in which it multiplies.

    Args:
        states: For each group the states (B_g, rows, D); all T rows where the one window is the whole sequence.
        weight: The head's weight, (V, D).
        bias: The head's bias, (V,).
    """

    states: tuple[torch.Tensor, ...]
    weight: torch.Tensor
    bias: torch.Tensor | None

    def logits(self) -> tuple[torch.Tensor, ...]:
        """Makes the logits of each group, (B_g, rows, V)."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return tuple(F.linear(part.to(self.weight.dtype), self.weight, self.bias) for part in self.states)


@dataclass(frozen=True)
class WindowOutput:
    """The output of a windowed run of the network.

    Args:
        groups: The groups of the batch, in its order.
        hidden: For each group the states that the heads read, (B_g, rows, D), rows being ``loss_start ... stop``; those
            that leave the blocks where the heads do not all read the same.
        rows: T, the length of the network's sequence.
        batch: B, the size of the batch.
        whole: Whether the one window is the whole sequence, and all rows were run.
        states: Where ``hidden`` was taken from, all groups' in one.
        made: For each head that returned a placeholder the logits of each group (B_g, rows, V), or what the loss makes
            them of; by the head's number.
    """

    groups: tuple[WindowGroup, ...]
    hidden: tuple[torch.Tensor, ...]
    rows: int
    batch: int
    whole: bool
    states: torch.Tensor
    made: Mapping[int, HeadInput | tuple[torch.Tensor, ...]] = field(default_factory=dict)


Places = slice | torch.Tensor


@dataclass(frozen=True)
class LossRows:
    """The network's rows that the loss rows of a sample come from.

    Args:
        start: The network's row of the first loss row, where each loss row follows the one before.
        length: L, loss rows of a sample.
        scattered: The network's row of each loss row, where they do not.
    """

    start: int
    length: int
    scattered: tuple[int, ...] | None = None

    def places(self, group: WindowGroup, device: torch.device) -> tuple[Places, Places]:
        """Returns where a group's rows lie among the loss rows, and where these lie among the group's rows.

        Args:
            group: The group.
            device: Where indices are wanted, if they are no slices.

        Example:
            >>> group = WindowGroup(Window(2, 4), slice(0, 1), first=2, loss_start=2, stop=4)
            >>> LossRows(1, 8).places(group, torch.device("cpu"))
            (slice(1, 3, None), slice(0, 2, None))
        """
        if self.scattered is not None:
            found = [(place, row) for place, row in enumerate(self.scattered) if group.loss_start <= row < group.stop]
            of_loss = torch.tensor([place for place, _ in found], dtype=torch.long, device=device)
            of_group = torch.tensor([row - group.loss_start for _, row in found], dtype=torch.long, device=device)
            return of_loss, of_group
        first = max(group.loss_start, self.start)
        stop = max(first, min(group.stop, self.start + self.length))
        return slice(first - self.start, stop - self.start), slice(first - group.loss_start, stop - group.loss_start)


@dataclass(frozen=True)
class RowLayout:
    """The position of the video's tokens in the network's sequence.

    Args:
        tokens: N, video tokens of a sample.
        trailing_rows: Rows after the one that predicts the last video token: 0 where the last token is not fed, 1 where
            it is.
        prefix_rows: P, the rows in front of the video tokens, where it is the same in every batch; ``None`` counts it
            from the end of the sequence.
    """

    tokens: int
    trailing_rows: int = 0
    prefix_rows: int | None = None

    def prefix(self, rows: int) -> int:
        """Returns P, the rows in front of the video tokens in a sequence of ``rows`` rows."""
        if self.prefix_rows is not None:
            return self.prefix_rows
        return rows - self.trailing_rows - self.tokens + 1


def split_batch(
    windows: Sequence[Window], layout: RowLayout, *, batch: int, rows: int, attached: int = 0
) -> tuple[WindowGroup, ...]:
    """Places windows of tokens on rows of the network and shares the batch out among them.

    Args:
        windows: One window per group; a batch smaller than their number uses as many of them as it has samples, evenly
            spread.
        layout: Where the tokens lie.
        batch: B, the size of the batch.
        rows: T, the length of the network's sequence.
        attached: Tokens in front of each window that are run with gradient too.

    Returns:
        The groups, in the order of the batch.

    Raises:
        ValueError: If the sequence is too short to hold the video's tokens.

    Example:
        >>> group, = split_batch([Window(4, 8)], RowLayout(8), batch=2, rows=8)
        >>> (group.first, group.loss_start, group.stop)
        (4, 4, 8)
    """
    shift = layout.prefix(rows) - 1  # row of the state that predicts video token 0; -1 without a prefix
    if shift < -1 or layout.tokens + shift > rows:
        raise ValueError(
            f"the network's sequence has {rows} rows, too few for frame_blocks x tokens_per_block = {layout.tokens} "
            "video tokens; make the sampler's frame_blocks and tokens_per_block those of your token grid"
        )
    count = min(len(windows), batch)
    chosen = [windows[(2 * index + 1) * len(windows) // (2 * count)] for index in range(count)]
    groups, start = [], 0
    for index, window in enumerate(chosen):
        size = batch // count + (index < batch % count)
        groups.append(
            WindowGroup(
                window=window,
                samples=slice(start, start + size),
                first=0 if window.start <= attached else window.start - attached + shift,
                loss_start=max(window.start + shift, 0),
                stop=window.stop + shift,
            )
        )
        start += size
    return tuple(groups)
