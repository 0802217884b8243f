# SPDX-License-Identifier: Apache-2.0
"""Losses of other libraries that fuse the head and the cross-entropy: served as the two are, or refused."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback, WindowSampler
from tests.helpers.foreign import trainer
from tests.helpers.networks.common import BLOCKS, PER_BLOCK, draw_ids
from tests.helpers.networks.heads import HeadsModule

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=15)


class Kernel(torch.autograd.Function):
    """What Triton computes, in an ``autograd.Function`` that no watch on torch's functions sees into."""

    @staticmethod
    def forward(ctx, states, weight, target, bias, softcap, reduction):
        with torch.enable_grad():
            parts = [None if part is None else part.detach().requires_grad_() for part in (states, weight, bias)]
            logits = F.linear(*parts)
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, target, reduction=reduction)
        ctx.parts, ctx.loss = parts, loss
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        given = [part for part in ctx.parts if part is not None]
        found = iter(torch.autograd.grad(ctx.loss, given, grad))
        states, weight, bias = (None if part is None else next(found) for part in ctx.parts)
        return states, weight, None, bias, None, None


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
):  # fmt: skip
    """The signature of liger-kernel 0.8."""
    return Kernel.apply(input, weight, target, bias, softcap, reduction)


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The attributes of liger-kernel 0.8."""

    def __init__(self, *, softcap=None, lse_square_scale=0.0, reduction="mean"):
        super().__init__()
        self.ce_weight, self.ignore_index, self.lse_square_scale = None, -100, lse_square_scale
        self.label_smoothing, self.reduction, self.softcap = 0.0, reduction, softcap
        self.return_z_loss, self.accum_dtype, self.use_token_scaling = False, None, False

    def forward(self, lin_weight, _input, target, bias=None):
        return Kernel.apply(_input, lin_weight, target, bias, self.softcap, self.reduction)


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    """The signature of cut-cross-entropy 25.1."""
    states = e[:, :-1] if shift else e
    targets = targets[:, 1:] if shift else targets
    return Kernel.apply(states.flatten(0, -2), c, targets.flatten(), None, softcap, reduction)


FUNCTIONAL, CLASSES = "liger_kernel.transformers.functional", "liger_kernel.transformers.fused_linear_cross_entropy"


@pytest.fixture(autouse=True)
def packages(monkeypatch):
    """The packages, as far as they are needed."""
    contents = {
        FUNCTIONAL: liger_fused_linear_cross_entropy,
        CLASSES: LigerFusedLinearCrossEntropyLoss,
        "cut_cross_entropy": linear_cross_entropy,
    }
    for path, content in contents.items():
        module = ModuleType(path)
        setattr(module, content.__name__, content)
        monkeypatch.setitem(sys.modules, path, module)


class OneHead(HeadsModule):
    count = 1

    def loss(self, batch):
        return self.fused(self.states(batch), self.heads[0].weight, self.heads[0].bias, batch)


class Unfused(OneHead):
    softcap = None

    def fused(self, states, weight, bias, target):
        logits = F.linear(states, weight, bias)
        logits = logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        return F.cross_entropy(logits.flatten(0, 1), target.flatten())


class ByFunction(OneHead):
    def fused(self, states, weight, bias, target):
        return liger_fused_linear_cross_entropy(states.flatten(0, 1), weight, target.flatten(), bias)


class ByAttribute(OneHead):
    def fused(self, states, weight, bias, target):
        fused = sys.modules[FUNCTIONAL].liger_fused_linear_cross_entropy
        total = fused(states.flatten(0, 1), weight, target.flatten(), bias=bias, reduction="sum", softcap=self.softcap)
        return total / target.numel()

    softcap = 2.0


class ByModule(OneHead):
    softcap = None

    def __init__(self):
        super().__init__()
        self.liger = LigerFusedLinearCrossEntropyLoss(softcap=self.softcap)

    def fused(self, states, weight, bias, target):
        return self.liger(weight, states.flatten(0, 1), target.flatten(), bias)


class ByCappedModule(ByModule):
    softcap = 2.0


class ByCut(OneHead):
    """Has no bias."""

    softcap = None

    def fused(self, states, weight, bias, target):
        return linear_cross_entropy(states, weight, target, softcap=self.softcap) + 0 * bias.sum()


class ByShiftedCut(OneHead):
    def fused(self, states, weight, bias, target):
        return linear_cross_entropy(states, weight, target, shift=True)


class ByZLoss(ByModule):
    def __init__(self):
        super().__init__()
        self.liger = LigerFusedLinearCrossEntropyLoss(lse_square_scale=1e-4)


def gradients(cls, softcap=None, bias=True):
    torch.manual_seed(3)
    module = cls()
    if cls is Unfused:
        module.softcap = softcap
    if not bias:
        nn.init.zeros_(module.heads[0].bias)
    found = {}
    module.on_before_optimizer_step = lambda _: found.update(
        {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    )
    run = trainer(ReCoCallback(WINDOWS, continuity_weight=0.0), max_epochs=1)
    run.fit(module, torch.utils.data.DataLoader([draw_ids(0)], batch_size=None))
    return float(run.callback_metrics["reco/cross_entropy"]), found


@pytest.mark.parametrize(
    ("cls", "softcap", "bias"),
    [
        (ByFunction, None, True),
        (ByAttribute, 2.0, True),
        (ByModule, None, True),
        (ByCappedModule, 2.0, True),
        (ByCut, None, False),
    ],
)
def test_a_fused_loss_trains_as_head_and_cross_entropy_do(cls, softcap, bias):
    loss, own = gradients(cls, softcap, bias)
    expected_loss, expected = gradients(Unfused, softcap, bias)
    assert loss == pytest.approx(expected_loss, abs=1e-6)
    for name in expected.keys() - ({"heads.0.bias"} if not bias else set()):
        torch.testing.assert_close(own[name], expected[name], atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("cls", [ByShiftedCut, ByZLoss])
def test_what_is_more_than_head_and_cross_entropy_is_refused(cls):
    with pytest.raises(MisconfigurationException, match=r"no call of torch.nn.functional.cross_entropy on the logits"):
        gradients(cls)


def test_the_libraries_are_as_they_were_after_a_fit():
    gradients(ByFunction)
    gradients(ByModule)
    assert liger_fused_linear_cross_entropy.__module__ == __name__
    assert not hasattr(liger_fused_linear_cross_entropy, "__wrapped__")
    assert sys.modules[FUNCTIONAL].liger_fused_linear_cross_entropy is liger_fused_linear_cross_entropy
    assert not hasattr(LigerFusedLinearCrossEntropyLoss.forward, "__wrapped__")
    if hasattr(F, "linear_cross_entropy"):
        assert not hasattr(F.linear_cross_entropy, "__wrapped__")
