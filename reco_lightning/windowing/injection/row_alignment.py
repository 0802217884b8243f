# SPDX-License-Identifier: Apache-2.0
"""Finds the video's tokens among the rows of a loss call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

__all__ = ["RowEvidence", "find_trailing_rows", "row_origins"]


@dataclass
class RowEvidence:
    """Records what a step does to ids and targets, for rows whose targets alone do not tell what they are.

    Args:
        ids: Arguments of the embeddings, (B, M).
        fronts: Numbers of ids that ``F.pad`` has put in front of others, such as a start token.
        ends: Numbers of ids that it has put behind others, with their value: padding, if that is ``ignore_index``.
    """

    ids: list[torch.Tensor] = field(default_factory=list)
    fronts: set[int] = field(default_factory=set)
    ends: set[tuple[int, float]] = field(default_factory=set)

    def pad(self, input: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> torch.Tensor:
        """Stands in for ``F.pad``."""
        if not input.is_floating_point() and mode == "constant":
            front, end = pad[0], pad[1]
            if front > 0:
                self.fronts.add(front)
            if end > 0:
                self.ends.add((end, value or 0))
        return F.pad(input, pad, mode, value)

    def shows_start_token(self, *, batch: int, rows: int, classes: int) -> bool | None:
        """Returns whether the first row is of a token that no row predicts; ``None`` where nothing tells."""
        ids = [each for each in self.ids if each.ndim == 2 and len(each) == batch and not each.is_floating_point()]
        longest = max((each.shape[1] for each in ids), default=rows)
        if self.fronts or longest < rows:  # the network puts rows in front itself
            return True
        firsts = [each[:, 0] for each in ids if each.shape[1] == rows]
        if any(bool((first >= classes).all()) for first in firsts):
            return True
        return False if any(bool((first != first[0]).any()) for first in firsts) else None


def row_origins(
    logits: torch.Tensor, sources: Sequence[torch.Tensor], batch: int, length: int
) -> list[tuple[int, int, int]]:
    """Finds for some loss rows the row of the network that each comes from.

    Args:
        logits: What the loss was given, (B * L, V) or (B, V, ...), with a graph.
        sources: What they are made of, each (B, T, ...) or (B * T, ...), beside zero weights.
        batch: B, the size of the batch.
        length: L, loss rows of a sample.

    Returns:
        Triples (sample, loss row, network row); the last is far below 0 where a row comes from several or another one.
    """
    view = logits.reshape(batch, length, -1) if logits.ndim == 2 else logits.flatten(2).transpose(1, 2)
    places: list[tuple[int, int, int]] = []
    for sample, row in {
        (0, 0),
        (0, length // 3),
        (batch - 1, length // 2),
        (batch - 1, length - 1),
        (batch // 2, length // 5),
    }:
        # uneven weights: the plain sum of what a norm behind the head returns has no gradient
        weighted = view[sample, row] @ torch.linspace(1, 2, view.shape[-1], dtype=view.dtype, device=view.device)
        gradients = torch.autograd.grad(weighted, list(sources), retain_graph=True, allow_unused=True)
        touched = {
            (index, place)
            for gradient in gradients
            if gradient is not None
            for index, place in gradient.abs().amax(dim=-1).view(batch, -1).nonzero().tolist()
        }
        index, place = touched.pop() if len(touched) == 1 else (-1, 0)
        place = place if index == sample else -(len(places) + 2) * length
        places.append((sample, row, place))
    return sorted(places)


def find_trailing_rows(
    counted: torch.Tensor,
    *,
    rows: int,
    offset: int,
    tokens: int,
    prefix: int | None,
    evidence: RowEvidence,
    batch: int,
    classes: int,
    ignore_index: int = -100,
) -> int:
    """Returns the number of rows after the one that predicts the last video token.

    A loss of as many rows as there are tokens is over them; clips that are shorter, or targets that are left out, in
    the first batch change nothing. Only a loss with further rows is read by its targets: those of the video count.

    Args:
        counted: Which loss rows have a target that counts in any sample, (L,).
        rows: T, rows of the network.
        offset: Row of the network that the first loss row comes from.
        tokens: N, video tokens of a sample.
        prefix: P, rows in front of them, where the user says it.
        evidence: What else the step has shown.
        batch: B, the size of the batch.
        classes: V, classes of the logits.
        ignore_index: The value of targets that do not count.

    Raises:
        ValueError: If the tokens do not lie in the rows, or the user has to say where; the text names the remedy.

    Example:
        >>> counted = torch.tensor([True] * 5 + [False] * 3)  # a short clip
        >>> sizes = {"rows": 8, "offset": 0, "tokens": 8, "prefix": 1, "batch": 1, "classes": 4}
        >>> find_trailing_rows(counted, evidence=RowEvidence(), **sizes)
        0
    """
    length, sizes = len(counted), f"the sampler's frame_blocks x tokens_per_block = {tokens}"
    places = counted.nonzero().flatten().tolist()
    if not places:
        raise ValueError("every target of the first batch is ignore_index: there is nothing to learn from it")
    behind = rows - offset - length  # rows after the one that feeds the last loss row
    last = behind + length - 1 - places[-1]  # the same of the last row whose target counts
    if prefix is not None:
        trailing_rows = rows - prefix - tokens + 1
        if (
            trailing_rows < 0
            or last < trailing_rows
            or prefix - 1 + (prefix == 0) < offset
            or offset + length < prefix - 1 + tokens
        ):
            raise ValueError(
                f"the network's sequence of {rows} rows has room for {rows - last + 1 - prefix} video tokens behind "
                f"prefix_tokens={prefix}, but {sizes}; make them agree"
            )
        return trailing_rows
    padded = max((end for end, value in evidence.ends if value == ignore_index and not counted[-end:].any()), default=0)
    own = length - padded
    if own == tokens:
        if counted[own - 1]:
            return behind + padded
        starts = evidence.shows_start_token(batch=batch, rows=rows - padded, classes=classes)
        if starts is None:
            raise ValueError(
                f"the loss has {own} rows for {tokens} video tokens, and the last one has no target that counts in the "
                "first batch, so that it may predict the last token, or none; set prefix_tokens=1 if a start token and "
                "all tokens but the last are fed, and prefix_tokens=0 if all tokens are"
            )
        return behind + padded + (not starts)
    if own == tokens - 1 and offset == 0:
        return behind + padded
    found = rows - last - tokens + 1
    if found < 0:
        raise ValueError(
            f"the network's sequence of {rows} rows has room for {rows - last + 1} video tokens, but {sizes}; make "
            "them agree"
        )
    if places[-1] - places[0] + 1 != tokens - (found == 0):
        raise ValueError(
            f"the loss covers {places[-1] - places[0] + 1} tokens of a sample, but {sizes}; make them agree, or set "
            "prefix_tokens= if the loss also covers tokens in front of the video's"
        )
    return last
