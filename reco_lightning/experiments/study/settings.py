# SPDX-License-Identifier: Apache-2.0
"""Sizes that all runs of a study share."""

from __future__ import annotations

from dataclasses import dataclass, fields

from reco_lightning.support.argument_checks import check_finite, check_int

__all__ = ["BATCH_SIZE", "Settings"]

BATCH_SIZE = 32  # of the plain run whose operations are the unit of cost


@dataclass(frozen=True)
class Settings:
    """The network, its training and what is measured.

    Args:
        dim: D, width of the network.
        depth: Its blocks.
        heads: Its attention heads.
        learning_rate: Peak of AdamW's; it rises over the first twentieth of the training and falls to 0 by its end, by
            a cosine.
        validations: How often the validation cross-entropy is measured on the way.
        held_out_clips: Clips that the cross-entropy is measured on.
        compared_clips: Clips on either side of a Fréchet distance.
        features: D, principal components in which it is taken.
        tokenizer_steps: Training steps of the tokenizer of real clips.

    Raises:
        ValueError: If one is no number above 0, or no whole one where all but the learning rate are.
    """

    dim: int = 64
    depth: int = 2
    heads: int = 4
    learning_rate: float = 4e-3
    validations: int = 6
    held_out_clips: int = 512
    compared_clips: int = 1024
    features: int = 48
    tokenizer_steps: int = 600

    def __post_init__(self) -> None:
        check_finite(above=0, learning_rate=self.learning_rate)
        for name in (one.name for one in fields(self) if one.name != "learning_rate"):
            check_int(at_least=1, **{name: getattr(self, name)})
