# SPDX-License-Identifier: Apache-2.0
"""Networks of transformers, as they come."""

from __future__ import annotations

import inspect

import torch
import transformers
from torch import nn
from transformers import Emu3TextConfig, GPT2Config, LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import GPT2Block

from tests.helpers.networks.common import DEPTH, DIM, HEADS, VOCAB, TokenModule, flat_loss


def lower_right(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **options):
    """Attention as flash-attention computes it: no mask tensor, causal from the lower right, heads (B, T, H, E) out."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    rows, keys = query.shape[-2], key.shape[-2]
    visible = torch.ones(rows, keys, dtype=torch.bool, device=query.device).tril(keys - rows)
    scores = (query @ key.mT) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    weights = nn.functional.dropout(weights, dropout, module.training)
    return (weights @ value).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS["lower_right"] = lower_right

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": DIM,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS // 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


def missing(name: str, attention: str = "sdpa") -> str:
    """What the installed transformers lacks of a network, ``""`` for nothing."""
    if name == "qwen3" and not hasattr(transformers, "Qwen3Config"):
        return "transformers has Qwen3 from 4.51 on"
    if name == "gpt2" and attention != "sdpa" and "layer_past" in inspect.signature(GPT2Block.forward).parameters:
        return "GPT-2 takes a tuple and no cache before transformers 4.52"
    return ""


def build_transformers(name: str, attention: str) -> nn.Module:
    if name == "gpt2":
        sizes = {"vocab_size": VOCAB, "n_positions": 40, "n_embd": DIM, "n_layer": DEPTH, "n_head": HEADS}
        config = GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    elif name == "llama":
        config = LlamaConfig(**SMALL)
    elif name == "qwen3":
        config = transformers.Qwen3Config(**SMALL, head_dim=DIM // HEADS)
    else:
        config = Emu3TextConfig(**SMALL)
    config._attn_implementation = attention
    networks = {
        "gpt2": "GPT2LMHeadModel",
        "llama": "LlamaForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
        "emu3": "Emu3ForCausalLM",
    }
    return getattr(transformers, networks[name])(config)


class TransformersModule(TokenModule):
    """One of transformers' networks, called with ``labels=`` or for its logits."""

    def __init__(self, name, *, labels=False, attention="sdpa"):
        super().__init__()
        self.model = build_transformers(name, attention)
        self.labels = labels

    def loss(self, batch):
        if self.labels:
            return self.model(input_ids=batch, labels=batch).loss
        return flat_loss(self.model(input_ids=batch).logits[:, :-1], batch[:, 1:])


def checkpoint_transformers(module: nn.Module) -> None:
    """Turns transformers' own checkpointing on."""
    network = module.model  # the first of the two names is that of transformers 5
    enable = getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
