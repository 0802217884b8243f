# SPDX-License-Identifier: Apache-2.0
"""Networks with several heads and losses, and with heads that are no module."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.networks.attending import Block
from tests.helpers.networks.common import BLOCKS, DEPTH, DIM, PER_BLOCK, TOKENS, VOCAB, Blocks, TokenModule, flat_loss

CODEBOOKS = 3
EVERY_ROW = list(range(TOKENS))
LAST_ROWS = [PER_BLOCK * block + PER_BLOCK - 1 for block in range(BLOCKS)]
OTHER_ROWS = [row for row in EVERY_ROW if row not in LAST_ROWS]


class Trunk(nn.Module):
    """Row r of its states (B, N, D) predicts token r."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.start = nn.Parameter(torch.randn(1, 1, DIM))
        self.position = nn.Parameter(torch.randn(TOKENS, DIM) * 0.2)
        self.blocks = Blocks(Block() for _ in range(DEPTH))
        self.norm = nn.LayerNorm(DIM)

    def forward(self, ids):
        x = torch.cat([self.start.expand(len(ids), -1, -1), self.embedding(ids)], dim=1)
        return self.norm(self.blocks(x + self.position[: x.shape[1]]))


class TiedTrunk(Trunk):
    """Makes its logits by the embedding's weight."""

    def forward(self, ids):
        return self.logits(super().forward(ids))

    def logits(self, x):
        return F.linear(x, self.embedding.weight)


class EinsumTrunk(TiedTrunk):
    def logits(self, x):
        return torch.einsum("vd,btd->btv", self.embedding.weight, x) * DIM**-0.5


class FlatMatmulTrunk(TiedTrunk):
    """Multiplies all rows of the batch at once, and caps the logits."""

    def logits(self, x):
        return torch.tanh((x.reshape(-1, DIM) @ self.embedding.weight.T) / 3) * 3


class FunctionHeadModule(TokenModule):
    def __init__(self, trunk=TiedTrunk):
        super().__init__()
        self.network = trunk()

    def loss(self, batch):
        return flat_loss(self.network(batch[:, :-1]), batch)


class BoundHeadModule(FunctionHeadModule):
    """A linear map behind the norm, an MLP by functions, and the embedding's weight behind that."""

    def __init__(self):
        super().__init__(Trunk)
        self.inner = nn.Linear(DIM, DIM)

    def loss(self, batch):
        x = F.gelu(self.inner(self.network(batch[:, :-1])))
        return flat_loss(x @ self.network.embedding.weight.T, batch)


class HeadsModule(TokenModule):
    """Several heads on one trunk."""

    count = CODEBOOKS

    def __init__(self):
        super().__init__()
        self.network = Trunk()
        self.heads = nn.ModuleList(nn.Linear(DIM, VOCAB) for _ in range(self.count))

    def states(self, batch):
        return self.network(batch[:, :-1])


class FactorisedModule(HeadsModule):
    """Open-MAGVIT2: a token is two numbers, whose losses are added."""

    count = 2

    def loss(self, batch):
        x = self.states(batch)
        return flat_loss(self.heads[0](x), batch) + flat_loss(self.heads[1](x), (batch * 7) % VOCAB)


class CodebooksModule(HeadsModule):
    """Audio models: a head and a cross-entropy for each codebook, averaged."""

    def loss(self, batch):
        x = self.states(batch)
        return sum(flat_loss(head(x), (batch + i) % VOCAB) for i, head in enumerate(self.heads)) / len(self.heads)


def codes(batch):
    """Targets (B, N, k)."""
    return torch.stack([(batch + i) % VOCAB for i in range(CODEBOOKS)], dim=-1)


class StackedModule(HeadsModule):
    """All heads in one call, (B, V, k, N)."""

    loss_tokens = (EVERY_ROW * CODEBOOKS,)

    def loss(self, batch):
        x = self.states(batch)
        logits = torch.stack([head(x) for head in self.heads], dim=1)
        return F.cross_entropy(logits.movedim(-1, 1), codes(batch).movedim(-1, 1))


class InterleavedModule(HeadsModule):
    """One wide layer for all codebooks, (B * N * k, V)."""

    count = 1
    loss_tokens = ([row for row in EVERY_ROW for _ in range(CODEBOOKS)],)

    def __init__(self):
        super().__init__()
        self.heads[0] = nn.Linear(DIM, CODEBOOKS * VOCAB)

    def loss(self, batch):
        logits = self.heads[0](self.states(batch)).view(-1, VOCAB)
        return F.cross_entropy(logits, codes(batch).reshape(-1))


class WorldModelModule(HeadsModule):
    """IRIS: tokens on all rows of a block but the last, reward and end on the last one."""

    loss_tokens = (OTHER_ROWS, LAST_ROWS, LAST_ROWS)

    def __init__(self):
        super().__init__()
        self.heads[1], self.heads[2] = nn.Linear(DIM, 3), nn.Linear(DIM, 2)

    def loss(self, batch):
        x = self.states(batch)
        tokens, reward, end = (
            flat_loss(head(x[:, rows]), batch[:, rows] % head.out_features)
            for head, rows in zip(self.heads, self.loss_tokens, strict=True)
        )
        return tokens + 0.5 * reward + 0.25 * end


class TwiceModule(HeadsModule):
    """Two losses on one head: one over all tokens, one over those of the last frame alone."""

    count = 1
    loss_tokens = (EVERY_ROW, EVERY_ROW[-PER_BLOCK:])

    def loss(self, batch):
        logits = self.heads[0](self.states(batch))
        return flat_loss(logits, batch) + 0.1 * flat_loss(logits[:, -PER_BLOCK:], batch[:, -PER_BLOCK:])


class LogSoftmaxModule(HeadsModule):
    """Log-probabilities and their negative log-likelihood."""

    count = 1

    def loss(self, batch):
        logs = F.log_softmax(self.heads[0](self.states(batch)), dim=-1)
        return nn.NLLLoss()(logs.flatten(0, 1), batch.flatten())


class FusedByTorchModule(HeadsModule):
    """torch's own fused linear cross-entropy: the head is never called."""

    count = 1

    def loss(self, batch):
        x, head = self.states(batch).flatten(0, 1), self.heads[0]
        return F.linear_cross_entropy(x, head.weight, batch.flatten(), linear_bias=head.bias)
