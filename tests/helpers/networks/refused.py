# SPDX-License-Identifier: Apache-2.0
"""Networks and steps that cannot be windowed, each for one reason."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.networks.attending import Attention, DecoderModule, NanoGPTModule
from tests.helpers.networks.common import VOCAB, flat_loss, join_heads, split_heads
from tests.helpers.networks.handwritten import HandWrittenModule, OwnAttention, VideoGPTModule, attend


class BothWaysAttention(Attention):
    def forward(self, x, table=None, bias=None):
        q, k, v = (split_heads(part) for part in self.inputs["c_attn"](x).chunk(3, dim=-1))
        return self.c_proj(join_heads(F.scaled_dot_product_attention(q, k, v)))


class Bidirectional(DecoderModule):
    """Attention through SDPA that sees the future."""

    def __init__(self):
        super().__init__()
        for block in self.network.blocks.layers:
            block.attn = BothWaysAttention()


class OpenAttention(OwnAttention):
    def forward(self, x):
        q, k, v = (split_heads(part) for part in self.wqkv(x).chunk(3, dim=-1))
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool)
        return self.wo(join_heads(attend(q, k, v, visible)))


class HandWrittenBidirectional(HandWrittenModule):
    """Hand-written attention that sees the future."""

    def __init__(self):
        super().__init__()
        for block in self.blocks.layers:
            block.attention = OpenAttention()


class FixedBidirectional(VideoGPTModule):
    """VideoGPT's shape with a mask that hides nothing, which a network of fixed length could keep to itself."""

    def __init__(self):
        super().__init__()
        nn.init.normal_(self.model.fc_out.weight)
        for block in self.model.attn_stack.layers:
            block.attn.causal.fill_(1)


class PooledBlock(nn.Module):
    """A block that adds the mean over all rows, as squeeze-and-excitation does."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, *args):
        x = self.block(x, *args)
        return x + x.mean(dim=1, keepdim=True)


class Pooled(DecoderModule):
    """Causal attention with pooling over time beside it."""

    def __init__(self):
        super().__init__()
        layers = self.network.blocks.layers
        self.network.blocks.layers = nn.ModuleList(PooledBlock(block) for block in layers)


class PooledBeforeHead(DecoderModule):
    """One prediction from the mean over time: the head reads one row."""

    def loss(self, batch):
        network = self.network
        x = network.embedding(batch[:, :-1]) + network.position[1:]
        return F.cross_entropy(
            network.head(network.norm(network.blocks(x)).mean(dim=1, keepdim=True))[:, 0], batch[:, -1]
        )


class NoCrossEntropy(DecoderModule):
    def loss(self, batch):
        return F.mse_loss(self.network(batch[:, :-1]), F.one_hot(batch, VOCAB).float())


class TwoNetworks(DecoderModule):
    """Two networks over the same tokens, each with a cross-entropy of its own."""

    def __init__(self):
        super().__init__()
        self.other = NanoGPTModule().gpt

    def loss(self, batch):
        return flat_loss(self.network(batch[:, :-1]), batch) + self.other(batch[:, :-1], batch[:, 1:])[1]


class ChunkedCrossEntropy(torch.autograd.Function):
    """A cross-entropy of states and head weight, as Liger computes it: logits never stand in memory whole."""

    @staticmethod
    def forward(ctx, states, weight, target):
        logits = states @ weight.T
        ctx.save_for_backward(states, weight, (logits.softmax(-1) - F.one_hot(target, len(weight))) / len(target))
        return (logits.logsumexp(-1) - logits.gather(1, target[:, None])[:, 0]).mean()

    @staticmethod
    def backward(ctx, grad):
        states, weight, error = ctx.saved_tensors
        return grad * error @ weight, grad * error.T @ states, None


class Fused(DecoderModule):
    """A fused linear cross-entropy in an ``autograd.Function``: the head is never called."""

    def states(self, batch):
        network = self.network
        x = torch.cat([network.start.expand(len(batch), -1, -1), network.embedding(batch[:, :-1])], dim=1)
        return network.norm(network.blocks(x + network.position)).flatten(0, 1)

    def loss(self, batch):
        return ChunkedCrossEntropy.apply(self.states(batch), self.network.head.weight, batch.flatten())


class PytorchLightningModule:
    """What a module of the ``pytorch_lightning`` package looks like to ``lightning.pytorch``."""


PytorchLightningModule.__module__ = "pytorch_lightning.core.module"
