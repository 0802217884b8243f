# SPDX-License-Identifier: Apache-2.0
"""Attention of a window over its context against softmax attention written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reco_lightning.support.causal_mask import causal_mask
from reco_lightning.windowing.engines.attention import AttentionCall, attend_with_context

CONTEXT, WINDOW, E = 5, 3, 4
T = CONTEXT + WINDOW


def states(heads=2, key_heads=None):
    generator = torch.Generator().manual_seed(heads)
    shapes = [(2, heads, T, E), (2, key_heads or heads, T, E), (2, key_heads or heads, T, E)]
    return [torch.randn(shape, dtype=torch.float64, generator=generator, requires_grad=True) for shape in shapes]


def explicit(query, key, value, allowed, scale=None):
    """Full attention, row by row; ``allowed`` (T, T) or an additive bias."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * (E**-0.5 if scale is None else scale)
    scores = scores.masked_fill(~allowed, float("-inf")) if allowed.dtype == torch.bool else scores + allowed
    return scores.softmax(-1) @ value


def split(tensor):
    return tensor[..., :CONTEXT, :], tensor[..., CONTEXT:, :]


CAUSAL = torch.ones(T, T, dtype=torch.bool).tril()
BIAS = torch.randn(T, T, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).masked_fill(
    ~CAUSAL, -torch.inf
)


@pytest.mark.parametrize("joined", [False, True], ids=["context", "cache"])
@pytest.mark.parametrize("heads", [(2, None), (4, 2)], ids=["all heads", "grouped"])
@pytest.mark.parametrize("mask", ["causal", "bool", "float", "batch"])
def test_a_window_over_its_context_is_the_end_of_the_full_attention(mask, heads, joined):
    query, key, value = states(*heads)
    full = {"float": BIAS, "batch": BIAS.expand(2, 1, T, T)}.get(mask, CAUSAL)
    expected = explicit(query, key, value, full, scale=0.3)[..., CONTEXT:, :]
    keys, values = split(key), split(value)
    call = AttentionCall(
        query[..., CONTEXT:, :],
        key if joined else keys[1],
        value if joined else values[1],
        None if mask == "causal" else full[..., CONTEXT:, :],
        is_causal=mask == "causal",
        scale=0.3,
        enable_gqa=heads[1] is not None,
    )
    own = attend_with_context(call, None if joined else (keys[0], values[0]))
    torch.testing.assert_close(own, expected)
    cotangent = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(own, (query, key, value), cotangent),
        torch.autograd.grad(expected, (query, key, value), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", [torch.bool, torch.float64])
def test_a_mask_of_the_window_alone_sees_all_of_the_context(kind):
    query, key, value = states()
    own_mask = torch.ones(WINDOW, WINDOW, dtype=torch.bool).tril()
    if kind is not torch.bool:
        own_mask = torch.zeros(WINDOW, WINDOW, dtype=kind).masked_fill(~own_mask, -torch.inf)
    keys, values = split(key), split(value)
    own = attend_with_context(
        AttentionCall(query[..., CONTEXT:, :], keys[1], values[1], own_mask), (keys[0], values[0])
    )
    torch.testing.assert_close(own, explicit(query, key, value, CAUSAL)[..., CONTEXT:, :])


def test_without_a_mask_everything_is_seen():
    query, key, value = states()
    keys, values = split(key), split(value)
    own = attend_with_context(AttentionCall(query[..., CONTEXT:, :], keys[1], values[1]), (keys[0], values[0]))
    torch.testing.assert_close(own, explicit(query, key, value, torch.ones_like(CAUSAL))[..., CONTEXT:, :])


def test_a_detached_context_gets_no_gradient():
    query, key, value = states()
    keys, values = split(key), split(value)
    call = AttentionCall(query[..., CONTEXT:, :], keys[1], values[1], is_causal=True)
    own = attend_with_context(call, (keys[0].detach(), values[0].detach()))
    for gradient in torch.autograd.grad(own.square().sum(), (query, key, value)):
        assert gradient[..., :CONTEXT, :].abs().max() == 0
        assert gradient[..., CONTEXT:, :].abs().min() > 0


def test_dropout_is_passed_on():
    query, key, value = (tensor.detach() for tensor in states())
    keys, values = split(key), split(value)
    call = AttentionCall(query[..., CONTEXT:, :], keys[1], values[1], None, 1.0, True)
    own = attend_with_context(call, (keys[0], values[0]))
    assert own.abs().max() == 0


@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (1, 4), (3, 3), (3, 7)])
def test_the_mask_is_aligned_with_the_last_key(rows, keys):
    mask = causal_mask(rows, keys, torch.device("cpu"))
    expected = [[column <= row + keys - rows for column in range(keys)] for row in range(rows)]
    assert mask.tolist() == expected


def test_a_window_of_the_whole_sequence_is_plain_causal_attention():
    query, key, value = states()
    torch.testing.assert_close(
        attend_with_context(AttentionCall(query, key, value, is_causal=True)),
        F.scaled_dot_product_attention(query, key, value, is_causal=True),
    )
