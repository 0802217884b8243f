# SPDX-License-Identifier: Apache-2.0
"""Verifies an engine: on the first batch, the states and loss rows of each window equal the plain step's."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning.windowing.engines.base import Engine
from reco_lightning.windowing.injection.dry_run import DryRun
from reco_lightning.windowing.injection.loss_calls import LossCall
from reco_lightning.windowing.injection.step_trace import Trace
from reco_lightning.windowing.losses.cross_entropy import select_rows
from reco_lightning.windowing.sampler import Window

__all__ = ["verify_engine"]


def verify_engine(
    engine: Engine,
    trace: Trace,
    dry_run: DryRun,
    runs: Sequence[Sequence[Window]],
    *,
    attached: int = 0,
    exact: bool = True,
) -> float:
    """Runs the step on windows without a trace and compares with the plain run: states, and rows of the loss.

    Args:
        engine: The engine, installed.
        trace: What the plain run left.
        dry_run: Where the step can be run.
        runs: The windows to try, for each run one per group of the batch.
        attached: Tokens in front of each window that are to be trained through.
        exact: Whether the states must equal the plain run's on every window, or (a dropped context changes the others
            by intent) on those that start the video.

    Returns:
        The largest difference of states, relative to the largest state.

    Raises:
        MisconfigurationException: If the windowed step differs from the plain one.
    """
    worst = 0.0
    for windows in runs:
        engine.activate(windows, attached=attached, inference=True)
        try:
            given = dry_run.losses([call.number for call in trace.calls], engine.handlers)
            for call, (logits, target) in zip(trace.calls, given, strict=True):
                worst = max(worst, _compare(engine, trace, call, logits, target, exact=exact))
        except MisconfigurationException:
            raise
        except Exception as error:
            if "Connection closed" in str(error):  # another rank has ended; its own message says why
                raise
            raise MisconfigurationException(
                f"the engine '{engine.name}' failed on {_names(windows)} of the first batch: {error}; blocks "
                f"'{trace.blocks}', head '{trace.head}'; set blocks= or head= if these are the wrong ones"
            ) from error
        finally:
            engine.deactivate()
    return worst


def _compare(
    engine: Engine,
    trace: Trace,
    call: LossCall,
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    exact: bool,
) -> float:
    output = engine.output
    if output is None:
        raise MisconfigurationException(f"the head '{trace.head}' was not reached by the windowed step")
    groups, batch = output.groups, output.batch
    names = _names([group.window for group in groups])
    rows = call.loss_rows(trace.rows, call.length)
    own, _ = select_rows(logits, target, groups, batch=batch, rows=rows)
    others = int(logits.isnan().any(dim=1 if logits.ndim > 2 else -1).sum())
    whole = not others and all(len(group.window) == engine.layout.tokens for group in groups)
    if own.isnan().any() or (not whole and others + own.shape[0] != target.numel()):
        raise MisconfigurationException(
            f"on {names} the rows of the loss are not the rows of the window: {others} of {target.numel()} rows lie "
            f"outside it where {target.numel() - own.shape[0]} should; set prefix_tokens= if the prefix was taken for "
            f"{engine.layout.prefix(trace.rows)} rows wrongly"
        )
    error = 0.0
    for group, hidden in zip(groups, output.hidden, strict=True):
        if not exact and group.window.start > 0:
            continue
        single, _ = select_rows(logits, target, [group], batch=batch, rows=rows)
        plain, _ = select_rows(call.logits, target, [group], batch=batch, rows=rows)
        states = trace.hidden[group.samples, group.loss_start : group.stop]
        error = max(error, _difference(hidden, states), _difference(single, plain))
    allowed = _tolerance(logits)
    if not error <= allowed:
        cause = (
            f"attention in the blocks '{trace.blocks}' is not causal: scaled_dot_product_attention is called with "
            "neither is_causal nor attn_mask, so a row sees later rows"
            if trace.unmasked
            else f"something in the blocks '{trace.blocks}' lets a row see later rows (a mask that is not causal, "
            "pooling or normalisation over time), or mixes rows outside attention"
        )
        raise MisconfigurationException(
            f"on {names} the windowed states differ from the plain ones by {error:.1e} of the largest state, where "
            f"{allowed:.0e} is allowed: {cause}"
        )
    return error


def _tolerance(logits: torch.Tensor) -> float:
    """By how much two ways of one computation may differ, of the largest value, in the precision of the step."""
    if logits.dtype not in (torch.float32, torch.float64) or torch.is_autocast_enabled(logits.device.type):
        return 5e-2
    return 1e-4 if _is_exact() else 1e-3


def _is_exact() -> bool:
    """Whether products of float32 are made as such; TensorFloat32 rounds their factors to 10 bits."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch 2.9 calls the question old
            return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # the precision was set by a newer name than the one that is asked for
        return False


def _names(windows: Sequence[Window]) -> str:
    return ", ".join(map(str, dict.fromkeys(windows)))


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if not a.numel():  # a loss may have no row in the window
        return 0.0
    a, b = a.float(), b.float()
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-12))
