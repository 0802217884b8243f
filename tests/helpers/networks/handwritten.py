# SPDX-License-Identifier: Apache-2.0
"""Networks of ours whose attention is written out, in the shapes of minGPT, taming-transformers, TATS and VideoGPT.

``cut`` in each attention makes constants of the first rows' keys and values: the reference for its gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from tests.helpers.networks.common import (
    CLASSES,
    DEPTH,
    DIM,
    GRID,
    HEADS,
    TOKENS,
    VOCAB,
    Blocks,
    TokenModule,
    feed_forward,
    flat_loss,
    join_heads,
    split_heads,
)


def attend(q, k, v, visible, *, cut=None, drop=None):
    """Softmax attention by matrix products; ``visible`` (T, T) is true where a row sees a key."""
    scores = q @ k.mT
    if cut is not None:
        context = torch.arange(q.shape[-2], device=q.device) < cut
        frozen = ~context[:, None] & context[None, :]
        scores = torch.where(frozen, q @ k.detach().mT, scores)
    weights = (scores / q.shape[-1] ** 0.5).masked_fill(~visible, float("-inf")).softmax(-1)
    weights = weights if drop is None else drop(weights)
    return weights @ v if cut is None else (weights * frozen) @ v.detach() + (weights * ~frozen) @ v


class MinGPTAttention(nn.Module):
    """minGPT's; ``present`` returns keys and values too, as taming-transformers does."""

    def __init__(self, rows, *, present=False, dropout=0.1):
        super().__init__()
        self.key, self.query, self.value, self.proj = (nn.Linear(DIM, DIM) for _ in range(4))
        self.attn_drop, self.resid_drop = nn.Dropout(dropout), nn.Dropout(dropout)
        self.register_buffer("mask", torch.ones(rows, rows).tril()[None, None])
        self.n_head = HEADS
        self.present = present
        self.cut = None

    def forward(self, x, layer_past=None):
        rows = x.shape[1]
        q, k, v = split_heads(self.query(x)), split_heads(self.key(x)), split_heads(self.value(x))
        present = torch.stack((k, v))
        if layer_past is not None:
            k, v = torch.cat((layer_past[0], k), dim=-2), torch.cat((layer_past[1], v), dim=-2)
        y = attend(q, k, v, self.mask[..., :rows, :rows] != 0, cut=self.cut, drop=self.attn_drop)
        y = self.resid_drop(self.proj(join_heads(y)))
        return (y, present) if self.present else y


class MinGPTBlock(nn.Module):
    def __init__(self, rows, *, present=False):
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = MinGPTAttention(rows, present=present)
        self.mlp = feed_forward(0.1)

    def forward(self, x):
        attended = self.attn(self.ln1(x))
        x = x + (attended[0] if self.attn.present else attended)
        return x + self.mlp(self.ln2(x))


class MinGPT(nn.Module):
    """minGPT (and, with ``present``, taming-transformers): blocks in a ``Sequential``, learned positions."""

    def __init__(self, *, present=False, vocab=VOCAB, stacked=False):
        super().__init__()
        rows = TOKENS + 2
        self.tok_emb = nn.Embedding(vocab, DIM)
        self.pos_emb = nn.Parameter(torch.randn(1, rows, DIM) * 0.2)
        self.drop = nn.Dropout(0.1)
        blocks = [MinGPTBlock(rows, present=present) for _ in range(DEPTH)]
        self.blocks = Blocks(blocks) if stacked else nn.Sequential(*blocks)
        self.ln_f = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, vocab, bias=False)

    def forward(self, ids, embeddings=None):
        x = self.tok_emb(ids)
        if embeddings is not None:
            x = torch.cat((embeddings, x), dim=1)
        return self.head(self.ln_f(self.blocks(self.drop(x + self.pos_emb[:, : x.shape[1]]))))


class MinGPTModule(TokenModule):
    def __init__(self, **options):
        super().__init__()
        self.gpt = MinGPT(**options)

    def loss(self, batch):
        return flat_loss(self.gpt(batch[:, :-1]), batch[:, 1:])


class FrozenTokenizer(nn.Module):
    """A VQ encoder with transformer blocks of its own, as many rows as the network's, none of them to be windowed."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(*[MinGPTBlock(TOKENS) for _ in range(DEPTH)])
        self.codebook = nn.Embedding(VOCAB, DIM)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode=True):
        return super().train(False)

    def forward(self, ids):
        features = self.codebook(ids) + 0.01 * self.blocks(self.codebook(ids))
        return torch.cdist(features, self.codebook.weight[None].expand(len(ids), -1, -1)).argmin(-1)


class TATSModule(TokenModule):
    """TATS: tokens made in the step, the class as a token in front, logits cut after the network."""

    def __init__(self):
        super().__init__()
        self.first_stage_model = FrozenTokenizer()
        self.transformer = MinGPT(present=True, vocab=VOCAB + CLASSES, stacked=True)

    @torch.no_grad()
    def encode(self, clip):
        return self.first_stage_model(clip)

    def loss(self, batch):
        clip, labels = batch
        z, c = self.encode(clip), labels[:, None] + VOCAB
        logits = self.transformer(torch.cat((c, z), dim=1)[:, :-1])
        return flat_loss(logits[:, c.shape[1] - 1 :], z)

    def configure_optimizers(self):
        return torch.optim.SGD(self.transformer.parameters(), lr=0.1)


class OmniModule(TokenModule):
    """OmniTokenizer's language model: manual optimisation by two optimizers; the class is left out at random."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.transformer = MinGPT(stacked=True)
        self.sos = nn.Parameter(torch.randn(1, 1, DIM))
        self.classes = nn.Embedding(CLASSES, DIM)

    def loss(self, batch):
        ids, labels = batch
        prefix = self.sos.expand(len(ids), -1, -1)
        if not self.training or torch.rand(()) < 0.5:
            prefix = torch.cat((prefix, self.classes(labels)[:, None]), dim=1)
        logits = self.transformer(ids[:, :-1], prefix)[:, prefix.shape[1] - 1 :]
        return flat_loss(logits, ids)

    def training_step(self, batch, batch_idx):
        network, condition = self.optimizers()
        network.zero_grad()
        condition.zero_grad()
        self.manual_backward(self.loss(batch))
        network.step()
        condition.step()

    def configure_optimizers(self):
        condition = [self.sos, *self.classes.parameters()]
        return [torch.optim.SGD(self.transformer.parameters(), lr=0.1), torch.optim.SGD(condition, lr=0.1)]


class FixedAttention(nn.Module):
    """VideoGPT's: over all places of a grid (B, T, H, W, C) at once, with a mask of one fixed size."""

    def __init__(self):
        super().__init__()
        self.w_qs, self.w_ks, self.w_vs = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))
        self.fc = nn.Linear(DIM, DIM)
        self.drop = nn.Dropout(0.1)
        self.register_buffer("causal", torch.ones(TOKENS, TOKENS).tril())

    def forward(self, x):
        rows = x.flatten(1, 3)
        q, k, v = split_heads(self.w_qs(rows)), split_heads(self.w_ks(rows)), split_heads(self.w_vs(rows))
        y = attend(q, k, v, self.causal == 1, drop=self.drop)
        return self.fc(join_heads(y)).view_as(x)


class GridBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.pre_attn_norm, self.pre_fc_norm = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn, self.fc_block = FixedAttention(), feed_forward(0.1)

    def forward(self, x):
        x = x + self.attn(self.pre_attn_norm(x))
        return x + self.fc_block(self.pre_fc_norm(x))


class VideoGPT(nn.Module):
    """VideoGPT: right shift and positions in 3-D inside, checkpointed blocks on (B, T, H, W, C), a head of zeros."""

    def __init__(self):
        super().__init__()
        self.fc_in = nn.Linear(VOCAB, DIM, bias=False)
        self.sos = nn.Parameter(torch.randn(DIM) * 0.02)
        self.d_0, self.d_1, self.d_2 = (nn.Parameter(torch.randn(size, DIM) * 0.2) for size in GRID)
        self.attn_stack = Blocks(GridBlock() for _ in range(DEPTH))
        self.attn_stack.checkpointing = True
        self.norm = nn.LayerNorm(DIM)
        self.fc_out = nn.Linear(DIM, VOCAB, bias=False)
        nn.init.zeros_(self.fc_out.weight)

    def forward(self, codes):
        h = self.fc_in(F.one_hot(codes, VOCAB).float()).flatten(1, 3)
        h = torch.cat((self.sos.expand(len(h), 1, -1), h[:, :-1]), dim=1).unflatten(1, GRID)
        h = h + self.d_0[:, None, None] + self.d_1[:, None] + self.d_2
        logits = self.fc_out(self.norm(self.attn_stack(h)))
        return logits.movedim(-1, 1), F.cross_entropy(logits.movedim(-1, 1), codes)


class VideoGPTModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.model = VideoGPT()

    def loss(self, batch):
        return self.model(batch)[1]


class OwnAttention(nn.Module):
    """Attention as a paper's first code has it: a mask made on the spot, so that shorter input is accepted."""

    def __init__(self):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        q, k, v = (split_heads(part) for part in self.wqkv(x).chunk(3, dim=-1))
        visible = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.wo(join_heads(attend(q, k, v, visible)))


class OwnBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention, self.mlp = OwnAttention(), feed_forward(0.1)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HandWrittenModule(TokenModule):
    """A decoder with hand-written attention under names of its own; all tokens are fed, the last row is dropped."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.position = nn.Parameter(torch.randn(TOKENS, DIM) * 0.2)
        self.blocks = Blocks(OwnBlock() for _ in range(DEPTH))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB)

    def loss(self, batch):
        x = self.blocks(self.embedding(batch) + self.position[: batch.shape[1]])
        return flat_loss(self.head(self.norm(x))[:, :-1], batch[:, 1:])
