# SPDX-License-Identifier: Apache-2.0
"""Gradients of a window, made without any engine: one full-length pass in which the context is cut off explicitly."""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack, contextmanager
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F

from reco_lightning import continuity_loss
from reco_lightning.windowing.engines.interception import FunctionInterceptor
from tests.helpers.networks.common import TOKENS

plain_cross_entropy = F.cross_entropy


class SeenCall:
    """A call of ``F.cross_entropy`` as rows: logits (B, L, V), targets (B, L), the tokens they are."""

    def __init__(self, batch, logits, target, options, tokens):
        wide = logits if logits.ndim == 2 else logits.flatten(2).mT.flatten(0, 1)
        self.logits = wide.view(batch, -1, wide.shape[-1])
        self.target = target.reshape(batch, -1)
        self.options = options
        counted = self.target != options.get("ignore_index", -100)
        last = int(counted.any(0).nonzero().max())
        counting = torch.arange(self.target.shape[1]) - last + TOKENS - 1
        self.tokens = counting if tokens is None else torch.tensor(tokens)
        self.weights = (
            (counted * options["weight"][self.target.clamp_min(0)]) if options.get("weight") is not None else counted
        )

    def rows(self, window):
        return ((self.tokens >= window.start) & (self.tokens < window.stop)).nonzero().flatten()


class LossSeen:
    """Notes the calls of ``F.cross_entropy``, whose loss rows are counted from the last token, or are ``tokens``."""

    def __init__(self, batch, tokens=None, window=None):
        self.batch, self.tokens, self.window = batch, tokens, window
        self.calls = []

    def __call__(self, logits, target, *args, function=plain_cross_entropy, **options):
        tokens = None if self.tokens is None else self.tokens[len(self.calls)]
        call = SeenCall(self.batch, logits, target, options, tokens)
        self.calls.append(call)
        if self.window is None:
            return function(logits, target, *args, **options)
        rows = call.rows(self.window)
        return function(call.logits[:, rows].flatten(0, 1), call.target[:, rows].flatten(), **options)


def _of_linear(seen, linear):
    def fused(states, weight, target, *, linear_bias=None, **options):
        return seen(linear(states, weight, linear_bias), target, **options)

    return fused


def _of_x_transformers(seen):
    def cross_entropy(logits, target, ignore_index=-100):
        return seen(logits, target, ignore_index=ignore_index)

    return cross_entropy


@contextmanager
def _tapped(seen, handlers):
    """Hands every form of the loss to ``seen``."""
    nll = partial(seen, function=F.nll_loss)
    inner = plain_cross_entropy if handlers else seen  # which a handler meets
    with ExitStack() as stack:
        if hasattr(F, "linear_cross_entropy"):
            fused = _of_linear(inner, F.linear)
            stack.enter_context(patch.object(F, "linear_cross_entropy", fused))
        wrapper = sys.modules.get("x_transformers.autoregressive_wrapper")
        if hasattr(wrapper, "cross_entropy"):  # older releases call torch's own
            stack.enter_context(patch.object(wrapper, "cross_entropy", _of_x_transformers(inner)))
        if handlers:
            stack.enter_context(FunctionInterceptor({F.cross_entropy: seen, F.nll_loss: nll, **handlers}))
        else:
            stack.enter_context(patch.object(F, "cross_entropy", seen))
            stack.enter_context(patch.object(F, "nll_loss", nll))
        yield


def see_loss(module, batch, size, window=None, handlers=None):
    """The loss of a module on a batch, every cross-entropy over a window's rows alone, and what these were given."""
    seen = LossSeen(size, getattr(module, "loss_tokens", None), window)
    with _tapped(seen, handlers):
        value = module.loss(batch)
    return value, seen.calls


def cut_attention(first):
    """``F.scaled_dot_product_attention`` by matrix products; keys and values of rows before ``first`` are constants."""

    def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key, value = key.repeat_interleave(groups, dim=-3), value.repeat_interleave(groups, dim=-3)
        rows = query.shape[-2]
        assert dropout_p == 0.0
        assert key.shape[-2] == rows
        context = torch.arange(rows) < first
        frozen = ~context[:, None] & context[None, :]
        scores = torch.where(frozen, query @ key.detach().mT, query @ key.mT)
        scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            scores = scores.masked_fill(torch.ones(rows, rows).triu(1).bool(), float("-inf"))
        elif attn_mask is not None:
            hidden = (
                torch.zeros(()).masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else attn_mask
            )
            scores = scores + hidden
        weights = scores.softmax(-1)
        return (weights * frozen) @ value.detach() + (weights * ~frozen) @ value

    return attend


@contextmanager
def _attention(stack, first):
    with patch.object(F, "scaled_dot_product_attention", cut_attention(first)):
        yield


@contextmanager
def _attend(stack, first):
    from x_transformers.attend import Attend, Intermediates

    def forward(self, q, k, v, **_):
        return cut_attention(first)(q, k, v, is_causal=True), Intermediates()

    with patch.object(Attend, "forward", forward):
        yield


@contextmanager
def _cut(stack, first):
    parts = [part for part in stack.modules() if hasattr(part, "cut")]
    for part in parts:
        part.cut = first
    try:
        yield
    finally:
        for part in parts:
            part.cut = None


@contextmanager
def _states(stack, first):
    def detach(block, inputs):
        states = inputs[0]
        rows = states.flatten(1, -2)
        context = (torch.arange(rows.shape[1]) < first)[:, None]
        return torch.where(context, rows.detach(), rows).view_as(states), *inputs[1:]

    hooks = [block.register_forward_pre_hook(detach) for block in stack]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _whole(stack, first):
    yield


WAYS = {"attention": _attention, "attend": _attend, "cut": _cut, "states": _states, "cache": _whole, "whole": _whole}


def reference_gradients(setting, module, batch, size, window, weight, seed):
    """Gradients of a window's cross-entropy and continuity, by parameter name."""
    stack = module.get_submodule(setting.blocks)
    names, parameters = zip(*[item for item in module.named_parameters() if item[1].requires_grad], strict=True)
    states = []
    if setting.states:
        hook = module.get_submodule(setting.states).register_forward_hook(lambda _, __, output: states.append(output))
    else:
        head = module.get_submodule(setting.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0].flatten(1, -2)))
    torch.manual_seed(seed)
    with torch.no_grad():
        see_loss(module, batch, size)
    prefix = states.pop().shape[1] - setting.tail - TOKENS + 1
    first = 0 if window.start == 0 else window.start + prefix - 1
    torch.manual_seed(seed)
    with WAYS[setting.reference](stack, first):  # until after backward: checkpointed blocks run again there
        if setting.reference == "cache":
            logits = through_cache(module.model, batch, first, window.stop - 1)
            targets, hidden = batch[:, first + 1 : window.stop], states[-1]
            loss = plain_cross_entropy(logits.flatten(0, 1), targets.flatten())
        elif setting.states:
            loss, _ = see_loss(module, batch, size, window)
            hidden = states[-1][:, max(window.start + prefix - 1, 0) : window.stop + prefix - 1]
        else:
            _, (seen,) = see_loss(module, batch, size)
            rows = seen.rows(window)
            logits, targets = seen.logits[:, rows], seen.target[:, rows]
            options = {name: value for name, value in seen.options.items() if name != "reduction"}
            loss = plain_cross_entropy(logits.flatten(0, 1), targets.flatten(), **options)
            hidden = states[-1][:, max(window.start + prefix - 1, 0) : window.stop + prefix - 1]
        hook.remove()
        gradients = torch.autograd.grad(loss + weight * continuity_loss(hidden), parameters, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for n, p, g in zip(names, parameters, gradients, strict=True)}


def through_cache(network, ids, first, last):
    """Logits of the rows ``first ... last`` over transformers' own cache of the rows before, made without gradient."""
    name = "cache" if "cache" in inspect.signature(network.forward).parameters else "past_key_values"
    cache = None
    if first:
        with torch.no_grad():
            cache = network(ids[:, :first], use_cache=True)[name]
    return network(ids[:, first:last], use_cache=True, **{name: cache}).logits
