# SPDX-License-Identifier: Apache-2.0
"""Trains one run of a study, counts its cost and measures the result."""

from __future__ import annotations

import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from reco_lightning.callbacks.reco import ReCoCallback
from reco_lightning.experiments.demo.progress import quiet
from reco_lightning.experiments.study.measure import FrechetSpace, position_losses
from reco_lightning.experiments.study.plan import RunSpec
from reco_lightning.experiments.study.settings import BATCH_SIZE
from reco_lightning.experiments.study.sources import TokenSource, open_source
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel
from reco_lightning.windowing.cost import count_operations
from reco_lightning.windowing.explain import explain

__all__ = ["StepCosts", "StudyModel", "run", "share_of_rate"]

Batch = dict[str, torch.Tensor]
Kind = tuple[tuple[int, int, int, int], ...]  # for each group of the batch: samples, window, tokens trained through

_WARMUP = 0.05
_SAMPLED_TOGETHER = 256


def share_of_rate(done: float) -> float:
    """Returns the learning rate over its peak: a linear rise over the first twentieth, then a cosine down to 0.

    Args:
        done: Share of the training that is done, 0 to 1.

    Example:
        >>> [round(share_of_rate(done), 3) for done in (0.025, 0.05, 0.525, 1.0)]
        [0.5, 1.0, 0.5, 0.0]
    """
    if done < _WARMUP:
        return done / _WARMUP
    return 0.5 * (1 + math.cos(math.pi * (done - _WARMUP) / (1 - _WARMUP)))


class StudyModel(VideoModel):
    """The reference module with a learning rate that follows the share of the training that is done.

    Args:
        network: The network.
        learning_rate: Its peak.
    """

    def __init__(self, network: VideoTransformer, *, learning_rate: float) -> None:
        super().__init__(network, learning_rate=learning_rate)

    @override
    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Returns AdamW with `share_of_rate`."""
        optimizer = super().configure_optimizers()["optimizer"]
        steps = self.trainer.max_steps
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: share_of_rate((step + 1) / (steps + 1)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StepCosts:
    """Operations of the steps of a run, by what they trained.

    Args:
        model: The module; left as it was.
        source: Its clips.
        callback: The method; ``None`` is plain training.
        batch_size: Clips a step.

    Attributes:
        plain: Operations of a plain step of the reference batch size.
        expected: Operations of a step, by the windows' probabilities.
        engine: The engine's name; ``"plain"`` without one.
    """

    def __init__(
        self, model: VideoModel, source: TokenSource, callback: ReCoCallback | None, *, batch_size: int
    ) -> None:
        self.batch_size = batch_size
        self.plain = self._plain(model, source, BATCH_SIZE)
        self.expected: float = self._plain(model, source, batch_size)
        self.engine = "plain"
        self._windows: dict[tuple[int, int, int], int] = {}
        if callback is not None:
            found = explain(model, _batch(source, 0, batch_size), callback)
            self.engine = found.engine
            self.expected = found.operations
            for cost in found.windows:
                self._windows[cost.window.start, cost.window.stop, cost.attached] = cost.operations

    def of(self, kind: Kind) -> float:
        """Operations of a step.

        Args:
            kind: For each group of the batch its samples, its window's start and stop, and the tokens in front of it
                that were trained through; empty is a plain step.
        """
        if not kind:
            return self.expected
        # matmuls and attention are linear in the number of samples
        return sum(
            samples / self.batch_size * self._windows[start, stop, through] for samples, start, stop, through in kind
        )

    def _plain(self, model: VideoModel, source: TokenSource, batch_size: int) -> int:
        tokens = _batch(source, 0, batch_size)["tokens"]

        def loss() -> torch.Tensor:
            return torch.nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())

        return count_operations(loss, list(model.parameters()))


class TokenBatches(Dataset[Batch]):
    """The batches of a run in their order: with one seed the same row of clips for every method.

    Args:
        source: The clips.
        batch_size: Clips a step.
        steps: Batches.
    """

    def __init__(self, source: TokenSource, *, batch_size: int, steps: int) -> None:
        self.source = source
        self.batch_size = batch_size
        self.steps = steps

    def __len__(self) -> int:
        """Batches."""
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        """Batch of a step."""
        return _batch(self.source, step * self.batch_size, (step + 1) * self.batch_size)


class Watch(pl.Callback):
    """Times the steps, notes what each of them trained, and measures the cross-entropy on the way.

    It stands behind the method's callback, which has ended its window when a batch ends here.

    Args:
        method: The method's callback; ``None`` is plain training.
        held_out: Clips to measure on, (n, N).
        every: Steps from one measurement to the next.

    Attributes:
        kinds: What each step trained.
        seconds: Time of the steps but the first, in seconds.
        processor: The processor's time of the same steps, in seconds.
        curve: (step, cross-entropy in nats).
    """

    def __init__(self, method: ReCoCallback | None, held_out: torch.Tensor, *, every: int) -> None:
        self.method = method
        self.held_out = held_out
        self.every = every
        self.kinds: list[Kind] = []
        self.seconds = 0.0
        self.processor = 0.0
        self.curve: list[tuple[int, float]] = []
        self._begin = (0.0, 0.0)

    @override
    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Starts the clocks."""
        self._begin = (time.perf_counter(), time.process_time())

    @override
    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Notes the windows while they are in force."""
        self.kinds.append(_kind(self.method))

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stops the clocks, and measures where it is time."""
        if trainer.global_step > 1:  # the first step proves the engine
            self.seconds += time.perf_counter() - self._begin[0]
            self.processor += time.process_time() - self._begin[1]
        if trainer.global_step % self.every == 0:
            assert isinstance(pl_module, VideoModel)
            loss = float(position_losses(pl_module, self.held_out).mean())
            self.curve.append((trainer.global_step, loss))


def run(spec: RunSpec, *, folder: Path) -> dict[str, Any]:
    """Trains and measures.

    Args:
        spec: What to do.
        folder: Where the tokenizer of real clips is kept.

    Returns:
        The record, as JSON says it.
    """
    begin = time.perf_counter(), time.process_time()
    settings = spec.settings
    source = open_source(spec.data, seed=spec.seed, folder=folder, settings=settings)
    pl.seed_everything(spec.seed, verbose=False)
    network = VideoTransformer(
        vocab_size=source.vocabulary, grid=source.grid, dim=settings.dim, depth=settings.depth, heads=settings.heads
    )
    model = StudyModel(network, learning_rate=settings.learning_rate)
    blocks, tokens_per_block = source.grid[0], source.grid[1] * source.grid[2]

    def callback() -> ReCoCallback | None:
        return spec.method.callback(blocks, tokens_per_block, seed=spec.seed)

    costs = StepCosts(model, source, callback(), batch_size=spec.batch_size)
    steps = spec.share * spec.steps
    if spec.budget == "cost":
        steps *= costs.plain / costs.expected
    steps = max(1, round(steps))
    method = callback()
    held_out = torch.from_numpy(source.held_out(settings.held_out_clips, blocks))
    watch = Watch(method, held_out, every=max(1, steps // settings.validations))
    _fit(model, TokenBatches(source, batch_size=spec.batch_size, steps=steps), method, watch, folder=folder)
    spent = np.cumsum([costs.of(kind) for kind in watch.kinds]) / (spec.steps * costs.plain)
    positions = position_losses(model, held_out)
    distances, floors = {}, {}
    for length in (blocks, *spec.lengths):
        space = FrechetSpace(source, blocks=length, clips=settings.compared_clips, features=settings.features)
        made = _sample(model, method, settings.compared_clips, length=length, seed=spec.seed)
        distances[str(length)], floors[str(length)] = space.distance(made), space.floor
    counted = max(1, steps - 1)
    return {
        "spec": spec.record(),
        "steps": steps,
        "cost": float(spent[-1]),
        "operations_per_step": float(spent[-1]) * spec.steps * costs.plain / steps,
        "engine": costs.engine,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "cross_entropy": float(positions.mean()),
        "by_block": positions.reshape(blocks, -1).mean(1).tolist(),
        "by_position": positions.tolist(),
        "frechet": distances,
        "frechet_floor": floors,
        "curve": [[step, float(spent[step - 1]), loss] for step, loss in watch.curve],
        "windows": _tally(watch.kinds),
        "step_seconds": watch.seconds / counted,
        "step_processor_seconds": watch.processor / counted,
        "seconds": time.perf_counter() - begin[0],
        "processor_seconds": time.process_time() - begin[1],
        "torch": torch.__version__,
    }


def _fit(model: VideoModel, batches: TokenBatches, method: ReCoCallback | None, watch: Watch, *, folder: Path) -> None:
    with quiet():
        trainer = pl.Trainer(
            max_steps=len(batches),
            accelerator="cpu",
            devices=1,
            logger=False,
            callbacks=[watch] if method is None else [method, watch],
            gradient_clip_val=1.0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=folder,
        )
        trainer.fit(model, DataLoader(batches, batch_size=None))


def _sample(
    model: VideoModel, method: ReCoCallback | None, count: int, *, length: int, seed: int
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Clips of a network, within the blocks that it was trained on together."""
    window = None
    if method is not None and method.settings.context == "dropped":
        window = method.settings.sampler.window_blocks
    made = generate(
        model,
        count,
        length=length,
        window_blocks=window,
        context_blocks=None if window is None else 1,
        seed=seed,
        batch_size=_SAMPLED_TOGETHER,
    )
    return made.numpy()


def _batch(source: TokenSource, start: int, stop: int) -> Batch:
    return {"tokens": torch.from_numpy(source.batch(start, stop))}


def _kind(method: ReCoCallback | None) -> Kind:
    injection = None if method is None else method._injection
    if injection is None or injection.engine.output is None:
        return ()
    groups = injection.engine.output.groups
    return tuple(
        (
            group.samples.stop - group.samples.start,
            group.window.start,
            group.window.stop,
            group.loss_start - group.first if group.first else group.window.start,
        )
        for group in groups
    )


def _tally(kinds: list[Kind]) -> dict[str, int]:
    """How many samples were trained on each window."""
    counts: Counter[str] = Counter()
    for kind in kinds:
        for samples, start, stop, through in kind:
            counts[f"{start}-{stop}" + (f"+{through}" if through else "")] += samples
    return dict(sorted(counts.items()))
