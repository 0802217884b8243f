# SPDX-License-Identifier: Apache-2.0
"""``ReCoCallback``: windowed training with representation continuity for any LightningModule (arXiv 2604.07402).

Last stage of the pipeline ``windows -> continuity -> engines -> callback``. Only training is changed, and only between
``on_fit_start`` and ``teardown`` or an exception.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from typing_extensions import override

from reco_lightning.continuity import ContinuityNorm
from reco_lightning.engines.base import Context
from reco_lightning.engines.compiled import RecompileLimit, is_compiled
from reco_lightning.engines.interception import PatchedMethod
from reco_lightning.engines.rehearsal import Hints
from reco_lightning.engines.select import ENGINES, Selection, select_engine
from reco_lightning.injection import Injection, StepReport
from reco_lightning.windows import WindowSampler

__all__ = ["ReCoCallback"]


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
        engine: ``"auto"``, which takes the first of ``"frozen"``, ``"cache"``, ``"prefix"`` and ``"masked"`` that is
            proved on the first batch (in a resumed run the one that was trained with), or the name of one.
        network: Name of the network inside the module, where several hold blocks.
        blocks: Name of the ``ModuleList`` or ``Sequential`` of blocks, where it is not found.
        head: Name of the module that makes the logits, where it is not found.
        prefix_tokens: Rows in front of the video tokens (class, start token, text), where the loss covers them too.
        verify: Whether to prove the windowed forward on the first batch of every fit.

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
        engine: Literal["auto", "frozen", "cache", "prefix", "masked"] = "auto",
        network: str | None = None,
        blocks: str | None = None,
        head: str | None = None,
        prefix_tokens: int | None = None,
        verify: bool = True,
    ) -> None:
        if not isinstance(sampler, WindowSampler):
            raise ValueError(f"sampler must be a WindowSampler, got {type(sampler).__name__}")
        if isinstance(continuity_weight, bool) or not 0 <= continuity_weight < float("inf"):
            raise ValueError(f"continuity_weight must be a finite number of 0 or more, got {continuity_weight!r}")
        for name, value, allowed in (
            ("continuity_norm", continuity_norm, get_args(ContinuityNorm)),
            ("context", context, get_args(Context)),
            ("engine", engine, ("auto", *ENGINES)),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
        if isinstance(windows_per_batch, bool) or not isinstance(windows_per_batch, int) or windows_per_batch < 1:
            raise ValueError(f"windows_per_batch must be a whole number of 1 or more, got {windows_per_batch!r}")
        if prefix_tokens is not None and prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be 0 or more, or None to find it, got {prefix_tokens}")
        if continuity_weight and sampler.window_tokens < 3:
            raise ValueError(
                f"continuity compares neighbours and needs windows of 3 tokens or more, got {sampler.window_tokens}; "
                "widen the window, or set continuity_weight=0"
            )
        self.sampler = sampler
        self.continuity_weight = continuity_weight
        self.continuity_norm = continuity_norm
        self.context = context
        self.windows_per_batch = windows_per_batch
        self.engine = engine
        self.hints = Hints(network, blocks, head, prefix_tokens)
        self.verify = verify
        self._patch: PatchedMethod | None = None
        self._injection: Injection | None = None
        self._report: StepReport | None = None
        self._choice: dict[str, Any] | None = None
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
            values: dict[str, torch.Tensor | float] = {
                "reco/cross_entropy": self._report.cross_entropy,
                "reco/continuity": self._report.continuity,
                "reco/window_start": self._report.window_start,
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
        return {"choice": self._choice} if self._choice else {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the choice back from a checkpoint; the first batch proves it anew."""
        self._choice = state_dict.get("choice")

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
            engine=self.engine if self._choice is None or self.engine != "auto" else self._choice["engine"],
            verify=self.verify,
        )

    def _training_step(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        assert self._patch is not None
        module = self._patch.module
        assert isinstance(module, pl.LightningModule)

        def step() -> Any:
            return original(*args, **kwargs)

        if self._injection is None:
            self._injection = self._prove(module, step)
        windows = self.sampler.sample_groups(module.trainer.fit_loop.epoch_loop.total_batch_idx, self.windows_per_batch)
        result, self._report = self._injection.run(windows, step)
        return result

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
            self._recompiles.raise_by(len(self.sampler.windows) * self.windows_per_batch)
        selection.engine.install()
        return Injection(selection.engine, trace, weight=self.continuity_weight, norm=self.continuity_norm)

    def _uninstall(self) -> None:
        if self._injection is not None:
            self._injection.engine.remove()
        if self._patch is not None:
            self._patch.remove()
        self._recompiles.restore()
        self._injection, self._patch, self._report = None, None, None


def _callbacks(trainer: pl.Trainer) -> list[pl.Callback]:
    return list(trainer.callbacks)  # type: ignore[attr-defined]


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
