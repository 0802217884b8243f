# SPDX-License-Identifier: Apache-2.0
"""The chunked loss against torch's own head and cross-entropy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy

ROWS, WIDTH, CLASSES = 11, 6, 9


def parts(dtype=torch.float64, bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    return draw(ROWS, WIDTH), draw(CLASSES, WIDTH), draw(CLASSES) if bias else None, target


def chunked_loss(states, weight, target, *, ignore_index=-100, reduction="mean", **options):
    total, losses = linear_cross_entropy(states, weight, target, ignore_index=ignore_index, **options)
    assert losses.shape == target.shape
    assert not losses.requires_grad
    torch.testing.assert_close(losses.sum(), total.detach())
    return total / (target != ignore_index).sum() if reduction == "mean" else total


@pytest.mark.parametrize("rows", [1, 4, 11, 50])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [None, -100, 3])
def test_loss_and_gradients_are_those_of_torch(rows, bias, reduction, ignored):
    states, weight, shift, target = parts(bias=bias)
    index = -100 if ignored is None else ignored
    if ignored is not None:
        target[::3] = ignored
    leaves = [part for part in (states, weight, shift) if part is not None]
    plain = F.cross_entropy(F.linear(states, weight, shift), target, ignore_index=index, reduction=reduction)
    loss = chunked_loss(
        states, weight, target, bias=shift, ignore_index=index, reduction=reduction, chunk_elements=rows * CLASSES
    )
    torch.testing.assert_close(loss, plain)
    logits = F.linear(states, weight, shift)
    _, losses = linear_cross_entropy(states, weight, target, bias=shift, ignore_index=index, chunk_elements=20)
    torch.testing.assert_close(losses, F.cross_entropy(logits, target, ignore_index=index, reduction="none").detach())
    for own, torchs in zip(torch.autograd.grad(3 * loss, leaves), torch.autograd.grad(3 * plain, leaves), strict=True):
        torch.testing.assert_close(own, torchs)


def test_only_what_is_trained_gets_a_gradient():
    states, weight, _, target = parts(bias=False)
    frozen = weight.detach()
    loss = chunked_loss(states, frozen, target, chunk_elements=20)
    (own,) = torch.autograd.grad(loss, states)
    torch.testing.assert_close(own, torch.autograd.grad(F.cross_entropy(states @ frozen.T, target), states)[0])
    loss = chunked_loss(states.detach(), weight, target, chunk_elements=20)
    (own,) = torch.autograd.grad(loss, weight)
    plain = F.cross_entropy(states.detach() @ weight.T, target)
    torch.testing.assert_close(own, torch.autograd.grad(plain, weight)[0])
    with torch.no_grad():
        assert not chunked_loss(states, weight, target).requires_grad


def test_a_graph_can_be_walked_twice():
    states, weight, _, target = parts(bias=False)
    loss = chunked_loss(states, weight, target)
    (first,) = torch.autograd.grad(loss, states, retain_graph=True)
    (second,) = torch.autograd.grad(loss, states)
    assert torch.equal(first, second)


def test_a_second_derivative_is_refused():
    """A gradient made beside the loss depends on nothing: a penalty on it would train nothing."""
    states, weight, _, target = parts(bias=False)
    loss = chunked_loss(states, weight, target)
    with pytest.raises(RuntimeError, match=r"no second derivative.*chunked_loss=False"):
        torch.autograd.grad(loss, states, create_graph=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_makes_products_in_half_and_the_loss_in_float(dtype):
    states, weight, shift, target = parts(torch.float32)
    leaves = (states, weight, shift)
    with torch.autocast("cpu", dtype):
        plain = F.cross_entropy(F.linear(*leaves).float(), target)
        loss = chunked_loss(states, weight, target, bias=shift, chunk_elements=20)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=0)
    for own, torchs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(plain, leaves), strict=True):
        assert own.dtype == torch.float32
        torch.testing.assert_close(own, torchs, rtol=2e-2, atol=2e-3)


def test_half_precision_gradients_survive_a_mean_over_many_rows():
    """Divided by the rows before they are stored they would be below what float16 can hold."""
    states, weight = torch.zeros(1 << 16, 1, dtype=torch.float16), torch.ones(2, 1, dtype=torch.float16)
    weight[1] = -1e-3
    states.requires_grad_()
    loss = chunked_loss(states, weight, torch.zeros(1 << 16, dtype=torch.long))
    (own,) = torch.autograd.grad(loss * 2.0**16, states)
    torch.testing.assert_close(own.float(), torch.full((1 << 16, 1), -0.5005), rtol=1e-3, atol=0)


class Largest(TorchDispatchMode):
    """The most elements that any result has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_logits_of_all_rows_never_exist():
    states = torch.randn(64, 4, requires_grad=True)
    weight = torch.randn(32, 4, requires_grad=True)
    with Largest() as seen:
        linear_cross_entropy(states, weight, torch.zeros(64, dtype=torch.long), chunk_elements=8 * 32)[0].backward()
    assert seen.elements == 8 * 32


def test_no_product_is_made_twice():
    from torch.utils.flop_counter import FlopCounterMode

    states, weight = torch.randn(64, 4, requires_grad=True), torch.randn(32, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(states, weight, torch.zeros(64, dtype=torch.long), chunk_elements=256)[0].backward()
    assert counter.get_total_flops() == 6 * 64 * 4 * 32
