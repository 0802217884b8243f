# SPDX-License-Identifier: Apache-2.0
"""Redirects losses that fuse or rewrite a cross-entropy to ``F.linear`` and ``F.cross_entropy``, which windows know."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["ForeignLosses"]


def _cap(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _torch(
    input: torch.Tensor,
    linear_weight: torch.Tensor,
    target: torch.Tensor,
    *,
    linear_bias: torch.Tensor | None = None,
    ignore_index: int | None = None,
    options: Any = None,
    **others: Any,
) -> Any:
    if linear_weight.ndim != 2:
        return NotImplemented
    logits = F.linear(input, linear_weight, linear_bias)
    return F.cross_entropy(logits, target, ignore_index=-100 if ignore_index is None else ignore_index, **others)


def _einops(
    logits: torch.Tensor, target: torch.Tensor, ignore_index: int = -100, reduction: str = "mean", class_dim: int = 1
) -> torch.Tensor:
    logits = torch.movedim(logits, class_dim, 1)
    return F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction=reduction)


def _liger(
    input: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    ce_weight: torch.Tensor | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Any:
    names = {"ignore_index", "label_smoothing", "reduction"}
    neutral = {"accum_dtype", "chunk_mem_const"}  # of the kernel
    if any(value for name, value in options.items() if name not in names | neutral):  # a z-loss, say
        return NotImplemented
    chosen = {name: value for name, value in options.items() if name in names}
    return F.cross_entropy(_cap(F.linear(input, weight, bias), softcap), target, weight=ce_weight, **chosen)


def _liger_module(
    self: nn.Module, lin_weight: torch.Tensor, _input: torch.Tensor, target: torch.Tensor, bias: Any = None
) -> Any:
    options = {name: value for name, value in vars(self).items() if name != "training" and not name.startswith("_")}
    return _liger(_input, lin_weight, target, bias, **options)


def _cut(
    e: torch.Tensor,
    c: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Any:
    if options.get("shift") or options.get("return_lse") or options.get("vocab_parallel_options") is not None:
        return NotImplemented
    logits = _cap(F.linear(e, c, bias), softcap).flatten(0, -2)
    loss = F.cross_entropy(logits, targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss.view(targets.shape) if reduction == "none" else loss


_LOSSES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("torch.nn.functional", "linear_cross_entropy", _torch),
    ("torch_einops_utils", "cross_entropy", _einops),  # of x-transformers
    ("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", _liger),
    ("cut_cross_entropy", "linear_cross_entropy", _cut),
)
_MODULES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss", _liger_module),
)


class ForeignLosses:
    """Puts, while entered, stand-ins in the place of known losses, wherever a loaded module holds them by a name.

    A call that a stand-in cannot make by ``F.linear`` and ``F.cross_entropy`` is made as it is.
    """

    def __init__(self) -> None:
        self._places = _find_places(_fingerprint())

    def __enter__(self) -> None:
        for owner, name, _, stand_in in self._places:
            setattr(owner, name, stand_in)

    def __exit__(self, *_: object) -> None:
        for owner, name, original, _ in self._places:
            setattr(owner, name, original)


def _fingerprint() -> tuple[int, ...]:
    """What changes where a module is loaded or gets another name, in the time that it takes to count."""
    owners = [id(sys.modules.get(path)) for path, *_ in (*_LOSSES, *_MODULES)]
    modules = [vars(module) for module in list(sys.modules.values()) if isinstance(module, ModuleType)]
    return len(modules), sum(map(len, modules)), *owners


@functools.lru_cache(maxsize=1)
def _find_places(fingerprint: tuple[int, ...]) -> list[tuple[Any, str, Any, Any]]:
    """Owners of the losses, by what name, the loss and its stand-in."""
    known = [(getattr(sys.modules.get(path), name, None), stand_in) for path, name, stand_in in _LOSSES]
    found = {id(loss): (loss, _redirect(loss, stand_in)) for loss, stand_in in known if loss is not None}
    places = [
        (module, name, *found[id(value)])
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType)
        for name, value in list(vars(module).items())
        if id(value) in found
    ]
    for path, name, stand_in in _MODULES:
        owner = getattr(sys.modules.get(path), name, None)
        if owner is not None:
            places.append((owner, "forward", owner.forward, _redirect(owner.forward, stand_in)))
    return places


def _redirect(original: Callable[..., Any], stand_in: Callable[..., Any]) -> Callable[..., Any]:
    names = list(inspect.signature(original).parameters)  # releases differ in their order

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        result = stand_in(**dict(zip(names, args, strict=False)), **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    return call
