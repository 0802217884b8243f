# SPDX-License-Identifier: Apache-2.0
"""Counts against counts made by hand."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.experiments.plan.memory_tracker import StepTracker
from reco_lightning.windowing.cost import count_hidden_operations, count_operations, count_saved_bytes

B, T, D = 2, 6, 4


def linear_loss(layer, x):
    return lambda: layer(x).sum()


def test_a_linear_layer_counts_forward_and_weight_gradient():
    layer, x = nn.Linear(D, 3, bias=False), torch.ones(B * T, D)
    product = 2 * B * T * D * 3
    assert count_operations(linear_loss(layer, x), list(layer.parameters())) == 2 * product


def test_a_deeper_layer_counts_the_gradient_of_its_input_too():
    layers, x = nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)), torch.ones(B * T, D)
    product = 2 * B * T * D * D
    assert count_operations(linear_loss(layers, x), list(layers.parameters())) == 5 * product


def test_frozen_weights_cost_their_forward_alone():
    layers, x = nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)), torch.ones(B * T, D)
    layers[0].requires_grad_(False)
    assert count_operations(linear_loss(layers, x), list(layers.parameters())) == 3 * 2 * B * T * D * D


@pytest.mark.parametrize("causal", [False, True])
def test_attention_counts_full_squares(causal):
    qkv = [nn.Parameter(torch.randn(B, 1, T, D)) for _ in range(3)]

    def loss():
        return F.scaled_dot_product_attention(*qkv, is_causal=causal).sum()

    square = 2 * B * T * T * D
    assert count_operations(loss, qkv) == 2 * square + 4 * square  # two products, and two gradients of each


UPPER = torch.ones(T, T, dtype=torch.bool).triu(1)


@pytest.mark.parametrize(
    ("options", "pairs"),
    [
        ({}, 0),
        ({"is_causal": True}, T * (T - 1) // 2),
        ({"attn_mask": ~UPPER}, T * (T - 1) // 2),
        ({"attn_mask": torch.zeros(T, T).masked_fill(UPPER, float("-inf"))}, T * (T - 1) // 2),
        ({"attn_mask": (torch.arange(T) < 2).expand(T, T)}, T * (T - 2)),
    ],
    ids=["none", "causal", "boolean", "added", "two-keys"],
)
def test_operations_that_a_mask_hides(options, pairs):
    qkv = [nn.Parameter(torch.randn(B, 1, T, D)) for _ in range(3)]

    def loss():
        return F.scaled_dot_product_attention(*qkv, **options).sum()

    assert count_hidden_operations(loss) == 6 * 2 * B * pairs * D
    with torch.no_grad():
        assert count_hidden_operations(loss) == 2 * 2 * B * pairs * D


def test_counting_leaves_no_gradient_and_no_change():
    layer, x = nn.Linear(D, 3), torch.ones(B, D)
    before = layer.weight.clone()
    count_operations(linear_loss(layer, x), [*layer.parameters(), nn.Parameter(torch.ones(1))])  # one is not reached
    assert layer.weight.grad is None
    assert torch.equal(layer.weight, before)


def test_saved_bytes_are_the_inputs_that_gradients_need():
    x = torch.ones(B, T, D)
    layer = nn.Linear(D, D)
    parameters = list(layer.parameters())
    assert count_saved_bytes(linear_loss(layer, x), parameters) == 4 * B * T * D
    assert count_saved_bytes(linear_loss(layer.double(), x.double()), list(layer.parameters())) == 8 * B * T * D


def test_memory_that_is_saved_twice_counts_once():
    x, layer = torch.ones(B, T, D), nn.Linear(D, D)

    def loss():
        return layer(x).sum() + layer(x[1:]).sum() + layer(x.view(T, B, D)).sum()

    assert count_saved_bytes(loss, list(layer.parameters())) == 4 * B * T * D


def test_an_output_saved_for_its_own_gradient_counts():
    x, layer = torch.ones(B, T, D), nn.Linear(D, D)

    def loss():
        return layer(x).sigmoid().sum()

    assert count_saved_bytes(loss, list(layer.parameters())) == 2 * 4 * B * T * D


@pytest.mark.slow
def test_counting_leaves_no_graph_behind():
    layer, x = torch.nn.Linear(D, D), torch.randn(B, T, D)
    gc.collect()
    with StepTracker() as tracker:
        for _ in range(3):
            assert count_saved_bytes(lambda: layer(x).exp().sum(), list(layer.parameters())) > 0
        assert tracker.live == 0


def test_nothing_is_saved_without_gradients():
    x, layer = torch.ones(B, T, D), nn.Linear(D, D).requires_grad_(False)
    assert count_saved_bytes(linear_loss(layer, x), list(layer.parameters())) == 0
