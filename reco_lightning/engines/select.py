# SPDX-License-Identifier: Apache-2.0
"""Picks the engine for a network and proves it on the batch at hand: plain and windowed forward must agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning.cross_entropy import select_rows
from reco_lightning.engines.base import Context, Engine
from reco_lightning.engines.dropped import DroppedEngine
from reco_lightning.engines.frozen import FrozenEngine
from reco_lightning.engines.rehearsal import Hints, Trace, block_stacks, rehearse
from reco_lightning.engines.sandbox import Sandbox, StepEndedError
from reco_lightning.windows import Window, WindowSampler

__all__ = ["ENGINES", "Selection", "build_engine", "prove", "select_engine"]

ENGINES = ("frozen",)
"""The engines in the order in which they are tried."""


@dataclass(frozen=True)
class Selection:
    """An engine that was proved on a network, and how the network was found.

    Args:
        engine: The engine, not yet installed.
        trace: What the rehearsal found.
        error: Largest difference of plain and windowed states in the proof, relative to the largest state; ``None``
            without a proof.
        report: One line on what was chosen and why.
    """

    engine: Engine
    trace: Trace
    error: float | None
    report: str


def build_engine(module: pl.LightningModule, trace: Trace, *, tokens: int, context: Context) -> Engine:
    """Builds the engine that fits what the rehearsal found.

    Args:
        module: The LightningModule.
        trace: What the rehearsal found.
        tokens: N, video tokens of a sample.
        context: What the context is to the window.

    Raises:
        MisconfigurationException: If no engine runs the network with this context.
    """
    blocks = block_stacks(module)[trace.blocks]
    head = module.get_submodule(trace.head)
    if context == "dropped":
        network = module.get_submodule(trace.network)
        return DroppedEngine(network, head, tokens=tokens, tail=trace.tail, rows=trace.rows)
    if context != "attached" and not trace.attention:
        raise MisconfigurationException(
            f"the blocks '{trace.blocks}' ({type(blocks[0]).__name__}) attend without "
            "torch.nn.functional.scaled_dot_product_attention, which the engine 'frozen' needs; let them attend by "
            "it (with transformers: attn_implementation='sdpa'), or set context='attached'"
        )
    return FrozenEngine(blocks, head, tokens=tokens, tail=trace.tail, context=context, recompute=trace.recomputed)


def prove(
    engine: Engine, trace: Trace, sandbox: Sandbox, runs: Sequence[Sequence[Window]], *, exact: bool = True
) -> float:
    """Runs the step on windows without a trace and compares with the plain run: states, and rows of the loss.

    Args:
        engine: The engine, installed.
        trace: What the plain run left.
        sandbox: Where the step can be run.
        runs: The windows to try, for each run one per group of the batch.
        exact: Whether the states must equal the plain run's on every window, or (a dropped context changes the others
            by intent) on those that start the video.

    Returns:
        The largest difference of states, relative to the largest state.

    Raises:
        MisconfigurationException: If the windowed step differs from the plain one.
    """
    worst = 0.0
    for windows in runs:
        engine.arm(windows, inference=True)
        try:
            logits, target = _own_loss(trace, sandbox)
            worst = max(worst, _compare(engine, trace, logits, target, exact=exact))
        except (RuntimeError, TypeError, ValueError, StopIteration) as error:
            raise MisconfigurationException(
                f"the engine '{engine.name}' failed on {_names(windows)} of the first batch: {error}; blocks "
                f"'{trace.blocks}', head '{trace.head}'; set blocks= or head= if these are the wrong ones"
            ) from error
        finally:
            engine.disarm()
    return worst


def _own_loss(trace: Trace, sandbox: Sandbox) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the step up to the network's own cross-entropy and returns what that is given."""
    calls = 0
    given: list[torch.Tensor] = []

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls <= trace.call:
            return F.cross_entropy(logits, target, *args, **kwargs)
        given.extend((logits, target))
        raise StepEndedError

    with torch.no_grad():
        sandbox.run(cross_entropy)
    if not given:
        raise RuntimeError("the training step did not reach its cross-entropy a second time")
    return given[0], given[1]


def _compare(engine: Engine, trace: Trace, logits: torch.Tensor, target: torch.Tensor, *, exact: bool) -> float:
    output = engine.output
    if output is None:
        raise MisconfigurationException(f"the head '{trace.head}' was not reached by the windowed step")
    groups, batch = output.groups, output.batch
    names = _names([group.window for group in groups])
    offset = trace.rows - trace.loss_tail - target.numel() // batch
    own, _ = select_rows(logits, target, groups, batch=batch, offset=offset)
    others = int(logits.isnan().any(dim=1 if logits.ndim > 2 else -1).sum())
    whole = not others and all(len(group.window) == engine.tokens for group in groups)
    if own.isnan().any() or (not whole and others + own.shape[0] != target.numel()):
        raise MisconfigurationException(
            f"on {names} the rows of the loss are not the rows of the window: {others} of {target.numel()} rows lie "
            f"outside it where {target.numel() - own.shape[0]} should; set prefix_tokens= if the prefix was taken for "
            f"{trace.prefix(engine.tokens)} rows wrongly"
        )
    error = 0.0
    for group, hidden in zip(groups, output.hidden, strict=True):
        if not exact and group.window.start > 0:
            continue
        single, _ = select_rows(logits, target, [group], batch=batch, offset=offset)
        plain, _ = select_rows(trace.logits, target, [group], batch=batch, offset=offset)
        states = trace.hidden[group.samples, group.loss_start : group.stop]
        error = max(error, _difference(hidden, states), _difference(single, plain))
    allowed = 1e-3 if logits.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled() else 5e-2
    if not error <= allowed:
        raise MisconfigurationException(
            f"on {names} the windowed states differ from the plain ones by {error:.1e} of the largest state, where "
            f"{allowed:.0e} is allowed: something in the blocks '{trace.blocks}' lets a row see later rows (attention "
            "that is not causal), or mixes rows outside attention; such a network cannot be windowed by the engine "
            f"'{engine.name}'"
        )
    return error


def _names(windows: Sequence[Window]) -> str:
    return ", ".join(map(str, dict.fromkeys(windows)))


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))


def select_engine(
    module: pl.LightningModule,
    step: Callable[[], Any],
    sampler: WindowSampler,
    *,
    hints: Hints,
    context: Context,
    windows_per_batch: int = 1,
    engine: str = "auto",
    verify: bool = True,
) -> Selection:
    """Finds blocks, head and rows, picks an engine, and proves it on the first and the last window.

    Args:
        module: The LightningModule.
        step: Runs its training step on the batch at hand.
        sampler: The windows.
        hints: What the user names.
        context: What the context is to the window.
        windows_per_batch: Groups of the batch; above 1 a run with groups is proved too.
        engine: ``"auto"`` or the name of an engine.
        verify: Whether to prove the choice.

    Returns:
        The engine, not installed, with the findings.

    Raises:
        MisconfigurationException: If nothing fits; nothing has been changed then.
    """
    trace, sandbox = rehearse(module, step, tokens=sampler.tokens, hints=hints)
    chosen = build_engine(module, trace, tokens=sampler.tokens, context=context)
    if engine not in ("auto", chosen.name):
        raise MisconfigurationException(
            f"engine={engine!r} cannot serve context={context!r}, which runs on '{chosen.name}'; set engine='auto'"
        )
    error = None
    if verify:
        windows = sampler.windows
        runs = [[windows[index]] for index in sorted({0, len(windows) - 1})]
        if windows_per_batch > 1:
            runs.append([windows[group * len(windows) // windows_per_batch] for group in range(windows_per_batch)])
        chosen.install()
        try:
            error = prove(chosen, trace, sandbox, runs, exact=context != "dropped")
        finally:
            chosen.remove()
    network = trace.network or type(module).__name__
    compared = "first window equals" if context == "dropped" else "first and last window equal"
    proof = "not verified" if error is None else f"{compared} the plain forward to {error:.0e}"
    report = (
        f"engine '{chosen.name}', context '{context}', on network '{network}': "
        f"{len(block_stacks(module)[trace.blocks])} blocks "
        f"'{trace.blocks}', head '{trace.head}', {trace.prefix(sampler.tokens)} prefix rows + {sampler.tokens} video "
        f"tokens; {proof}"
    )
    return Selection(chosen, trace, error, report)
