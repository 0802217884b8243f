# SPDX-License-Identifier: Apache-2.0
"""The settings table: every foreign network with the engine that serves it and the conditions that it is tried under.

``test_settings.py`` and ``test_refusals.py`` of ``tests/windowing`` run every row; ``support_matrix`` is the same table
for the reader of the documentation, and ``python -m tests.helpers.settings`` writes it into ``docs/engines.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from reco_lightning import WindowSampler
from tests.helpers.networks import attending, handwritten, heads, own, refused
from tests.helpers.networks.common import (
    BLOCKS,
    PER_BLOCK,
    VOCAB,
    draw_grid,
    draw_ids,
    draw_labeled,
    draw_named,
    switch_checkpointing,
)
from tests.helpers.networks.transformers_ import TransformersModule, checkpoint_transformers, missing

FLAT, GRID_FORM = "(B·L, V)", "(B, V, T, H, W)"
CONDITIONS = {
    "checkpointing": "Checkpointing",
    "bf16-mixed": "bf16-mixed",
    "16-mixed": "16-mixed",
    "compile": "`torch.compile`",
    "ddp": "DDP",
    "fsdp2": "FSDP2",
}
WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=15)
"""Draws the windows from the tokens 12, 18 and 0 on in the first three steps."""

Reference = Literal["attention", "attend", "cut", "cache", "states", "whole"]


@dataclass(frozen=True)
class Setting:
    """One network as a user has it.

    Args:
        name: Its name in tests.
        shape: Whose shape it has, for the documentation.
        build: Makes the LightningModule.
        draw: Makes a batch out of a seed.
        engine: The engine that must be chosen.
        blocks: Name of its list of blocks.
        head: Name of the module that makes its logits.
        states: Name of the module whose output are the states that continuity compares, where they are not what the
            head reads.
        tail: Rows after the one that predicts the last video token.
        loss: The form of its loss.
        reference: Where the reference of its gradients comes from: attention replaced by one that cuts the context off
            (``attention``), the same for the attention of x-transformers (``attend``), its own hand-written attention
            told to (``cut``), its own key/value cache (``cache``), block inputs detached (``states``), or the whole
            context trained through (``whole``).
        tolerance: By how much a whole window may differ from plain training: 0 where the loss is torch's own.
        checkpoint: Turns activation checkpointing on, or off where it always is; ``None`` if it has none.
        keys: Whether ``context="keys"`` is served.
        compiled: Name of the network that is compiled; ``""`` where that is not tried.
        distributed: Its case in ``tests/helpers/distributed.py``, run by DDP and by FSDP2; ``""`` where there is none.
        missing: What the installed libraries lack of it, and tests leave it out for; ``""`` for nothing.
    """

    name: str
    shape: str
    build: Callable[[], pl.LightningModule]
    draw: Callable[[int], Any] = draw_ids
    engine: str = "frozen"
    blocks: str = ""
    head: str = ""
    states: str = ""
    tail: int = 0
    loss: str = FLAT
    reference: Reference = "attention"
    tolerance: float = 0.0
    checkpoint: Callable[[pl.LightningModule], None] | None = None
    keys: bool = True
    compiled: str = ""
    distributed: str = ""
    missing: str = ""

    def make(self) -> pl.LightningModule:
        """The module with the weights that every test starts from."""
        torch.manual_seed(3)
        return self.build()

    def works(self, condition: str) -> bool:
        """Whether tests run it under one of ``CONDITIONS``."""
        ways = {
            "checkpointing": self.checkpoint is not None,
            "bf16-mixed": True,
            "16-mixed": True,
            "compile": bool(self.compiled),
            "ddp": bool(self.distributed),
            "fsdp2": bool(self.distributed),
        }
        return ways[condition]


@dataclass(frozen=True)
class Refusal:
    """One network, or one way to train it, that the callback must refuse on the first batch.

    Args:
        name: Its name in tests.
        shape: What it is, for the documentation.
        build: Makes the LightningModule.
        match: The error's text.
        error: The error's class.
        draw: Makes a batch out of a seed.
        sampler: The windows.
        missing: What the installed libraries lack of it, see ``Setting``.
    """

    name: str
    shape: str
    build: Callable[[], Any]
    match: str
    error: type[Exception] = MisconfigurationException
    draw: Callable[[int], Any] = draw_ids
    sampler: WindowSampler = WINDOWS
    missing: str = ""


def _decoder(name: str, shape: str, loss: str = FLAT, head: str = "network.head", **options: Any) -> Setting:
    plain = not options.get("sequential")
    return Setting(
        name,
        shape,
        partial(attending.DecoderModule, **options),
        blocks="network.blocks.layers" if plain else "network.blocks",
        head=head,
        loss=loss,
        checkpoint=switch_checkpointing if plain else None,
    )


def _transformers(name: str, title: str, *, labels: bool, attention: str = "sdpa") -> Setting:
    plain = attention == "sdpa"
    kind = [] if plain else [attention.replace("_", "-")]
    return Setting(
        "-".join([name, *kind, "labels" if labels else "logits"]),
        f"transformers {title}, {'`labels=`' if labels else 'logits'}",
        partial(TransformersModule, name, labels=labels, attention=attention),
        engine="frozen" if plain else "cache",
        blocks="model.transformer.h" if name == "gpt2" else "model.model.layers",
        head="model.lm_head",
        tail=1,
        reference="cache",
        checkpoint=checkpoint_transformers,
        compiled="model" if name == "llama" and labels and plain else "",
        distributed={("llama", True): "llama", ("llama", False): "llama-windows"}.get((name, labels), "")
        if plain
        else "",
        missing=missing(name, attention),
    )


def _heads(name: str, shape: str, build: Callable[[], pl.LightningModule], head: str, **options: Any) -> Setting:
    """Heads on the states behind the norm; those on the states behind the blocks where there is no name for them."""
    return Setting(
        name,
        shape,
        build,
        blocks="network.blocks.layers",
        head=head,
        states="network.norm" if head else "network.blocks",
        checkpoint=switch_checkpointing,
        **options,
    )


SETTINGS: tuple[Setting, ...] = (
    Setting(
        "own",
        "`VideoTransformer`, unconditional",
        own.OwnModule,
        draw_named,
        blocks="network.blocks",
        head="network.head",
        compiled="network",
    ),
    Setting(
        "own-classes",
        "`VideoTransformer`, class-conditional",
        own.conditional,
        draw_named,
        blocks="network.blocks",
        head="network.head",
        distributed="reference",
    ),
    *(
        _transformers(name, title, labels=labels)
        for name, title in (
            ("llama", "Llama (grouped queries)"),
            ("qwen3", "Qwen3"),
            ("gpt2", "GPT-2 (dropout, tied head)"),
            ("emu3", "Emu3 text model"),
        )
        for labels in (True, False)
    ),
    # flex_attention has no backward pass on CPU, so it is not in the table.
    _transformers("llama", "Llama (`eager`)", labels=True, attention="eager"),
    _transformers("gpt2", "GPT-2 (`eager`)", labels=False, attention="eager"),
    _transformers("llama", "Llama (a function with flash-attention's mask)", labels=True, attention="lower_right"),
    Setting(
        "litgpt",
        "litgpt's GPT: tables, mask and positions as arguments, query groups, capped logits",
        attending.LitGPTModule,
        blocks="gpt.transformer.h.layers",
        head="gpt.lm_head",
        tail=1,
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "nanogpt",
        "nanoGPT: loss inside, tied head, fused `c_attn`, dropout",
        attending.NanoGPTModule,
        blocks="gpt.h.layers",
        head="gpt.lm_head",
        checkpoint=switch_checkpointing,
        compiled="gpt",
    ),
    Setting(
        "encoder",
        "`nn.TransformerEncoder` with a causal mask",
        attending.EncoderModule,
        blocks="encoder.layers",
        head="out",
    ),
    Setting(
        "adaptive",
        "VAR and DiT: blocks with a condition (adaptive norm), mask as an argument",
        attending.AdaptiveModule,
        draw_labeled,
        blocks="network.blocks.layers",
        head="network.head",
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "llamagen",
        "LlamaGen: class prefix dropped at random, `freqs_cis` as an argument, loss inside",
        attending.LlamaGenModule,
        draw_labeled,
        blocks="model.layers.layers",
        head="model.output",
        checkpoint=switch_checkpointing,
    ),
    _decoder("fused", "decoder, fused QKV"),
    _decoder("separate", "decoder, separate QKV", fused=False),
    _decoder("rotary", "decoder, rotary table as an argument", rotary=True),
    _decoder("sequential", "decoder, blocks in a `Sequential`", sequential=True),
    _decoder("zero-head", "decoder, head of zeros", zero_head=True),
    _decoder("softcap", "decoder, capped logits behind the head", after=attending.SoftCap),
    _decoder("scaled", "decoder, learned scale of the logits behind the head", scaled=True),
    _decoder("norm-after", "decoder, norm behind the head", after=partial(torch.nn.LayerNorm, VOCAB)),
    _decoder("grid", "decoder", GRID_FORM, form=attending.grid_loss),
    _decoder("smoothing", "decoder", "label smoothing", form=attending.smoothed_loss),
    _decoder("weights", "decoder", "class weights", form=attending.weighted_loss),
    _decoder("ignoring", "decoder", "own `ignore_index`", form=attending.ignoring_loss),
    _decoder("unreduced", "decoder", '`reduction="none"`, mean', form=attending.unreduced_loss),
    _decoder("divided", "decoder", '`reduction="sum"` / count', form=attending.divided_loss),
    _heads(
        "tied",
        "a tied head by `F.linear`",
        heads.FunctionHeadModule,
        "linear()",
        compiled="network",
        distributed="tied",
    ),
    _heads(
        "einsum",
        "a tied head by `einsum`, scaled logits",
        partial(heads.FunctionHeadModule, heads.EinsumTrunk),
        "einsum()",
    ),
    _heads(
        "flat matmul",
        "a tied head by `@` on (B·T, D), capped logits",
        partial(heads.FunctionHeadModule, heads.FlatMatmulTrunk),
        "matmul()",
    ),
    _heads("factorised", "Open-MAGVIT2: two heads, losses added", heads.FactorisedModule, "heads.0, heads.1"),
    _heads(
        "codebooks", "codebooks: a head and a loss each, averaged", heads.CodebooksModule, "heads.0, heads.1, heads.2"
    ),
    _heads("stacked", "codebooks: heads stacked", heads.StackedModule, "", loss="(B, V, k, T)", compiled="network"),
    _heads("interleaved", "codebooks: one wide head", heads.InterleavedModule, "", loss="(B·T·k, V)"),
    _heads(
        "world model",
        "IRIS: tokens, reward and end, on some rows of a block each",
        heads.WorldModelModule,
        "",
        compiled="network",
        distributed="world-model",
    ),
    _heads("twice", "two losses on one head, the second on the last frame", heads.TwiceModule, "heads.0"),
    _heads("nll", "a decoder with `nn.LogSoftmax`", heads.LogSoftmaxModule, "heads.0", loss="`F.nll_loss`"),
    _heads(
        "fused by torch",
        "a head's weight in the loss",
        heads.FusedByTorchModule,
        "linear()",
        loss="`F.linear_cross_entropy`",
        missing="" if hasattr(torch.nn.functional, "linear_cross_entropy") else "torch has it from 2.10 on",
    ),
    Setting(
        "pairs",
        "layers as lists of attention and feed-forward",
        attending.PairsModule,
        blocks="stack",
        head="head",
        keys=False,
    ),
    Setting(
        "x-transformers",
        "x-transformers, `attn_flash=True`, rotary",
        partial(attending.XTransformersModule, rotary_pos_emb=True, attn_flash=True),
        blocks="net.net.attn_layers",
        head="net.net.to_logits",
        tail=1,
        keys=False,
        tolerance=1e-6,
    ),
    Setting(
        "x-transformers by hand",
        "x-transformers, its own attention",
        attending.XTransformersModule,
        blocks="net.net.attn_layers",
        head="net.net.to_logits",
        tail=1,
        reference="attend",
        keys=False,
        tolerance=1e-6,
    ),
    Setting(
        "mingpt",
        "minGPT: hand-written attention, run through SDPA",
        handwritten.MinGPTModule,
        blocks="gpt.blocks",
        head="gpt.head",
        reference="cut",
    ),
    Setting(
        "taming",
        "taming-transformers: minGPT's attention returning keys and values",
        partial(handwritten.MinGPTModule, present=True, stacked=True),
        blocks="gpt.blocks.layers",
        head="gpt.head",
        reference="cut",
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "tats",
        "TATS: tokens made in the step by a frozen tokenizer with blocks of its own",
        handwritten.TATSModule,
        draw_labeled,
        blocks="transformer.blocks.layers",
        head="transformer.head",
        reference="cut",
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "omni",
        "OmniTokenizer's language model: manual optimisation, prefix of changing length",
        handwritten.OmniModule,
        draw_labeled,
        blocks="transformer.blocks.layers",
        head="transformer.head",
        reference="cut",
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "hand-written",
        "hand-written attention that takes shorter input",
        handwritten.HandWrittenModule,
        engine="prefix",
        blocks="blocks.layers",
        head="head",
        tail=1,
        reference="states",
        checkpoint=switch_checkpointing,
    ),
    Setting(
        "videogpt",
        "VideoGPT: one fixed length, states (B, T, H, W, C), checkpointed blocks, head of zeros",
        handwritten.VideoGPTModule,
        draw_grid,
        engine="masked",
        blocks="model.attn_stack.layers",
        head="model.fc_out",
        loss=GRID_FORM,
        reference="states",
        checkpoint=switch_checkpointing,
    ),
)


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        "bidirectional", "attention that sees the future", refused.Bidirectional, "neither is_causal nor attn_mask"
    ),
    Refusal(
        "bidirectional by hand",
        "hand-written attention that sees the future",
        refused.HandWrittenBidirectional,
        "a mask that is not causal",
    ),
    Refusal(
        "bidirectional of fixed length",
        "VideoGPT's shape with an open mask",
        refused.FixedBidirectional,
        "masked: .*a mask that is not causal",
        draw=draw_grid,
    ),
    Refusal("pooled", "blocks that pool over time", refused.Pooled, "pooling or normalisation over time"),
    Refusal(
        "pooled before the head",
        "one prediction from all rows",
        refused.PooledBeforeHead,
        "the head 'network.head' reads 1 rows, the blocks 'network.blocks.layers' have 29; .* depends on several rows",
    ),
    Refusal(
        "no cross-entropy",
        "a loss without `F.cross_entropy`",
        refused.NoCrossEntropy,
        r"no call of torch.nn.functional.cross_entropy .* \(0 calls in all\)",
    ),
    Refusal("two networks", "two networks, two cross-entropies", refused.TwoNetworks, "two networks .*network="),
    Refusal(
        "other tokens",
        "a loss over other tokens than the sampler's",
        attending.DecoderModule,
        "the loss covers 30 tokens of a sample, but the sampler's frame_blocks x tokens_per_block = 25",
        sampler=WindowSampler(5, 5),
    ),
    Refusal(
        "too short",
        "a sequence shorter than the sampler's",
        attending.DecoderModule,
        "has room for 31 video tokens, but the sampler's frame_blocks x tokens_per_block = 36",
        sampler=WindowSampler(6, 6),
    ),
    Refusal("fused", "a fused loss of one's own", refused.Fused, "'network.head' was never called.*fused"),
    Refusal(
        "pytorch_lightning",
        "a module of `pytorch_lightning` in a trainer of `lightning.pytorch`",
        refused.PytorchLightningModule,
        "You passed a `pytorch_lightning` object",  # Lightning's own
        error=TypeError,
    ),
)


def tried(condition: str) -> list[Setting]:
    """The settings that tests run under a condition."""
    return [setting for setting in SETTINGS if setting.works(condition)]


def support_matrix() -> str:
    """The table as markdown: network by engine, loss and condition, then what is refused."""
    lines = [["Network", "Engine", "Loss", *CONDITIONS.values()], ["---"] * (3 + len(CONDITIONS))]
    for setting in SETTINGS:
        verdicts = ["works" if setting.works(condition) else "not tried" for condition in CONDITIONS]
        lines.append([setting.shape, f"`{setting.engine}`", setting.loss, *verdicts])
    for refusal in REFUSALS:
        lines.append([refusal.shape, "refused", *["-"] * (1 + len(CONDITIONS))])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _write_matrix() -> None:
    page = Path(__file__).parents[2] / "docs" / "engines.md"
    text = page.read_text()
    start, end = "<!-- matrix -->\n", "<!-- end of matrix -->"
    before, _, rest = text.partition(start)
    page.write_text(f"{before}{start}{support_matrix()}{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    _write_matrix()
