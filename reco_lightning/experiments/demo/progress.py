# SPDX-License-Identifier: Apache-2.0
"""Shows progress bars and records step times and validation losses while the demo trains."""

from __future__ import annotations

import logging
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from tqdm import tqdm
from typing_extensions import override

from reco_lightning.windowing.sampler import WindowSampler

__all__ = ["Recorder", "quiet", "stage_bar"]

STAGES = 7
_WARMUP = 5  # steps whose time is not counted: allocators fill, and ReCo proves its engine on the first
_EXPECTED = (
    ".*does not have many workers.*",
    ".*The number of training batches .* is smaller than the logging interval.*",
    ".*LeafSpec.*is deprecated.*",
    ".*GPU available but not used.*",
    ".*`validation_step` but have no `val_dataloader`.*",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps Lightning's start-up lines and its advice on data workers off the screen; other warnings pass."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def stage_bar(number: int, name: str, total: int, unit: str = "step") -> tqdm:
    """Makes the progress bar of a stage, 1 to 7; seldom drawn where the output is a file."""
    shown = f"[{number}/{STAGES}] {name}"
    terminal = sys.stderr.isatty()
    every = 0.2 if terminal else 15  # seconds
    return tqdm(total=total, desc=f"{shown:<30}", unit=unit, dynamic_ncols=terminal, mininterval=every)


class Recorder(L.Callback):
    """Counts a progress bar up, times every step, keeps the validation curve and the weights of some steps.

    A step's time runs from the batch being there to the weights being updated; loading and validation are not in it.

    Args:
        bar: The stage's progress bar.
        keep: Steps whose weights are kept.

    Attributes:
        seconds: Time of every step.
        validation: (step, mean cross-entropy in nats per token) of every validation.
        weights: State dicts by step.
    """

    def __init__(self, bar: tqdm, *, keep: tuple[int, ...] = ()) -> None:
        self.bar = bar
        self.keep = keep
        self.seconds: list[float] = []
        self.validation: list[tuple[int, float]] = []
        self.weights: dict[int, dict[str, Tensor]] = {}
        self._begin = 0.0

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clock."""
        _wait(pl_module.device)
        self._begin = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clock, moves the bar, keeps the weights."""
        _wait(pl_module.device)
        self.seconds.append(time.perf_counter() - self._begin)
        self.bar.set_postfix(loss=f"{float(trainer.callback_metrics['train/loss']):.3f}", refresh=False)
        self.bar.update()
        if trainer.global_step in self.keep:
            state = pl_module.state_dict()
            self.weights[trainer.global_step] = {name: value.detach().cpu().clone() for name, value in state.items()}

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keeps the validation loss."""
        if "val/loss" in trainer.callback_metrics and not trainer.sanity_checking:
            self.validation.append((trainer.global_step, float(trainer.callback_metrics["val/loss"])))

    def step_seconds(self, sampler: WindowSampler | None = None) -> float:
        """Returns the typical time of a step in seconds: the median after the first steps.

        Args:
            sampler: The windows of the run: the median is then taken per window and averaged by probability, since
                steps on early windows are shorter than steps on late ones.
        """
        first = min(_WARMUP, len(self.seconds) - 1)
        groups: dict[int, list[float]] = defaultdict(list)
        for step, seconds in enumerate(self.seconds):
            if step >= first:
                groups[sampler.sample(step).start if sampler else 0].append(seconds)
        if sampler is None:
            return statistics.median(groups[0])
        shares = {s: p for s, p in zip(sampler.starts, sampler.probabilities, strict=True) if s in groups}
        return sum(share * statistics.median(groups[start]) for start, share in shares.items()) / sum(shares.values())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
