# SPDX-License-Identifier: Apache-2.0
"""Holds and checks the settings of windowed training, which the callback, the mixin and ``explain`` share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning.support.argument_checks import check_choice, check_finite, check_flag, check_int
from reco_lightning.support.lightning_modules import is_lightning_module
from reco_lightning.windowing.injection.engine_selection import Selection, select_engine
from reco_lightning.windowing.injection.step_recorder import Overrides
from reco_lightning.windowing.losses.continuity import Continuity, ContinuityNorm, ContinuitySchedule
from reco_lightning.windowing.rows import Context
from reco_lightning.windowing.sampler import Window, WindowSampler

__all__ = ["EngineName", "ReCoSettings", "StepKind", "check_lightning_module"]

EngineName = Literal["auto", "frozen", "cache", "prefix", "masked"]


@dataclass(frozen=True)
class StepKind:
    """One kind of training step.

    Args:
        window: The window that it optimises.
        attached: Tokens in front of the window that are trained through.
        probability: Fraction of the training's steps that are of this kind.
    """

    window: Window
    attached: int
    probability: float


@dataclass(frozen=True)
class ReCoSettings:
    """Settings of windowed training; the arguments of ``ReCoCallback``, which documents them.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> settings = ReCoSettings(WindowSampler(3, 4), attached_blocks=1, attached_share=0.5)
        >>> [(kind.window.start, kind.attached, kind.probability) for kind in settings.step_kinds]
        [(0, 4, 0.25), (0, 0, 0.25), (4, 4, 0.25), (4, 0, 0.25)]
    """

    sampler: WindowSampler
    continuity_weight: float = 0.1
    continuity_norm: ContinuityNorm = "mean"
    context: Context = "frozen"
    windows_per_batch: int = 1
    continuity_lag: int = 1
    continuity_schedule: ContinuitySchedule = "constant"
    continuity_balanced: bool = False
    attached_blocks: int = 0
    attached_share: float = 1.0
    engine: EngineName = "auto"
    network: str | None = None
    blocks: str | None = None
    head: str | None = None
    prefix_tokens: int | None = None
    verify: bool = True
    chunked_loss: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, WindowSampler):
            raise ValueError(f"sampler must be a WindowSampler, got {type(self.sampler).__name__}")
        check_choice(get_args(Context), context=self.context)
        check_choice(get_args(EngineName), engine=self.engine)
        check_int(windows_per_batch=self.windows_per_batch, at_least=1)
        check_int(attached_blocks=self.attached_blocks, at_least=0)
        check_int(prefix_tokens=self.prefix_tokens, at_least=0, or_none=True)
        check_finite(attached_share=self.attached_share)
        check_flag(verify=self.verify, chunked_loss=self.chunked_loss)
        for name, part in (("network", self.network), ("blocks", self.blocks), ("head", self.head)):
            if part is not None and not isinstance(part, str):
                raise ValueError(f"{name} must be the name of a part of the module, or None to find it, got {part!r}")
        if self.attached_blocks and self.context in ("attached", "dropped"):
            raise ValueError(
                f"attached_blocks={self.attached_blocks} needs context='frozen' or 'keys', got {self.context!r}, where "
                "all or nothing of the context is trained through"
            )
        if not 0 < self.attached_share <= 1:
            raise ValueError(
                f"attached_share must lie in (0, 1], got {self.attached_share!r}; attached_blocks=0 attaches nothing"
            )
        shortest = self.sampler.window_tokens - 1  # of the first window, where nothing predicts the first token
        if self.continuity.weight and self.continuity_lag >= shortest:
            raise ValueError(
                f"continuity compares states {self.continuity_lag} apart and needs windows of "
                f"{self.continuity_lag + 2} tokens or more, got {self.sampler.window_tokens}; widen the window, or set "
                "continuity_weight=0"
            )

    @cached_property
    def continuity(self) -> Continuity:
        """The continuity term (Eq. 11)."""
        return Continuity(
            self.continuity_weight,
            self.continuity_norm,
            self.continuity_lag,
            self.continuity_schedule,
            self.continuity_balanced,
        )

    @property
    def needs_progress(self) -> bool:
        """Whether a step depends on the fraction of the training that is done."""
        return bool(self.sampler.schedule) or self.continuity_schedule != "constant"

    @property
    def attached_tokens(self) -> int:
        """Tokens in front of a window that are trained through, in the steps in which any are."""
        if self.context == "attached":
            return self.sampler.tokens  # as many as there are
        return self.attached_blocks * self.sampler.tokens_per_block

    @property
    def step_kinds(self) -> tuple[StepKind, ...]:
        """All kinds of steps of a training with their probabilities; loss-aware sampling is ignored here."""
        attached = self.attached_tokens
        choices = [(attached, self.attached_share), (0, 1 - self.attached_share)] if attached else [(0, 1.0)]
        fractions: dict[tuple[Window, int], float] = {}
        ends = [*(begin for begin, _ in self.sampler.stages[1:]), 1.0]
        for (begin, stage), end in zip(self.sampler.stages, ends, strict=True):
            for window, probability in zip(stage.windows, stage.probabilities, strict=True):
                for tokens, fraction in choices:
                    if fraction:
                        kind = (window, tokens)
                        fractions[kind] = fractions.get(kind, 0.0) + (end - begin) * probability * fraction
        return tuple(StepKind(window, tokens, fraction) for (window, tokens), fraction in fractions.items())

    def select(self, module: nn.Module, step: Callable[[], Any], *, engine: EngineName | None = None) -> Selection:
        """Finds and verifies the engine for a module; nothing is installed.

        Args:
            module: The module, in which the network is.
            step: Runs the module's training step on the batch at hand, up to its loss.
            engine: An engine in the place of the settings' own.

        Returns:
            The engine and how it was found.

        Raises:
            MisconfigurationException: If the module cannot be windowed exactly.
        """
        return select_engine(
            module,
            step,
            self.sampler,
            overrides=Overrides(self.network, self.blocks, self.head, self.prefix_tokens),
            context=self.context,
            windows_per_batch=self.windows_per_batch,
            attached=self.attached_tokens,
            engine=engine or self.engine,
            verify=self.verify,
            chunked_loss=self.chunked_loss,
        )

    def draw(
        self, step: int, *, progress: float = 0.0, probabilities: Sequence[float] | None = None
    ) -> tuple[tuple[Window, ...], int]:
        """Draws a training step: its windows, one per group of the batch, and the attached tokens in front of each.

        Args:
            step: Index of the training batch; the same index draws the same step in every process.
            progress: Fraction of the training that is done, 0 to 1.
            probabilities: Probabilities of the stage's windows in the place of the sampler's.
        """
        windows = self.sampler.sample_groups(
            step, self.windows_per_batch, progress=progress, probabilities=probabilities
        )
        attached = self.attached_tokens
        if attached and self.attached_share < 1:
            source = random.Random(f"{self.sampler.seed}:{step}:attached")
            attached = attached if source.random() < self.attached_share else 0
        return tuple(windows), attached


def check_lightning_module(module: Any) -> None:
    """Raises unless a module is one of ``lightning.pytorch`` or ``pytorch_lightning``.

    Raises:
        MisconfigurationException: It is another; the text names the remedy.
    """
    if not is_lightning_module(module):
        raise MisconfigurationException(
            f"module must be a LightningModule, of lightning.pytorch or pytorch_lightning, got a "
            f"{type(module).__name__}; wrap the network in one"
        )
