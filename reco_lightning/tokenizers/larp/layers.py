# SPDX-License-Identifier: Apache-2.0
"""Parts of the LARP tokenizer (Wang et al., arXiv 2410.21264): patches, trunk and codes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

__all__ = ["PatchEmbedding", "Trunk", "VectorQuantiser", "code_scores"]


def code_scores(features: Tensor, codes: Tensor) -> Tensor:
    """Returns the cosine of the angles between features and codes, in float32 whatever the dtypes and autocast.

    Args:
        features: (..., C), of any length.
        codes: (V, C), of any length.

    Returns:
        float32, (..., V), -1 to 1.

    Example:
        >>> code_scores(torch.tensor([[2.0, 0.0]]), torch.tensor([[9.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.]])
    """
    with torch.autocast(features.device.type, enabled=False):
        return F.normalize(features.float(), dim=-1) @ F.normalize(codes.float(), dim=-1).T


class PatchEmbedding(nn.Module):
    """Clips (B, 3, T, H, W) to patches (B, t * h * w, D), columns running fastest.

    Args:
        width: D.
        frames: Frames of a patch; of 1, the weights are those of a 2-D convolution.
        side: Side of a patch in pixels.
    """

    def __init__(self, width: int, frames: int, side: int) -> None:
        super().__init__()
        self.frames, self.side = frames, side
        self.proj: nn.Conv2d | nn.Conv3d
        if frames == 1:
            self.proj = nn.Conv2d(3, width, side, side)
        else:
            self.proj = nn.Conv3d(3, width, (frames, side, side), (frames, side, side))

    def forward(self, video: Tensor) -> Tensor:
        """Patches of clips."""
        size = {"f": self.frames, "p": self.side, "q": self.side}
        pixels = rearrange(video, "b c (t f) (h p) (w q) -> b (t h w) (c f p q)", **size)
        # kernel and stride are equal: the convolution is one linear map of each patch
        return F.linear(pixels, self.proj.weight.flatten(1), self.proj.bias)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three h e) -> three b h n e", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n e -> b n (h e)"))


class _FeedForward(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        # 1e-5, as in the release; newer versions of the library that its code takes the block from have 1e-6
        self.norm1 = nn.LayerNorm(width, eps=1e-5)
        self.attn = _Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-5)
        self.mlp = _FeedForward(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    """Blocks in which context and queries, one behind the other, all see each other; no final norm.

    Args:
        width: D.
        depth: Blocks.
        heads: Attention heads.
    """

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([_Block(width, heads) for _ in range(depth)])

    def forward(self, context: Tensor, queries: Tensor) -> Tensor:
        """States of the queries.

        Args:
            context: (B, n, D).
            queries: (1, m, D), the same for all clips.

        Returns:
            (B, m, D).
        """
        x = torch.cat([context, queries.expand(len(context), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return x[:, context.shape[1] :]


class VectorQuantiser(nn.Module):
    """Codes compared by direction: the likeliest, or one drawn by its likelihood.

    Args:
        codebook_size: V.
        width: C, dimensions of a code.
        temperature: What cosines are divided by before a draw; below 0 a learned number is its inverse.
    """

    def __init__(self, codebook_size: int, width: int, temperature: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codebook_size, width)
        self.temperature = temperature
        if temperature < 0:
            self.stochastic_temperature_inv = nn.Parameter(torch.tensor(10.0))

    def probabilities(self, features: Tensor) -> Tensor:
        """Returns the likelihood of each code.

        Args:
            features: (..., C).

        Returns:
            float32, (..., V).
        """
        inverse = 1 / self.temperature if self.temperature > 0 else self.stochastic_temperature_inv.float()
        return (code_scores(features, self.embedding.weight) * inverse).softmax(dim=-1)

    def forward(self, features: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Returns the ids of features.

        Args:
            features: (B, N, C).
            generator: Draws ids; None takes the likeliest.

        Returns:
            int64 (B, N).
        """
        # in parts: the scores of a batch of 16 clips at once would take 512 MiB
        parts = features.flatten(0, 1).split(4096)
        if generator is None:
            ids = [code_scores(part, self.embedding.weight).argmax(dim=-1) for part in parts]
        else:
            ids = [torch.multinomial(self.probabilities(part), 1, generator=generator)[:, 0] for part in parts]
        return torch.cat(ids).view(features.shape[:-1])

    def lookup(self, ids: Tensor) -> Tensor:
        """Codes of ids, of length 1.

        Args:
            ids: (B, N).

        Returns:
            (B, N, C), in the dtype of the weights.
        """
        codes = self.embedding.weight
        return F.normalize(codes[ids].float(), dim=-1).to(codes.dtype)
