# SPDX-License-Identifier: Apache-2.0
"""``ReCoCallback``: windowed training with representation continuity for any LightningModule (arXiv 2604.07402).

Last stage of the pipeline ``windows -> continuity -> engines -> callback``. Only training is changed, and only between
``on_fit_start`` and ``teardown`` or an exception.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from reco_lightning.checks import check_finite, check_switch, check_whole
from reco_lightning.continuity import Continuity, ContinuityNorm, ContinuitySchedule
from reco_lightning.engines.base import Context
from reco_lightning.engines.compiled import RecompileLimit, is_compiled
from reco_lightning.engines.interception import PatchedMethod
from reco_lightning.engines.rehearsal import Hints
from reco_lightning.engines.select import ENGINES, Selection, select_engine
from reco_lightning.injection import Injection, StepReport
from reco_lightning.loss_aware import RunningLosses
from reco_lightning.windows import Window, WindowSampler

__all__ = ["ReCoCallback", "StepKind"]


@dataclass(frozen=True)
class StepKind:
    """One kind of training step.

    Args:
        window: What it optimises.
        attached: Tokens in front of the window that are trained through.
        probability: Share of the training's steps that are of this kind.
    """

    window: Window
    attached: int
    probability: float


class ReCoCallback(pl.Callback):
    """Makes every training step optimise a window of the video's tokens over a frozen context (Eq. 6 and 11).

    Add it to a trainer and change nothing else. On the first batch of a fit it rehearses the training step to find the
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
        engine: Literal["auto", "frozen", "cache", "prefix", "masked"] = "auto",
        network: str | None = None,
        blocks: str | None = None,
        head: str | None = None,
        prefix_tokens: int | None = None,
        verify: bool = True,
        chunked_loss: bool = True,
    ) -> None:
        if not isinstance(sampler, WindowSampler):
            raise ValueError(f"sampler must be a WindowSampler, got {type(sampler).__name__}")
        for name, value, allowed in (
            ("context", context, get_args(Context)),
            ("engine", engine, ("auto", *ENGINES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if isinstance(windows_per_batch, bool) or not isinstance(windows_per_batch, int) or windows_per_batch < 1:
            raise ValueError(f"windows_per_batch must be a whole number of 1 or more, got {windows_per_batch!r}")
        check_finite(attached_share=attached_share, loss_aware=loss_aware)
        check_switch(verify=verify, chunked_loss=chunked_loss)
        check_whole(prefix_tokens=prefix_tokens, or_none=True)
        for name, part in (("network", network), ("blocks", blocks), ("head", head)):
            if part is not None and not isinstance(part, str):
                raise ValueError(f"{name} must be the name of a part of the module, or None to find it, got {part!r}")
        if prefix_tokens is not None and prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be 0 or more, or None to find it, got {prefix_tokens}")
        if isinstance(attached_blocks, bool) or not isinstance(attached_blocks, int) or attached_blocks < 0:
            raise ValueError(f"attached_blocks must be a whole number of 0 or more, got {attached_blocks!r}")
        if attached_blocks and context in ("attached", "dropped"):
            raise ValueError(
                f"attached_blocks={attached_blocks} needs context='frozen' or 'keys', got {context!r}, where all or "
                "nothing of the context is trained through"
            )
        if not 0 < attached_share <= 1:
            raise ValueError(
                f"attached_share must lie in (0, 1], got {attached_share!r}; attached_blocks=0 attaches nothing"
            )
        self.continuity = Continuity(
            continuity_weight, continuity_norm, continuity_lag, continuity_schedule, continuity_balanced
        )
        shortest = sampler.window_tokens - 1  # of the first window, where nothing predicts the first token
        if continuity_weight and continuity_lag >= shortest:
            raise ValueError(
                f"continuity compares states {continuity_lag} apart and needs windows of {continuity_lag + 2} tokens "
                f"or more, got {sampler.window_tokens}; widen the window, or set continuity_weight=0"
            )
        self.sampler = sampler
        self.context = context
        self.windows_per_batch = windows_per_batch
        self.attached_blocks = attached_blocks
        self.attached_share = attached_share
        self.engine = engine
        self.hints = Hints(network, blocks, head, prefix_tokens)
        self.verify = verify
        self.chunked_loss = chunked_loss
        self.windows: tuple[Window, ...] = ()  # of the last step
        self._patch: PatchedMethod | None = None
        self._injection: Injection | None = None
        self._report: StepReport | None = None
        self._choice: dict[str, Any] | None = None
        self._losses = RunningLosses(loss_aware) if loss_aware else None
        self._stored_losses: dict[str, Any] | None = None
        self._total_batches: float | None = None
        self._recompiles = RecompileLimit()

    @override
    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Checks what can be checked without a batch and takes the place of ``training_step``."""
        _check_module(pl_module)
        if sum(isinstance(callback, ReCoCallback) for callback in _callbacks(trainer)) > 1:
            raise MisconfigurationException("the trainer has two ReCoCallbacks; one window rules a step: remove one")
        if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
            raise MisconfigurationException(
                "training_step(dataloader_iter) fetches its batches itself, so the first one cannot be rehearsed; "
                "let it take batch and batch_idx"
            )
        if self.sampler.never_trained:
            rank_zero_warn(
                f"stride_blocks={self.sampler.stride_blocks} never reaches the last {self.sampler.never_trained} "
                "tokens of a video: they are not trained"
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
            self._injection.engine.disarm()
        if self._report is not None:
            if self._losses is not None:
                for window, loss in self._report.losses:
                    self._losses.add(window, loss)
            loss = self._report.cross_entropy
            values = {
                "reco/cross_entropy": loss,
                "reco/continuity": self._report.continuity,
                # filled on the device: a number would be copied there, and the copy waited for
                "reco/window_start": loss.new_full((), self._report.window_start, dtype=torch.float32),
            }
            pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
            self._report = None

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
        """The engine and the modules that were chosen, so that a resumed run uses the same ones."""
        state: dict[str, Any] = {"choice": self._choice} if self._choice else {}
        if self._losses is not None:
            state["losses"] = self._losses.state_dict()
        return state

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the choice back from a checkpoint; the first batch proves it anew."""
        self._choice = state_dict.get("choice")
        self._stored_losses = state_dict.get("losses")

    @property
    def attached_tokens(self) -> int:
        """Tokens in front of a window that are trained through, in the steps in which any are."""
        return self.attached_blocks * self.sampler.tokens_per_block

    @property
    def step_kinds(self) -> tuple[StepKind, ...]:
        """All kinds of steps of a training and their shares; windows drawn by their loss count as the sampler has them.

        Example:
            >>> kinds = ReCoCallback(WindowSampler(3, 4), attached_blocks=1, attached_share=0.5).step_kinds
            >>> [(kind.window.start, kind.attached, kind.probability) for kind in kinds]
            [(0, 4, 0.25), (0, 0, 0.25), (4, 4, 0.25), (4, 0, 0.25)]
        """
        attached = self.attached_tokens
        choices = [(attached, self.attached_share), (0, 1 - self.attached_share)] if attached else [(0, 1.0)]
        shares: dict[tuple[Window, int], float] = {}
        ends = [*(begin for begin, _ in self.sampler.stages[1:]), 1.0]
        for (begin, stage), end in zip(self.sampler.stages, ends, strict=True):
            for window, probability in zip(stage.windows, stage.probabilities, strict=True):
                for tokens, share in choices:
                    if share:
                        kind = (window, tokens)
                        shares[kind] = shares.get(kind, 0.0) + (end - begin) * probability * share
        return tuple(StepKind(window, tokens, share) for (window, tokens), share in shares.items())

    def select(self, module: pl.LightningModule, step: Callable[[], Any]) -> Selection:
        """Finds and proves the engine for a module; nothing is installed.

        Args:
            module: The LightningModule.
            step: Runs its training step on the batch at hand.

        Returns:
            The engine and how it was found.

        Raises:
            MisconfigurationException: If the module cannot be windowed exactly.
        """
        _check_module(module)
        return select_engine(
            module,
            step,
            self.sampler,
            hints=self.hints,
            context=self.context,
            windows_per_batch=self.windows_per_batch,
            attached=self.attached_tokens,
            engine=self.engine if self._choice is None or self.engine != "auto" else self._choice["engine"],
            verify=self.verify,
            chunked_loss=self.chunked_loss,
        )

    def _training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._patch is not None
        module = self._patch.module
        assert isinstance(module, pl.LightningModule)

        def step() -> Any:
            return original(*args, **kwargs)

        first = self._injection is None
        if self._injection is None:
            self._injection = self._prove(module, step)
        step_index = module.trainer.fit_loop.epoch_loop.total_batch_idx
        progress = self._progress(module.trainer, step_index)
        windows = self.sampler.sample_groups(
            step_index,
            self.windows_per_batch,
            progress=progress,
            probabilities=self._by_loss(module, step_index, progress),
        )
        self.windows = tuple(windows)
        attached = self.attached_tokens
        if attached and self.attached_share < 1:
            source = random.Random(f"{self.sampler.seed}:{step_index}:attached")
            attached = attached if source.random() < self.attached_share else 0
        result, self._report = self._injection.run(windows, step, attached=attached, progress=progress)
        if first and self._report is not None:
            _check_loss(result, self._report)
        return result

    def _progress(self, trainer: pl.Trainer, step_index: int) -> float:
        """Share of the fit that is done; 0 where nothing depends on it."""
        if not self.sampler.schedule and self.continuity.schedule == "constant":
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

        self._losses.look(self.sampler, step=step_index, reduce=reduce)
        return self._losses.probabilities(self.sampler.at(progress))

    def _prove(self, module: pl.LightningModule, step: Callable[[], Any]) -> Injection:
        selection = self.select(module, step)
        trace = selection.trace
        choice = {"engine": selection.engine.name, "blocks": trace.blocks, "head": trace.head, "tail": trace.tail}
        if self._choice is not None and self._choice != choice:
            raise MisconfigurationException(
                f"the checkpoint was trained with {self._choice}, this run would use {choice}; the network or its "
                "loss has changed since: restore it, or start from the weights alone"
            )
        self._choice = choice
        rank_zero_info(f"ReCo: {selection.report}")
        if is_compiled(module):
            self._recompiles.raise_by(len(self.step_kinds) * self.windows_per_batch)
        selection.engine.install()
        return Injection(selection.engine, trace, self.continuity, by_group=self._losses is not None)

    def _uninstall(self) -> None:
        if self._injection is not None:
            self._injection.engine.remove()
        if self._patch is not None:
            self._patch.remove()
        self._recompiles.restore()
        self._injection, self._patch, self._report, self._total_batches = None, None, None, None


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


def _check_loss(result: Any, report: StepReport) -> None:
    """Refuses a step whose loss has more of the logits in it than their cross-entropy: they are NaN to it."""
    loss = result.get("loss") if isinstance(result, Mapping) else result
    if isinstance(loss, torch.Tensor) and loss.isnan().any() and not report.cross_entropy.isnan():
        raise MisconfigurationException(
            "the loss of the first windowed step is NaN and its cross-entropy is not: the step makes another loss of "
            "the logits (a penalty on them, a distance to a teacher's), which windows leave out; take it away, or "
            "make a metric of it, from a forward under torch.no_grad()"
        )


def _check_module(module: Any) -> None:
    if isinstance(module, pl.LightningModule):
        return
    other = any(cls.__module__.startswith("pytorch_lightning.") for cls in type(module).__mro__)
    remedy = (
        "it is a module of the package 'pytorch_lightning': import lightning.pytorch in its place, for module and "
        "trainer alike"
        if other
        else "wrap the network in one"
    )
    raise MisconfigurationException(
        f"ReCoCallback serves modules of lightning.pytorch.LightningModule, got {type(module).__name__}; {remedy}"
    )
