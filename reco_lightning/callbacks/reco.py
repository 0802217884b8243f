# SPDX-License-Identifier: Apache-2.0
"""``ReCoCallback``: windowed training with representation continuity for any LightningModule (arXiv 2604.07402).

Last stage of the pipeline ``sampler -> losses -> engines -> injection -> callback``. Only training is changed, and only
between ``on_fit_start`` and ``teardown`` or an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torchmetrics import Metric
from typing_extensions import override

from reco_lightning.support.argument_checks import check_finite
from reco_lightning.support.lightning_modules import is_lightning_module, loss_of
from reco_lightning.windowing.engines.interception import PatchedMethod
from reco_lightning.windowing.injection.recompile_limit import RecompileLimit, is_compiled
from reco_lightning.windowing.injection.step_trace import NothingTrainedError
from reco_lightning.windowing.injection.windowed_step import Injection, StepReport
from reco_lightning.windowing.losses.continuity import ContinuityNorm, ContinuitySchedule
from reco_lightning.windowing.rows import Context
from reco_lightning.windowing.running_losses import RunningLosses
from reco_lightning.windowing.sampler import Window, WindowSampler
from reco_lightning.windowing.settings import EngineName, ReCoSettings, check_lightning_module
from reco_lightning.windowing.settings import StepKind as StepKind  # version 0.1 had it here

__all__ = ["ReCoCallback"]


class ReCoCallback(pl.Callback):
    """Makes every training step optimise a window of the video's tokens over a frozen context (Eq. 6 and 11).

    Add it to a trainer and change nothing else. On the first batch of a fit it traces the training step to find the
    blocks, the head and the rows that feed ``F.cross_entropy``, proves on the first, the second and the last window
    that the windowed forward equals the plain one, and raises before any weight changes if it does not. It logs
    ``reco/cross_entropy``, ``reco/continuity`` and ``reco/window_start`` once per training batch.

    Args:
        sampler: The windows. Its ``frame_blocks`` x ``tokens_per_block`` must be the video tokens of a sample.
        continuity_weight: Lambda of Eq. 11, 0 or more; 0 is local optimisation without continuity.
        continuity_norm: ``"mean"`` or ``"sum"`` over the hidden width, see ``continuity_loss``.
        context: What the tokens in front of the window are: ``"frozen"`` constants (the paper), ``"keys"`` (their
            states are constants, their keys and values train the projections), ``"attached"`` (trained through) or
            ``"dropped"`` (fewer frames: the window is a sequence of its own).
        windows_per_batch: Groups of the batch with a window each, 1 or more; 1 is the paper.
        continuity_lag: Distance in tokens of the states that continuity compares; 1 is the paper, the sampler's
            ``tokens_per_block`` compares the same place of neighbouring frame blocks.
        continuity_schedule: ``"constant"`` (the paper); ``"linear"`` and ``"cosine"`` let the weight fall to 0 by the
            end of the fit.
        continuity_balanced: Whether ``continuity_weight`` is the ratio of the gradients' norms, continuity's over the
            cross-entropy's, at the states that the head reads.
        attached_blocks: Frame blocks in front of the window that are trained through, without a loss of their own; 0
            is the paper.
        attached_share: Share of the steps in which they are, in (0, 1].
        loss_aware: Above 0, windows are drawn by their running cross-entropy to this power, times the sampler's
            probability; 0 is the paper.
        engine: ``"auto"``, which takes the first of ``"frozen"``, ``"cache"``, ``"prefix"`` and ``"masked"`` that is
            proved on the first batch (in a resumed run the one that was trained with), or the name of one.
        network: Name of the network inside the module, where several hold blocks.
        blocks: Name of the ``ModuleList`` or ``Sequential`` of blocks, where it is not found.
        head: Name of the module that makes the logits, where it is not found.
        prefix_tokens: Rows in front of the video tokens (class, start token, text), where the loss covers them too.
        verify: Whether to prove the windowed forward on the first batch of every fit.
        chunked_loss: Whether, where the head is an ``nn.Linear`` and the loss reads its output as it is, the loss makes
            the logits a few rows at a time: those of all rows, and their gradients, never exist.

    Attributes:
        settings: All of these but ``loss_aware``, as ``ReCoSettings``.
        windows: The windows of the last step.

    Raises:
        ValueError: If an argument is out of its range.
        MisconfigurationException: On the first batch, if the module cannot be windowed exactly; the text says why.

    Example:
        >>> callback = ReCoCallback(WindowSampler(frame_blocks=5, tokens_per_block=1024))
        >>> trainer = pl.Trainer(callbacks=[callback], logger=False, accelerator="cpu", enable_checkpointing=False)
    """

    def __init__(
        self,
        sampler: WindowSampler,
        *,
        continuity_weight: float = 0.1,
        continuity_norm: ContinuityNorm = "mean",
        context: Context = "frozen",
        windows_per_batch: int = 1,
        continuity_lag: int = 1,
        continuity_schedule: ContinuitySchedule = "constant",
        continuity_balanced: bool = False,
        attached_blocks: int = 0,
        attached_share: float = 1.0,
        loss_aware: float = 0.0,
        engine: EngineName = "auto",
        network: str | None = None,
        blocks: str | None = None,
        head: str | None = None,
        prefix_tokens: int | None = None,
        verify: bool = True,
        chunked_loss: bool = True,
    ) -> None:
        check_finite(loss_aware=loss_aware)
        self.settings = ReCoSettings(
            sampler=sampler,
            continuity_weight=continuity_weight,
            continuity_norm=continuity_norm,
            context=context,
            windows_per_batch=windows_per_batch,
            continuity_lag=continuity_lag,
            continuity_schedule=continuity_schedule,
            continuity_balanced=continuity_balanced,
            attached_blocks=attached_blocks,
            attached_share=attached_share,
            engine=engine,
            network=network,
            blocks=blocks,
            head=head,
            prefix_tokens=prefix_tokens,
            verify=verify,
            chunked_loss=chunked_loss,
        )
        self.windows: tuple[Window, ...] = ()  # of the last step
        self._patch: PatchedMethod | None = None
        self._injection: Injection | None = None
        self._report: StepReport | None = None
        self._choice: dict[str, Any] | None = None
        self._losses = RunningLosses(loss_aware) if loss_aware else None
        self._stored_losses: dict[str, Any] | None = None
        self._total_batches: float | None = None
        self._recompiles = RecompileLimit()
        self._left_out: set[str] = set()  # keys of the log
        self._waits_for: str | None = None  # why no step could be windowed yet

    @property
    def sampler(self) -> WindowSampler:
        """The windows; data modules compare their shards with it, without knowing of this class."""
        return self.settings.sampler

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be checked without a batch and takes the place of ``training_step``."""
        check_lightning_module(pl_module)
        if sum(isinstance(callback, ReCoCallback) for callback in _callbacks(trainer)) > 1:
            raise MisconfigurationException("the trainer has two ReCoCallbacks; one window rules a step: remove one")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                "training_step(dataloader_iter) fetches its batches itself, so the first one cannot be rehearsed; "
                "let it take batch and batch_idx"
            )
        sampler = self.settings.sampler
        if sampler.never_trained:
            rank_zero_warn(
                f"stride_blocks={sampler.stride_blocks} never reaches the last {sampler.never_trained} tokens of a "
                "video: they are not trained"
            )
        self._uninstall()
        self._patch = PatchedMethod(pl_module, "training_step", self._training_step)
        self._patch.install()

    @override
    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Ends the step's window and logs what it measured."""
        if self._injection is not None:
            self._injection.engine.deactivate()
        if self._report is not None:
            if self._losses is not None:
                for window, loss in self._report.losses:
                    self._losses.add(window, loss)
            loss = self._report.cross_entropy
            values = {
                "reco/cross_entropy": loss,
                **{f"reco/cross_entropy/{index}": part for index, part in enumerate(self._report.parts)},
                "reco/continuity": self._report.continuity,
                # filled on the device: a number would be copied there, and the copy waited for
                "reco/window_start": loss.new_full((), self._report.window_start, dtype=torch.float32),
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
            self._report = None

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Ends a fit in which no step could be windowed.

        Raises:
            MisconfigurationException: If no training step of the epoch ran the network with a loss.
        """
        if self._waits_for is not None:
            raise MisconfigurationException(
                f"no step of the epoch could be windowed: {self._waits_for}; set network= or blocks= if it trains "
                "others"
            )

    @override
    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leaves the module as it was."""
        self._uninstall()

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leaves the module as it was."""
        self._uninstall()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Returns the engine and the modules that were chosen, so that a resumed run uses the same ones."""
        state: dict[str, Any] = {"choice": self._choice} if self._choice else {}
        if self._losses is not None:
            state["losses"] = self._losses.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the choice back from a checkpoint; the first batch proves it anew."""
        self._choice = state_dict.get("choice")
        self._stored_losses = state_dict.get("losses")

    def _training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._patch is not None
        module = self._patch.module
        assert is_lightning_module(module)

        def step() -> Any:
            return original(*args, **kwargs)

        if not module.trainer.training:  # a validation_step may call it
            return step()
        if self._injection is None:
            try:
                self._injection = self._prove(module, step)
            except NothingTrainedError as error:
                if self._waits_for is None:
                    rank_zero_warn(f"{error}; windows begin with the first step that does")
                self._waits_for = str(error)
                return step()
            self._waits_for = None
        step_index = module.trainer.fit_loop.epoch_loop.total_batch_idx
        progress = self._progress(module.trainer, step_index)
        self.windows, attached = self.settings.draw(
            step_index, progress=progress, probabilities=self._by_loss(module, step_index, progress)
        )
        with self._filtered_log(module, self._injection):
            result, self._report = self._injection.run(self.windows, step, attached=attached, progress=progress)
        if self._report is not None:
            _check_loss(result, self._injection)
            if result is None and module.automatic_optimization:
                self._report = None  # nothing was trained
        return result

    @contextmanager
    def _filtered_log(self, module: pl.LightningModule, injection: Injection) -> Iterator[None]:
        """Keeps out of the log what is computed of the logits besides the loss: it would be that of placeholders."""

        def is_kept(name: str, value: Any) -> bool:
            names = injection.derived.names(value) or injection.unlogged.get(name, "")
            if names and name not in self._left_out:
                self._left_out.add(name)
                rank_zero_warn(
                    f"training_step logs {name!r}, which it computes of the logits by {names}: a windowed step has "
                    "those of its window alone, so the key is left out of the log; log it in validation_step"
                )
            if names and isinstance(value, Metric):
                value.reset()
            return not names

        def log(original: Callable[..., None], name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if is_kept(name, value):
                original(name, value, *args, **kwargs)

        def log_dict(original: Callable[..., None], dictionary: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
            kept = {name: value for name, value in dictionary.items() if is_kept(name, value)}
            # a MetricCollection is more than its items
            original(dictionary if len(kept) == len(dictionary) else kept, *args, **kwargs)

        patches = PatchedMethod(module, "log", log), PatchedMethod(module, "log_dict", log_dict)
        for patch in patches:
            patch.install()
        try:
            yield
        finally:
            for patch in patches:
                patch.remove()

    def _progress(self, trainer: pl.Trainer, step_index: int) -> float:
        """Share of the fit that is done; 0 where nothing depends on it."""
        if not self.settings.needs_progress:
            return 0.0
        if self._total_batches is None:
            self._total_batches = trainer.estimated_stepping_batches * trainer.accumulate_grad_batches
            if not 0 < self._total_batches < float("inf"):
                raise MisconfigurationException(
                    "the sampler's schedule and continuity_schedule follow the share of the training that is done, and "
                    "this trainer has no end; set max_steps or max_epochs"
                )
        return min(1.0, step_index / self._total_batches)

    def _by_loss(self, module: pl.LightningModule, step_index: int, progress: float) -> list[float] | None:
        if self._losses is None:
            return None
        if self._stored_losses is not None:
            self._losses.load_state_dict(self._stored_losses, device=module.device)
            self._stored_losses = None

        def reduce(sums: torch.Tensor) -> torch.Tensor:
            return module.trainer.strategy.reduce(sums, reduce_op="sum")

        self._losses.update(self.sampler, step=step_index, reduce=reduce)
        return self._losses.probabilities(self.sampler.at(progress))

    def _prove(self, module: pl.LightningModule, step: Callable[[], Any]) -> Injection:
        stored = None if self._choice is None or self.settings.engine != "auto" else self._choice["engine"]
        selection = self.settings.select(module, step, engine=stored)
        trace = selection.trace
        choice = {
            "engine": selection.engine.name,
            "blocks": trace.blocks,
            "head": trace.head,
            "tail": trace.trailing_rows,
        }
        if self._choice is not None and self._choice != choice:
            raise MisconfigurationException(
                f"the checkpoint was trained with {self._choice}, this run would use {choice}; the network or its "
                "loss has changed since: restore it, or start from the weights alone"
            )
        self._choice = choice
        rank_zero_info(f"ReCo: {selection.report}")
        if is_compiled(module):
            self._recompiles.raise_by(len(self.settings.step_kinds) * self.settings.windows_per_batch)
        selection.engine.install()
        return Injection(selection.engine, trace, self.settings.continuity, by_group=self._losses is not None)

    def _uninstall(self) -> None:
        if self._injection is not None:
            self._injection.engine.remove()
        if self._patch is not None:
            self._patch.remove()
        self._recompiles.restore()
        self._injection, self._patch, self._report, self._total_batches = None, None, None, None
        self._waits_for = None


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _check_loss(result: Any, injection: Injection) -> None:
    """Refuses a step that makes more of the logits than their cross-entropy: it has placeholders in their place."""
    if names := injection.derived.names(loss_of(result)):
        raise MisconfigurationException(
            f"the loss of training_step is computed of the logits by {names}, besides their cross-entropy; a windowed "
            "step has those of its window alone: take that term out, or compute it from a forward of its own"
        )
    if result is None and injection.returns_loss and injection.steps == 1:
        raise MisconfigurationException(
            "training_step returned a loss, and None when it was run on a window: it looks at the logits (isnan, a "
            "threshold), of which a windowed step has those of its window alone; look at the loss instead"
        )
