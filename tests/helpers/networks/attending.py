# SPDX-License-Identifier: Apache-2.0
"""Networks of ours that attend through ``F.scaled_dot_product_attention``, each in the shape of a known one."""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext

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


def rotary_rows(rows: int) -> torch.Tensor:
    """Cosines and sines (T, E / 2, 2)."""
    angles = torch.arange(rows)[:, None] * 100.0 ** -torch.linspace(0, 1, DIM // HEADS // 2)
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def turn(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns neighbouring pairs of queries or keys (B, heads, T, E)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


class Attention(nn.Module):
    """One linear layer for query, key and value, or three."""

    def __init__(self, *, fused=True, dropout=0.0):
        super().__init__()
        names = ("c_attn",) if fused else ("to_q", "to_k", "to_v")
        self.inputs = nn.ModuleDict({name: nn.Linear(DIM, 3 * DIM if fused else DIM) for name in names})
        self.c_proj = nn.Linear(DIM, DIM)
        self.dropout = dropout

    def forward(self, x, table=None, bias=None):
        q, k, v = torch.cat([layer(x) for layer in self.inputs.values()], dim=-1).chunk(3, dim=-1)
        q, k, v = split_heads(q), split_heads(k), split_heads(v)
        if table is not None:
            q, k = turn(q, table), turn(k, table)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=bias is None)
        return self.c_proj(join_heads(y))


class Block(nn.Module):
    def __init__(self, *, fused=True, dropout=0.0):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attn = Attention(fused=fused, dropout=dropout)
        self.mlp = feed_forward(dropout)

    def forward(self, x, table=None, start_pos=None, bias=None):
        x = x + self.attn(self.ln_1(x), table, bias)
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    """nanoGPT: learned positions, fused ``c_attn``, dropout, a tied head, the loss inside the forward."""

    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCAB, DIM), nn.Embedding(TOKENS, DIM)
        self.drop = nn.Dropout(0.1)
        self.h = Blocks(Block(dropout=0.1) for _ in range(DEPTH))
        self.ln_f = nn.LayerNorm(DIM)
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids, targets=None):
        x = self.h(self.drop(self.wte(ids) + self.wpe(torch.arange(ids.shape[1], device=ids.device))))
        if targets is None:
            return self.lm_head(self.ln_f(x[:, [-1]])), None
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, VOCAB), targets.reshape(-1), ignore_index=-1)


class NanoGPTModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.gpt = NanoGPT()

    def loss(self, batch):
        return self.gpt(batch[:, :-1], batch[:, 1:])[1]


class SoftCap(nn.Module):
    """Bounds logits, as Gemma 2 does behind its head."""

    def forward(self, logits):
        return 3.0 * torch.tanh(logits / 3.0)


class Decoder(nn.Module):
    """A decoder with a learned start token (row r predicts token r); its options are the columns of the table."""

    def __init__(self, *, fused=True, rotary=False, sequential=False, zero_head=False, scaled=False, after=None):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.start = nn.Parameter(torch.randn(1, 1, DIM))
        self.position = None if rotary else nn.Parameter(torch.randn(TOKENS, DIM) * 0.2)
        blocks = [Block(fused=fused) for _ in range(DEPTH)]
        self.blocks = nn.Sequential(*blocks) if sequential else Blocks(blocks)
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VOCAB)
        self.scale = nn.Parameter(torch.tensor(1.5)) if scaled else None
        self.after = None if after is None else after()
        if zero_head:
            nn.init.zeros_(self.head.weight)

    def forward(self, ids):
        x = torch.cat([self.start.expand(len(ids), -1, -1), self.embedding(ids)], dim=1)
        if self.position is None:
            x = self.blocks(x, rotary_rows(x.shape[1]).to(x.device))
        else:
            x = self.blocks(x + self.position[: x.shape[1]])
        logits = self.head(self.norm(x))
        logits = logits if self.scale is None else logits * self.scale
        return logits if self.after is None else self.after(logits)


def grid_loss(logits, targets):
    return F.cross_entropy(logits.mT.unflatten(2, GRID), targets.unflatten(1, GRID))


def smoothed_loss(logits, targets):
    return nn.CrossEntropyLoss(label_smoothing=0.1)(logits.flatten(0, 1), targets.flatten())


def weighted_loss(logits, targets):
    weight = torch.linspace(0.5, 2.0, VOCAB, device=logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), weight=weight)


def hide_some(targets):
    """Targets of which a fifth, in odd places and never the outermost, is the user's ``ignore_index`` of -1."""
    hidden = (torch.arange(TOKENS, device=targets.device) * 7 + targets[:, :1]) % 5 == 0
    hidden[:, [0, -1]] = False
    return targets.masked_fill(hidden, -1)


def ignoring_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), hide_some(targets).flatten(), ignore_index=-1)


def unreduced_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean()


def divided_loss(logits, targets):
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / targets.numel()


class DecoderModule(TokenModule):
    """The network and its loss as functions of their own."""

    def __init__(self, form=flat_loss, **options):
        super().__init__()
        self.network = Decoder(**options)
        self.form = form

    def loss(self, batch):
        return self.form(self.network(batch[:, :-1]), batch)


class AdaptiveBlock(nn.Module):
    """DiT's and VAR's block: scales, shifts and gates made of a condition (B, D); the mask is an argument."""

    def __init__(self):
        super().__init__()
        self.attn, self.mlp = Attention(), feed_forward()
        self.norm = nn.LayerNorm(DIM, elementwise_affine=False)
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(DIM, 6 * DIM))

    def forward(self, x, cond, attn_bias):
        scale_1, shift_1, gate_1, scale_2, shift_2, gate_2 = self.ada(cond)[:, None].chunk(6, dim=-1)
        x = x + gate_1 * self.attn(self.norm(x) * (1 + scale_1) + shift_1, None, attn_bias)
        return x + gate_2 * self.mlp(self.norm(x) * (1 + scale_2) + shift_2)


class AdaptiveNetwork(nn.Module):
    """VAR's shape: the class is the first row and the condition of every block and of the norm before the head."""

    def __init__(self):
        super().__init__()
        self.embedding, self.class_embedding = nn.Embedding(VOCAB, DIM), nn.Embedding(CLASSES, DIM)
        self.position = nn.Parameter(torch.randn(TOKENS, DIM) * 0.2)
        self.blocks = Blocks(AdaptiveBlock() for _ in range(DEPTH))
        self.head_ada, self.head = nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, VOCAB)
        mask = torch.full((TOKENS, TOKENS), float("-inf")).triu(1)
        self.register_buffer("attn_bias", mask[None, None])

    def forward(self, labels, ids):
        cond = self.class_embedding(labels)
        x = torch.cat([cond[:, None], self.embedding(ids)], dim=1) + self.position
        x = self.blocks(x, cond, self.attn_bias)
        scale, shift = self.head_ada(cond)[:, None].chunk(2, dim=-1)
        return self.head(F.layer_norm(x, (DIM,)) * (1 + scale) + shift)


class AdaptiveModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.network = AdaptiveNetwork()

    def loss(self, batch):
        ids, labels = batch
        return flat_loss(self.network(labels, ids[:, :-1]), ids)


class LlamaGen(nn.Module):
    """LlamaGen: a class prefix that is dropped at random, ``freqs_cis`` as an argument, the loss inside."""

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, DIM)
        self.cls_embedding = nn.Embedding(CLASSES + 1, DIM)
        self.layers = Blocks(Block() for _ in range(DEPTH))
        self.norm = nn.RMSNorm(DIM)
        self.output = nn.Linear(DIM, VOCAB, bias=False)
        self.freqs_cis = rotary_rows(TOKENS + 1)

    def forward(self, ids, cond_idx, targets=None):
        if self.training:
            dropped = (torch.rand(cond_idx.shape) < 0.3).to(cond_idx.device)  # drawn on the CPU: alike on all devices
            cond_idx = torch.where(dropped, CLASSES, cond_idx)
        h = torch.cat([self.cls_embedding(cond_idx)[:, None], self.tok_embeddings(ids)], dim=1)
        h = self.layers(h, self.freqs_cis[: h.shape[1]].to(h.device), None)
        logits = self.output(self.norm(h)).float()
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class LlamaGenModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.model = LlamaGen()

    def loss(self, batch):
        ids, labels = batch
        return self.model(ids[:, :-1], labels, targets=ids)[1]


class EncoderModule(TokenModule):
    """``nn.TransformerEncoder`` with a causal mask, scaled embeddings and a start token of its own."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 1, DIM)
        self.position = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.2)
        layer = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, norm=nn.LayerNorm(DIM), enable_nested_tensor=False)
        self.out = nn.Linear(DIM, VOCAB)

    def loss(self, batch):
        start = torch.full((len(batch), 1), VOCAB, device=batch.device)
        x = self.embedding(torch.cat([start, batch[:, :-1]], dim=1)) * math.sqrt(DIM) + self.position
        mask = nn.Transformer.generate_square_subsequent_mask(TOKENS, device=batch.device)
        return flat_loss(self.out(self.encoder(x, mask=mask, is_causal=True)), batch)


class GroupedAttention(nn.Module):
    """litgpt's attention: one fused layer whose rows lie group by group, keys and values shared by two heads each."""

    def __init__(self):
        super().__init__()
        self.groups = HEADS // 2
        self.qkv = nn.Linear(DIM, 2 * DIM, bias=False)
        self.proj = nn.Linear(DIM, DIM, bias=False)

    def forward(self, x, cos, sin, mask, input_pos):
        q, k, v = self.qkv(x).unflatten(-1, (self.groups, 4, -1)).split((2, 1, 1), dim=-2)  # (B, T, groups, ., E)
        q, k, v = (part.flatten(2, 3).transpose(1, 2) for part in (q, k, v))
        table = torch.stack([cos, sin], dim=-1)
        q, k = turn(q, table[:, None]), turn(k, table[:, None])
        k, v = (part.repeat_interleave(2, dim=1) for part in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=q.shape[-1] ** -0.5, is_causal=mask is None)
        return self.proj(join_heads(y))


class LitBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.RMSNorm(DIM), nn.RMSNorm(DIM)
        self.attn, self.mlp = GroupedAttention(), feed_forward()

    def forward(self, x, cos, sin, mask=None, input_pos=None):
        x = self.attn(self.norm_1(x), cos, sin, mask, input_pos) + x
        return self.mlp(self.norm_2(x)) + x


class LitGPT(nn.Module):
    """litgpt's ``GPT``: tables of cosines and sines (1, T, E / 2), mask and positions as positional arguments."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(DIM, VOCAB, bias=False)
        self.transformer = nn.ModuleDict(
            {"wte": nn.Embedding(VOCAB, DIM), "h": Blocks(LitBlock() for _ in range(DEPTH))}
        )
        self.ln_f = nn.RMSNorm(DIM)
        table = rotary_rows(TOKENS + 2)
        self.register_buffer("cos", table[..., 0], persistent=False)
        self.register_buffer("sin", table[..., 1], persistent=False)

    def forward(self, idx):
        rows = idx.shape[1]
        tables = self.cos[None, :rows], self.sin[None, :rows]
        x = self.transformer["h"](self.transformer["wte"](idx), *tables, None, None)
        return 3.0 * torch.tanh(self.lm_head(self.ln_f(x)) / 3.0)


class LitGPTModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.gpt = LitGPT()

    def loss(self, batch):
        return flat_loss(self.gpt(batch)[:, :-1], batch[:, 1:])


class Pairs(nn.Module):
    """Layers as lists of attention and feed-forward, which this module calls."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleList([nn.LayerNorm(DIM), Attention(), feed_forward()]) for _ in range(DEPTH)
        )

    def forward(self, x):
        for norm, attention, feed in self.layers:
            x = x + attention(norm(x))
            x = x + feed(x)
        return x


class PairsModule(TokenModule):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB + 1, DIM)
        self.position = nn.Parameter(torch.randn(TOKENS, DIM) * 0.2)
        self.stack, self.norm, self.head = Pairs(), nn.LayerNorm(DIM), nn.Linear(DIM, VOCAB)

    def loss(self, batch):
        x = self.embedding(F.pad(batch[:, :-1], (1, 0), value=VOCAB)) + self.position
        return flat_loss(self.head(self.norm(self.stack(x))), batch)


class XTransformersModule(TokenModule):
    """x-transformers: a layer is a list of norms, block and residual that the decoder takes apart itself."""

    def __init__(self, **options):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit.script, at its import
            from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
        layers = Decoder(dim=DIM, depth=2, heads=4, **options)
        for part in layers.modules():
            if hasattr(part, "sdp_context_manager"):
                part.sdp_context_manager = nullcontext  # its own cannot be pickled
        self.net = AutoregressiveWrapper(TransformerWrapper(num_tokens=VOCAB, max_seq_len=TOKENS, attn_layers=layers))

    def loss(self, batch):
        return self.net(batch)
