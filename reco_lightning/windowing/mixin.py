# SPDX-License-Identifier: Apache-2.0
"""``ReCoMixin``: windowed training with representation continuity for authors who write their own training step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.windowing.engines.base import Engine
from reco_lightning.windowing.engines.interception import FunctionInterceptor
from reco_lightning.windowing.injection.windowed_step import WindowLoss
from reco_lightning.windowing.rows import WindowOutput
from reco_lightning.windowing.sampler import Window, WindowSampler
from reco_lightning.windowing.settings import ReCoSettings

__all__ = ["ReCoMixin", "WindowStep"]


@dataclass(frozen=True)
class WindowStep:
    """The result of a windowed forward.

    Args:
        hidden: For each group of the batch the states that the head read, (B_g, W_g, D).
        windows: The window of each group.
        output: The engine's own record.
        given: Logits of all rows, (B * L, V), as the network returned them: the windows' rows alone hold values.
        all_targets: Their targets, (B * L,).
        progress: Fraction of the training that is done.
        loss: Computes the loss of such a forward.
    """

    hidden: tuple[torch.Tensor, ...]
    windows: tuple[Window, ...]
    output: WindowOutput
    given: torch.Tensor
    all_targets: torch.Tensor
    progress: float
    loss: WindowLoss

    @property
    def logits(self) -> torch.Tensor:
        """Logits of the windows' rows, (R, V); R is B * W, less B where a first token has nothing to predict it."""
        return self.loss.select(self.output, self.given, self.all_targets)[0]

    @property
    def targets(self) -> torch.Tensor:
        """Targets of the windows' rows, (R,)."""
        return self.loss.select(self.output, self.given, self.all_targets)[1]


class _Slot:
    """Keeps the engine out of copies and pickles of the module."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.loss: WindowLoss | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return _Slot()

    def __reduce__(self) -> tuple[type[_Slot], tuple[()]]:
        return _Slot, ()


class ReCoMixin:
    """Gives a LightningModule (or any module with a training loop) windowed forwards.

    Call ``init_reco`` once, then ``windowed`` and ``reco_loss`` in the training step. Every other forward of the
    network stays plain, in training, validation and sampling.

    Example:
        >>> from reco_lightning import VideoTransformer
        >>> class Model(ReCoMixin, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = VideoTransformer(vocab_size=32, grid=(5, 2, 2), dim=32, depth=2, heads=2)
        ...         self.init_reco(WindowSampler(5, 4))
        >>> model, tokens = Model(), torch.randint(32, (2, 20))
        >>> step = model.windowed(model.network, tokens[:, :-1], targets=tokens, step=0)
        >>> step.logits.shape, step.targets.shape
        (torch.Size([16, 32]), torch.Size([16]))
        >>> model.reco_loss(step).backward()
    """

    def init_reco(self, sampler: WindowSampler, **options: Any) -> None:
        """Sets how the module is windowed.

        Args:
            sampler: The windows.
            **options: Arguments of ``ReCoCallback``, ``loss_aware`` left out: ``continuity_weight``, ``context``,
                ``windows_per_batch``, ``engine``, ``verify`` and the others. ``blocks``, ``head`` and ``prefix_tokens``
                are found if they are left out.

        Raises:
            ValueError: If an argument is out of its range or unknown.
        """
        if unknown := sorted(options.keys() - ReCoSettings.__dataclass_fields__.keys()):
            raise ValueError(
                f"options of init_reco must be among {', '.join(list(ReCoSettings.__dataclass_fields__)[1:])}, got "
                f"{', '.join(unknown)}"
            )
        self._reco_settings = ReCoSettings(sampler, **options)
        self._reco_slot = _Slot()

    def windowed(
        self,
        network: Callable[..., torch.Tensor],
        *args: Any,
        targets: torch.Tensor,
        step: int | None = None,
        progress: float | None = None,
        **kwargs: Any,
    ) -> WindowStep:
        """Runs the network on the step's windows; the first call finds the engine and verifies it on these arguments.

        Args:
            network: The network, or a function that runs it; returns logits (B, L, V).
            *args: Its arguments, those of the plain forward.
            targets: Targets (B, L) of the logits row by row; or all N tokens, (B, N), where the first has no row.
            step: Index of the training batch; ``None`` asks the module's trainer.
            progress: Fraction of the training that is done, 0 to 1; needed where the sampler or the continuity has a
                schedule.
            **kwargs: Its keyword arguments.

        Returns:
            The windows' logits, targets and states.

        Raises:
            ValueError: If logits and targets do not fit, gradients are off, or ``progress`` is missing.
            MisconfigurationException: If the network cannot be windowed exactly; nothing has been changed then.
        """
        settings, slot = self._reco_settings, self._reco_slot
        if progress is None and settings.needs_progress:
            raise ValueError(
                "progress must be given where the sampler or the continuity has a schedule: the fraction of the "
                "training that is done, 0 to 1, got None"
            )
        if not torch.is_grad_enabled():
            raise ValueError("windowed must run with gradients; for validation and sampling call the network itself")
        if step is None:
            step = self.trainer.fit_loop.epoch_loop.total_batch_idx  # type: ignore[attr-defined]
        if slot.engine is None:
            self._reco_install(lambda: F.cross_entropy(*_flatten(network(*args, **kwargs), targets)))
        engine, loss = slot.engine, slot.loss
        assert engine is not None
        assert loss is not None
        windows, attached = settings.draw(step, progress=progress or 0.0)
        engine.activate(windows, attached=attached)
        try:
            with FunctionInterceptor(engine.handlers) if engine.handlers else nullcontext():
                given, all_targets = _flatten(network(*args, **kwargs), targets)
        finally:
            output = engine.finish()
        if output is None:
            raise ValueError("network must run the blocks and the head of its first call in every call of windowed")
        return WindowStep(
            hidden=output.hidden,
            windows=tuple(group.window for group in output.groups),
            output=output,
            given=given,
            all_targets=all_targets,
            progress=progress or 0.0,
            loss=loss,
        )

    def reco_loss(self, step: WindowStep) -> torch.Tensor:
        """Returns the cross-entropy over the windows' tokens plus weighted continuity (Eq. 11).

        Args:
            step: What ``windowed`` returned.

        Returns:
            The scalar loss.
        """
        entropy = step.loss.cross_entropy(0, step.output, step.given, step.all_targets)
        return step.loss.add_continuity({0: entropy}, step.output, progress=step.progress)[0]

    def remove_reco(self) -> None:
        """Leaves the network as it was; the next ``windowed`` starts anew."""
        if self._reco_slot.engine is not None:
            self._reco_slot.engine.remove()
        self._reco_slot = _Slot()

    def _reco_install(self, step: Callable[[], torch.Tensor]) -> None:
        assert isinstance(self, nn.Module)
        settings, slot = self._reco_settings, self._reco_slot
        selection = settings.select(self, step)
        selection.engine.install()
        slot.engine = selection.engine
        slot.loss = WindowLoss(selection.trace.calls, settings.continuity, layout=selection.engine.layout)


def _flatten(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B * L, V) and the targets of their rows (B * L,)."""
    if logits.ndim != 3 or targets.ndim != 2 or targets.shape[1] - logits.shape[1] not in (0, 1):
        raise ValueError(
            f"targets must be (B, L) or (B, L + 1), a token for each row of the logits (B, L, V), got targets "
            f"{tuple(targets.shape)} and logits {tuple(logits.shape)}"
        )
    return logits.flatten(0, 1), targets[:, -logits.shape[1] :].flatten()
