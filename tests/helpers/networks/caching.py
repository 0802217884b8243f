# SPDX-License-Identifier: Apache-2.0
"""A decoder whose layers take a key/value cache as those of transformers do, by any name and in any way.

Attention is written out: the cache is the only way to its keys and values. ``cut`` in it makes constants of the first
rows' keys and values: the reference for its gradients.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import nn

from tests.helpers.networks.common import (
    DEPTH,
    DIM,
    TOKENS,
    VOCAB,
    TokenModule,
    feed_forward,
    flat_loss,
    join_heads,
    split_heads,
)
from tests.helpers.networks.handwritten import attend


class Attention(nn.Module):
    """Attention without any name for its cache; the subclasses have one each."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.cut = None

    def run(self, x, cache):
        q, k, v = map(split_heads, self.qkv(x).chunk(3, dim=-1))
        if cache is not None:
            k, v = cache.update(k, v, 0)
        rows, keys = q.shape[-2], k.shape[-2]
        return self.out(join_heads(attend(q, k, v, torch.ones(rows, keys).tril(keys - rows) != 0, cut=self.cut)))


class Layer(nn.Module):
    """A layer around one of the attentions; the subclasses say how they are called."""

    attention_class: type[Attention]

    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(DIM), nn.LayerNorm(DIM)
        self.attention = self.attention_class()
        self.mlp = feed_forward()

    def run(self, x, **kwargs):
        x = x + self.attention(self.norm1(x), **kwargs)
        return x + self.mlp(self.norm2(x))


class CacheAttention(Attention):
    def forward(self, x, cache=None):
        return self.run(x, cache)


class CacheLayer(Layer):
    attention_class = CacheAttention

    def forward(self, x, mask=None, cache=None, use_cache=False, **kwargs):
        return self.run(x, cache=cache)


class PastKeyValuesAttention(Attention):
    def forward(self, x, past_key_values=None):
        return self.run(x, past_key_values)


class PastKeyValuesLayer(Layer):
    attention_class = PastKeyValuesAttention

    def forward(self, x, mask=None, past_key_values=None, use_cache=False, **kwargs):
        return self.run(x, past_key_values=past_key_values)


class PastKeyValueAttention(Attention):
    def forward(self, x, past_key_value=None):
        return self.run(x, past_key_value)


class PastKeyValueLayer(Layer):
    attention_class = PastKeyValueAttention

    def forward(self, x, mask=None, past_key_value=None, use_cache=False, **kwargs):
        return self.run(x, past_key_value=past_key_value)


class LayerPastLayer(Layer):
    attention_class = CacheAttention

    def forward(self, x, mask=None, use_cache=False, layer_past=None):
        return self.run(x, cache=layer_past)


class PositionalLayer(Layer):
    """As GPT-2's: the network hands the cache over by place."""

    attention_class = CacheAttention

    def forward(self, x, cache=None, mask=None):
        return self.run(x, cache=cache)


class TwoNamesLayer(Layer):
    """In the midst of a renaming: both names are in the signature, and the old one warns."""

    attention_class = CacheAttention

    def forward(self, x, past_key_values=None, cache=None):
        if past_key_values is not None:
            warnings.warn("past_key_values is deprecated, use cache", FutureWarning, stacklevel=2)
        return self.run(x, cache=past_key_values if cache is None else cache)


class EarlierTwoNamesLayer(Layer):
    """The renaming before that one."""

    attention_class = PastKeyValuesAttention

    def forward(self, x, past_key_values=None, past_key_value=None):
        if past_key_value is not None:
            warnings.warn("past_key_value is deprecated, use past_key_values", FutureWarning, stacklevel=2)
        return self.run(x, past_key_values=past_key_value if past_key_values is None else past_key_values)


def renamed(old, new, *, told=True):
    """Takes an argument's old name with a warning, as transformers' ``deprecate_kwarg``; ``told``: with ``wraps``."""

    def wrap(forward):
        def wrapped(*args, **kwargs):
            if old in kwargs:
                warnings.warn(f"{old} is deprecated, use {new}", FutureWarning, stacklevel=2)
                kwargs[new] = kwargs.pop(old)
            return forward(*args, **kwargs)

        return functools.wraps(forward)(wrapped) if told else wrapped

    return wrap


class RenamedLayer(Layer):
    """Behind a decorator that shows the signature."""

    attention_class = CacheAttention

    @renamed("past_key_values", "cache")
    def forward(self, x, mask=None, cache=None, **kwargs):
        return self.run(x, cache=cache)


class HiddenLayer(Layer):
    """Behind a decorator that hides the signature."""

    attention_class = CacheAttention

    @renamed("past_key_values", "cache", told=False)
    def forward(self, x, mask=None, cache=None, **kwargs):
        return self.run(x, cache=cache)


class ForwardingLayer(Layer):
    """Hands on to its attention whatever it is called with."""

    attention_class = CacheAttention

    def forward(self, x, **kwargs):
        return self.run(x, **kwargs)


class UnknownAttention(Attention):
    def forward(self, x, memory=None):
        return self.run(x, memory)


class UnknownLayer(Layer):
    """The cache has a name that no transformers had yet."""

    attention_class = UnknownAttention

    def forward(self, x, mask=None, memory=None, **kwargs):
        return self.run(x, memory=memory)


class DeafLayer(Layer):
    """Takes a cache and leaves it alone."""

    attention_class = CacheAttention

    def forward(self, x, cache=None):
        return self.run(x)


class ListLayer(Layer):
    """Takes a cache of another kind by a name of transformers."""

    attention_class = CacheAttention

    def forward(self, x, cache=None):
        if cache is not None:
            cache.append(x)
        return self.run(x)


class TupleLayer(Layer):
    """Takes the keys and values themselves, as GPT-2 of transformers before 4.52."""

    attention_class = CacheAttention

    def forward(self, x, layer_past=None):
        if layer_past is not None:
            _, _ = layer_past
        return self.run(x)


class CachingModule(TokenModule):
    """A decoder of such layers, called with ``args`` and ``kwargs`` behind the states."""

    def __init__(self, layer, args=(), **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.positions = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.2)
        self.layers = nn.ModuleList(layer() for _ in range(DEPTH))
        self.head = nn.Linear(DIM, VOCAB)
        self.call = args, kwargs

    def forward(self, ids):
        args, kwargs = self.call
        x = self.embedding(ids) + self.positions[:, : ids.shape[1]]
        for layer in self.layers:
            x = layer(x, *args, **kwargs)
        return self.head(x)

    def loss(self, batch):
        return flat_loss(self(batch[:, :-1]), batch[:, 1:])
