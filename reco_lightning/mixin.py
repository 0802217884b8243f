# SPDX-License-Identifier: Apache-2.0
"""``ReCoMixin``: windowed training with representation continuity for authors who write their own training step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.checks import check_finite, check_switch, check_whole
from reco_lightning.continuity import ContinuityNorm
from reco_lightning.engines.base import Context, Engine, WindowOutput
from reco_lightning.engines.frozen import FrozenEngine
from reco_lightning.injection import mean_continuity
from reco_lightning.windows import Window, WindowSampler

__all__ = ["ReCoMixin", "WindowStep"]


@dataclass(frozen=True)
class WindowStep:
    """What a windowed forward gives.

    Args:
        logits: Logits of the windows' rows, (R, V); R is B * W, less B where a first token has nothing to predict it.
        targets: Their targets, (R,).
        hidden: For each group of the batch the states that the head read, (B_g, W_g, D).
        windows: The window of each group.
        output: The engine's own record.
    """

    logits: torch.Tensor
    targets: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    windows: tuple[Window, ...]
    output: WindowOutput


class _Slot:
    """Keeps the engine out of copies and pickles of the module."""

    def __init__(self) -> None:
        self.engine: Engine | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Slot:
        return _Slot()

    def __reduce__(self) -> tuple[type[_Slot], tuple[()]]:
        return _Slot, ()


class ReCoMixin:
    """Gives a LightningModule (or any module with a training loop) windowed forwards.

    Call ``init_reco`` once, then ``windowed`` and ``reco_loss`` in the training step. Forwards without gradient, in
    validation and sampling, stay plain.

    Example:
        >>> from reco_lightning import VideoTransformer
        >>> class Model(ReCoMixin, nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.network = VideoTransformer(vocab_size=32, grid=(5, 2, 2), dim=32, depth=2, heads=2)
        ...         self.init_reco(WindowSampler(5, 4), blocks="network.blocks", head="network.head", prefix_tokens=1)
        >>> model, tokens = Model(), torch.randint(32, (2, 20))
        >>> step = model.windowed(model.network, tokens[:, :-1], targets=tokens, step=0)
        >>> step.logits.shape, step.targets.shape
        (torch.Size([16, 32]), torch.Size([16]))
        >>> model.reco_loss(step).backward()
    """

    def init_reco(
        self,
        sampler: WindowSampler,
        *,
        blocks: str,
        head: str,
        prefix_tokens: int,
        continuity_weight: float = 0.1,
        continuity_norm: ContinuityNorm = "mean",
        context: Context = "frozen",
        windows_per_batch: int = 1,
        verify: bool = True,
    ) -> None:
        """Says how the module is windowed.

        Args:
            sampler: The windows.
            blocks: Name of the ``ModuleList`` or ``Sequential`` of the network's blocks.
            head: Name of the module that maps states to logits.
            prefix_tokens: P, rows of the network's sequence in front of the video tokens.
            continuity_weight: Lambda of Eq. 11, 0 or more.
            continuity_norm: ``"mean"`` or ``"sum"``.
            context: ``"frozen"``, ``"keys"`` or ``"attached"``.
            windows_per_batch: Groups of the batch with a window each, 1 or more.
            verify: Whether the first windowed forward is compared with the plain one.

        Raises:
            ValueError: If an argument is out of its range.
        """
        if not isinstance(sampler, WindowSampler):
            raise ValueError(f"sampler must be a WindowSampler, got a {type(sampler).__name__}")
        for name, value in (("blocks", blocks), ("head", head)):
            if not isinstance(value, str):
                raise ValueError(f"{name} must be the name of a part of the module, got {value!r}")
        if continuity_norm not in get_args(ContinuityNorm):
            raise ValueError(f"continuity_norm must be 'mean' or 'sum', got {continuity_norm!r}")
        check_whole(prefix_tokens=prefix_tokens, windows_per_batch=windows_per_batch)
        check_finite(continuity_weight=continuity_weight)
        check_switch(verify=verify)
        if context not in ("frozen", "keys", "attached"):
            raise ValueError(
                f"context must be 'frozen', 'keys' or 'attached' in the mixin, got {context!r}; for fewer frames feed "
                "the network the window's tokens alone"
            )
        if not 0 <= continuity_weight < float("inf"):
            raise ValueError(f"continuity_weight must be a finite number of 0 or more, got {continuity_weight!r}")
        if prefix_tokens < 0:
            raise ValueError(f"prefix_tokens must be 0 or more, got {prefix_tokens}")
        if windows_per_batch < 1:
            raise ValueError(f"windows_per_batch must be 1 or more, got {windows_per_batch}")
        self._reco_sampler = sampler
        self._reco_names = (blocks, head)
        self._reco_prefix = prefix_tokens
        self._reco_weight = continuity_weight
        self._reco_norm: ContinuityNorm = continuity_norm
        self._reco_context: Context = context
        self._reco_groups = windows_per_batch
        self._reco_verify = verify
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
        """Runs the network on the step's windows.

        Args:
            network: The network, or a function that runs it; returns logits (B, L, V).
            *args: Its arguments, those of the plain forward.
            targets: Targets (B, L) of the logits row by row; or all N tokens, (B, N), where the first has no row.
            step: Index of the training batch; ``None`` asks the module's trainer.
            progress: Share of the training that is done, 0 to 1; needed where the sampler has a schedule.
            **kwargs: Its keyword arguments.

        Returns:
            The windows' logits, targets and states.

        Raises:
            ValueError: If logits and targets do not fit, or the windowed forward differs from the plain one.
        """
        if progress is None and self._reco_sampler.schedule:
            raise ValueError(
                "progress must be given where the sampler has a schedule: the share of the training that is done, 0 to "
                "1, got None"
            )
        slot = self._reco_slot
        if slot.engine is None:
            slot.engine = self._reco_engine(network, args, kwargs, targets)
        if step is None:
            step = self.trainer.fit_loop.epoch_loop.total_batch_idx  # type: ignore[attr-defined]
        windows = self._reco_sampler.sample_groups(step, self._reco_groups, progress=progress or 0.0)
        slot.engine.arm(windows)
        return self._reco_rows(slot.engine, network(*args, **kwargs), targets)

    def reco_loss(self, step: WindowStep) -> torch.Tensor:
        """Cross-entropy over the windows' tokens plus weighted continuity (Eq. 11).

        Args:
            step: What ``windowed`` returned.

        Returns:
            The scalar loss.
        """
        loss = F.cross_entropy(step.logits, step.targets)
        if not self._reco_weight:
            return loss
        return loss + self._reco_weight * mean_continuity(step.output, self._reco_norm)

    def remove_reco(self) -> None:
        """Leaves the network as it was; the next ``windowed`` starts anew."""
        if self._reco_slot.engine is not None:
            self._reco_slot.engine.remove()
        self._reco_slot = _Slot()

    def _reco_rows(self, engine: Engine, logits: torch.Tensor, targets: torch.Tensor) -> WindowStep:
        output = engine.output
        if output is None:
            raise ValueError(f"the head {self._reco_names[1]!r} was not reached by the network's forward")
        targets = targets[:, -logits.shape[1] :]
        missing = self._reco_sampler.tokens - logits.shape[1]  # tokens at the start that no row predicts
        spans = [
            (group.samples, slice(max(group.window.start - missing, 0), group.window.stop - missing))
            for group in output.groups
        ]
        return WindowStep(
            logits=torch.cat([logits[span].flatten(0, 1) for span in spans]),
            targets=torch.cat([targets[span].flatten() for span in spans]),
            hidden=output.hidden,
            windows=tuple(group.window for group in output.groups),
            output=output,
        )

    def _reco_engine(
        self,
        network: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: torch.Tensor,
    ) -> Engine:
        assert isinstance(self, nn.Module)
        blocks = list(self.get_submodule(self._reco_names[0]).children())
        head = self.get_submodule(self._reco_names[1])
        seen: dict[str, int] = {}
        hook = blocks[0].register_forward_pre_hook(lambda _module, inputs: seen.update(rows=inputs[0].shape[1]))
        training = [(part, part.training) for part in self.modules()]
        try:
            with torch.no_grad(), torch.random.fork_rng():
                self.eval()
                plain = network(*args, **kwargs)
                tokens = self._reco_sampler.tokens
                tail = seen["rows"] - (self._reco_prefix + tokens - 1)
                if (
                    tail not in (0, 1)
                    or plain.ndim != 3
                    or targets.shape[1] not in (plain.shape[1], plain.shape[1] + 1)
                ):
                    raise ValueError(
                        f"prefix_tokens={self._reco_prefix} and frame_blocks x tokens_per_block = {tokens} do not fit "
                        f"a network with {seen['rows']} rows, logits {tuple(plain.shape)} and targets "
                        f"{tuple(targets.shape)}; targets must name the token of each row of logits"
                    )
                engine = FrozenEngine(
                    blocks, head, tokens=tokens, tail=tail, context=self._reco_context, recompute=True, fill=0.0
                )
                engine.install()
                if self._reco_verify:
                    self._reco_prove(engine, plain, network, args, kwargs, targets)
                return engine
        finally:
            hook.remove()
            for part, flag in training:
                part.training = flag
            torch.clear_autocast_cache()

    def _reco_prove(
        self,
        engine: Engine,
        plain: torch.Tensor,
        network: Callable[..., torch.Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        targets: torch.Tensor,
    ) -> None:
        allowed = 1e-3 if plain.dtype in (torch.float32, torch.float64) else 5e-2
        for window in {self._reco_sampler.windows[0], self._reco_sampler.windows[-1]}:
            engine.arm([window], inference=True)
            own = self._reco_rows(engine, network(*args, **kwargs), targets)
            missing = self._reco_sampler.tokens - plain.shape[1]
            reference = plain[:, max(window.start - missing, 0) : window.stop - missing].flatten(0, 1)
            if own.logits.isnan().any():
                engine.remove()
                raise ValueError(
                    f"the rows of the window are not those of the targets: prefix_tokens={self._reco_prefix} is "
                    "wrong, or the targets do not name the token of each row of logits"
                )
            error = float((own.logits.float() - reference.float()).abs().max() / reference.float().abs().max())
            if not error <= allowed:
                engine.remove()
                raise ValueError(
                    f"on {window} the windowed logits differ from the plain ones by {error:.1e} of the largest, where "
                    f"{allowed:.0e} is allowed; blocks={self._reco_names[0]!r}, head={self._reco_names[1]!r} and "
                    f"prefix_tokens={self._reco_prefix} must be the network's own, its attention causal and by "
                    "torch.nn.functional.scaled_dot_product_attention"
                )
        engine.disarm()
