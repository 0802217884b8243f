# SPDX-License-Identifier: Apache-2.0
"""Selects the first engine that serves a network and passes verification on the batch at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from reco_lightning.support.block_stacks import block_stacks, runs_parts
from reco_lightning.support.transformers_cache import CACHE_ARGUMENTS, describe_module, find_cache_argument
from reco_lightning.windowing.engines.base import Engine, Head
from reco_lightning.windowing.engines.context_kv import (
    AttentionContextKV,
    CacheContextKV,
    ContextKV,
    ModuleContextKV,
    attends_by_itself,
)
from reco_lightning.windowing.engines.cropped import DroppedEngine
from reco_lightning.windowing.engines.detached import DetachedEngine
from reco_lightning.windowing.engines.frozen import FrozenEngine
from reco_lightning.windowing.engines.mingpt import is_mingpt_attention
from reco_lightning.windowing.injection.dry_run import DryRun
from reco_lightning.windowing.injection.loss_calls import TracedHead
from reco_lightning.windowing.injection.recompile_limit import is_compiled
from reco_lightning.windowing.injection.step_recorder import Overrides
from reco_lightning.windowing.injection.step_trace import Trace, trace_step
from reco_lightning.windowing.injection.verification import verify_engine
from reco_lightning.windowing.rows import Context
from reco_lightning.windowing.sampler import Window, WindowSampler

__all__ = ["ENGINES", "Selection", "build_engine", "select_engine"]

ENGINES = ("frozen", "cache", "prefix", "masked")
"""The engines in the order in which they are tried."""

GRADIENTS = {
    "prefix": (
        "the context's states are detached between blocks, its keys and values still train their projections; what "
        "lies behind the window is not run, the context costs what it does in the plain step"
    ),
    "masked": (
        "all rows are run; the context's states are detached between blocks, its keys and values still train their "
        "projections; only the head's work on other rows is saved"
    ),
}
"""What an engine that does not freeze the context whole leaves of gradients and costs."""


@dataclass(frozen=True)
class Selection:
    """An engine that was verified on a network, and the trace behind it.

    Args:
        engine: The engine, not yet installed.
        trace: What the trace found.
        error: Largest difference of plain and windowed states in the proof, relative to the largest state; ``None``
            without a proof.
        report: One line on what was chosen and why.
    """

    engine: Engine
    trace: Trace
    error: float | None
    report: str


def build_engine(
    module: nn.Module,
    trace: Trace,
    name: str,
    *,
    tokens: int,
    context: Context,
    chunked_loss: bool = True,
) -> Engine:
    """Builds an engine for what the trace found.

    Args:
        module: The LightningModule.
        trace: What the trace found.
        name: One of ``ENGINES``, or ``"dropped"``.
        tokens: N, video tokens of a sample.
        context: What the context is to the window.
        chunked_loss: Whether the loss makes the logits, a few rows at a time, where it can.

    Raises:
        MisconfigurationException: If the engine does not run such blocks; the text says why.
    """
    blocks = block_stacks(module)[trace.blocks]
    kind = f"the blocks '{trace.blocks}' ({describe_module(blocks[0])})"
    heads = [_build_head(module, head, chunked_loss=chunked_loss) for head in trace.heads]
    layout = trace.layout(tokens)
    if name == "dropped":
        network = module.get_submodule(trace.network)
        return DroppedEngine(network, blocks[-1], heads, layout, rows=trace.rows, is_open=trace.is_open)
    if runs_parts(blocks[0]) and (name != "frozen" or context == "keys"):
        raise MisconfigurationException(
            f"{kind} call the parts of their layers themselves, so that the context's states cannot be cut off between "
            "layers; they need the engine 'frozen' and context 'frozen', 'attached' or 'dropped'"
        )
    if name == "masked":
        return DetachedEngine(blocks, heads, layout, fixed_length=True, is_open=trace.is_open)
    if not trace.flat:
        raise MisconfigurationException(f"{kind} take states of more dimensions than (B, T, D), which cannot be cut")
    if name == "prefix":
        return DetachedEngine(blocks, heads, layout, fixed_length=False, is_open=trace.is_open)
    context_kv: ContextKV = AttentionContextKV()
    if name == "cache":
        argument, *others = set(map(find_cache_argument, blocks))
        if argument is None or others:
            raise MisconfigurationException(
                f"{kind} do not all take a key/value cache by one of the names {', '.join(CACHE_ARGUMENTS)}, as layers "
                "of transformers do"
            )
        context_kv = CacheContextKV(argument)
    elif trace.recomputes_parts:
        raise MisconfigurationException(
            f"{kind} checkpoint their attention inside themselves, where a recomputation would not see the window; "
            "checkpoint whole blocks"
        )
    elif not trace.attention and (attending := _modules_that_attend(blocks)):
        context_kv = ModuleContextKV(attending)
    elif context != "attached" and not trace.attention and not all(map(_has_mingpt_attention, blocks)):
        raise MisconfigurationException(
            f"{kind} attend without torch.nn.functional.scaled_dot_product_attention; let them attend by it (with "
            "transformers: attn_implementation='sdpa')"
        )
    return FrozenEngine(
        blocks,
        heads,
        layout,
        is_open=trace.is_open,
        trains_keys=context == "keys",
        recompute=trace.recomputed,
        context_kv=context_kv,
        name=name,
    )


def _build_head(module: nn.Module, traced: TracedHead, *, chunked_loss: bool) -> Head:
    part = module.get_submodule(traced.name) if traced.is_module else None
    placeholder = None
    # inside a compiled graph copies of a placeholder are real ones
    if (traced.is_viewed or (traced.is_copied and not is_compiled(module))) and not _watches_outputs(module):
        placeholder = traced.like.new_full((), float("nan"))
    return Head(
        part,
        call=traced.call,
        outside_value=0.0 if traced.learns_behind else float("nan"),
        placeholder=placeholder,
        deferred=chunked_loss and placeholder is not None and (part is None or _is_plain_linear(part)),
    )


def _has_mingpt_attention(block: nn.Module) -> bool:
    return any(map(is_mingpt_attention, block.modules()))


def _modules_that_attend(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The modules that are called with queries, keys and values, where every block has one."""
    found = [[part for part in block.modules() if attends_by_itself(part)] for block in blocks]
    return [part for parts in found for part in parts] if all(found) else []


def _is_plain_linear(head: nn.Module) -> bool:
    """Whether a head does what ``F.linear`` does with its parameters, and nothing besides."""
    return (
        type(head) is nn.Linear
        and not is_traceable_wrapper_subclass(head.weight)  # distributed or quantised
        and "forward" not in head.__dict__
        and not (head._forward_hooks or head._forward_pre_hooks)
    )


def _watches_outputs(module: nn.Module) -> bool:
    """Whether something waits for gradients of the network's output: sharded parameters, or hooks."""
    return any(
        isinstance(part, (FSDPModule, FullyShardedDataParallel)) or part._backward_hooks or part._backward_pre_hooks
        for part in module.modules()
    ) or any(hasattr(parameter, "ds_id") for parameter in module.parameters())  # DeepSpeed, stage 3


def select_engine(
    module: nn.Module,
    step: Callable[[], Any],
    sampler: WindowSampler,
    *,
    overrides: Overrides,
    context: Context,
    windows_per_batch: int = 1,
    attached: int = 0,
    engine: str = "auto",
    verify: bool = True,
    chunked_loss: bool = True,
) -> Selection:
    """Finds blocks, head and rows, picks an engine, and proves it on the first, the second and the last window.

    Args:
        module: The LightningModule.
        step: Runs its training step on the batch at hand.
        sampler: The windows.
        overrides: What the user names.
        context: What the context is to the window.
        windows_per_batch: Groups of the batch; above 1 a run with groups is proved too.
        attached: Tokens in front of each window that are to be trained through.
        engine: ``"auto"``, the first of ``ENGINES`` that passes, or the name of one.
        verify: Whether to prove the choice.
        chunked_loss: Whether the loss makes the logits, a few rows at a time, where it can.

    Returns:
        The engine, not installed, with the findings.

    Raises:
        MisconfigurationException: If nothing fits; nothing has been changed then.
    """
    trace, dry_run = trace_step(module, step, tokens=sampler.tokens, overrides=overrides)
    names = ("dropped",) if context == "dropped" else ENGINES
    if engine != "auto":
        if engine not in names:
            raise MisconfigurationException(
                f"engine={engine!r} cannot serve context={context!r}, which runs on {names[0]!r}; set engine='auto'"
            )
        names = (engine,)
    runs = [[window] for _, stage in sampler.stages for window in _telling(stage.windows)]
    if windows_per_batch > 1:
        windows = sampler.windows
        runs.append([windows[group * len(windows) // windows_per_batch] for group in range(windows_per_batch)])
    failures: dict[str, str] = {}
    for name in names:
        try:
            chosen = build_engine(
                module, trace, name, tokens=sampler.tokens, context=context, chunked_loss=chunked_loss
            )
            error = None
            if verify:
                error = _verified(chosen, trace, dry_run, runs, attached=attached, exact=context != "dropped")
        except MisconfigurationException as failure:
            failures[name] = str(failure)
            continue
        report = _report(module, trace, chosen, sampler, context=context, error=error, failures=failures)
        return Selection(chosen, trace, error, report)
    reasons = "".join(f"\n- {name}: {failure}" for name, failure in failures.items())
    raise MisconfigurationException(f"{type(module).__name__} cannot be windowed exactly by any engine:{reasons}")


def _telling(windows: Sequence[Window]) -> list[Window]:
    """The first, the second, which has the shortest context, and the last."""
    return [windows[index] for index in sorted({0, min(1, len(windows) - 1), len(windows) - 1})]


def _verified(
    engine: Engine, trace: Trace, dry_run: DryRun, runs: Sequence[Sequence[Window]], *, attached: int, exact: bool
) -> float:
    engine.install()
    try:
        return verify_engine(engine, trace, dry_run, runs, attached=attached, exact=exact)
    finally:
        engine.remove()


def _name_heads(trace: Trace) -> str:
    parts = [f"head '{head.name}'" for head in trace.heads]
    if any(call.head is None for call in trace.calls):
        parts.append("heads that read the states of all rows, zero outside the window")
    return ", ".join(parts)


def _report(
    module: nn.Module,
    trace: Trace,
    engine: Engine,
    sampler: WindowSampler,
    *,
    context: Context,
    error: float | None,
    failures: Mapping[str, str],
) -> str:
    compared = "first window equals" if context == "dropped" else "first, second and last window equal"
    notes = [
        f"engine '{engine.name}', context '{context}', on network '{trace.network or type(module).__name__}': "
        f"{len(block_stacks(module)[trace.blocks])} blocks '{trace.blocks}', {_name_heads(trace)}, "
        f"{trace.layout(sampler.tokens).prefix(trace.rows)} prefix rows + {sampler.tokens} video tokens",
        "not verified" if error is None else f"{compared} the plain forward to {error:.0e}",
    ]
    if engine.name in GRADIENTS and context != "attached":
        notes.append(GRADIENTS[engine.name])
        notes += [f"not '{name}', since {failure}" for name, failure in failures.items()]
    return "; ".join(notes)
