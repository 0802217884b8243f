# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: windows, networks, sampling and tokenizers."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import reco_lightning as rl
from reco_lightning.data.tokens.caption_ids import caption_ids, load_text_tokenizer
from reco_lightning.experiments.benchmark.training_steps import network_of_size
from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.sampling.decoding import decode_videos, encode_first_frames
from reco_lightning.models.sampling.token_sampling import VideoSamplingOptions
from reco_lightning.models.video_model import VideoModel
from reco_lightning.support.checkpoints import checkpoint_model, load_module
from reco_lightning.tokenizers import Emu3Tokenizer, LARPTokenizer, OmniTokenizer, VidTokTokenizer, load_tokenizer
from reco_lightning.tokenizers.base import latent_grid, to_uint8, to_unit_range
from reco_lightning.tokenizers.larp.config import LARPConfig
from reco_lightning.tokenizers.omnitokenizer.config import OmniTokenizerConfig
from reco_lightning.tokenizers.vqvae import VQVAE
from reco_lightning.windowing.losses.continuity import Continuity
from reco_lightning.windowing.running_losses import RunningLosses
from reco_lightning.windowing.settings import ReCoSettings
from tests.bad_input.samples import (
    CLIPS,
    LLAMA,
    RAW,
    SMALL,
    Mixed,
    emu3,
    fixed,
    larp_config,
    model_file,
    network,
    nothing,
    omni_config,
    text_network,
    tokenizer,
    videos,
    vidtok,
    vqvae_file,
    words,
)
from tests.bad_input.strategies import (
    BLOCKS,
    GRID,
    MAYBE_PATH,
    NAN,
    PATH,
    SAMPLING,
    SEED,
    SWITCH,
    TEXT,
    Entry,
    choice,
    number,
    tensors,
    values,
    whole,
)

__all__ = ["MODELS"]

IDS = torch.zeros(1, 4).long()
BETAS = values(None, 0.9, "ab", (0.9,), (0.9, 1.0), (-0.1, 0.9), (0.9, NAN), ("a", "b"), (True, 0.9))

_SETTINGS = {
    "sampler": values(None, 3, "sampler", (4, 2)),
    "continuity_weight": number(0),
    "continuity_norm": choice(),
    "context": choice(),
    "windows_per_batch": whole(1),
    "continuity_lag": whole(1),
    "continuity_schedule": choice(),
    "continuity_balanced": SWITCH,
    "attached_blocks": whole(0),
    "attached_share": number(0, 1, open_ends="l"),
    "engine": choice(),
    "network": values(3, b"a", ["a"], True),
    "blocks": values(3, b"a", ["a"], True),
    "head": values(3, b"a", ["a"], True),
    "prefix_tokens": whole(0, optional=True),
    "chunked_loss": SWITCH,
    "verify": SWITCH,
}

MODELS: tuple[Entry, ...] = (
    Entry("Window", rl.Window, fixed(start=0, stop=2), {"start": whole(0, 1), "stop": whole(1)}),
    Entry(
        "WindowSampler",
        rl.WindowSampler,
        fixed(frame_blocks=4, tokens_per_block=2),
        {
            "frame_blocks": whole(1),
            "tokens_per_block": whole(1),
            "window_blocks": whole(1, 4),
            "stride_blocks": number(0, open_ends="l"),
            "first_window_prob": number(0, 1, open_ends="l", optional=True),
            "seed": SEED,
            "schedule": values("ab", 3, [1], {2.0: 1}, {0.5: 0}, {0.5: "a"}, {0.5: 9}, {"a": 1}),
        },
    ),
    Entry(
        "ReCoCallback",
        rl.ReCoCallback,
        lambda: {"sampler": rl.WindowSampler(4, 2)},
        _SETTINGS | {"loss_aware": number(0)},
    ),
    Entry("settings.ReCoSettings", ReCoSettings, lambda: {"sampler": rl.WindowSampler(4, 2)}, _SETTINGS),
    Entry(
        "ReCoMixin",
        lambda **arguments: Mixed().init_reco(**arguments),
        lambda: {"sampler": rl.WindowSampler(4, 2)},
        _SETTINGS,
    ),
    Entry(
        "continuity_loss",
        rl.continuity_loss,
        fixed(hidden=torch.zeros(1, 4, 2)),
        {"hidden": tensors(torch.zeros(4, 2)), "norm": choice(), "lag": whole(1, 3)},
    ),
    Entry(
        "VideoTransformer",
        rl.VideoTransformer,
        fixed(**SMALL),
        {
            "vocab_size": whole(1),
            "grid": GRID,
            "dim": whole(1),
            "depth": whole(1),
            "heads": whole(1),
            "hidden_dim": whole(1, optional=True),
            "num_classes": whole(0),
            "start_token": SWITCH,
            "dropout": number(0, 1, open_ends="m"),
        },
    ),
    Entry(
        "LARPTransformer",
        LARPTransformer,
        fixed(vocab_size=8, video_tokens=4, num_classes=2, dim=8, depth=1, heads=1, hidden_dim=8),
        {
            **{name: whole(1) for name in ("vocab_size", "video_tokens", "dim", "depth", "heads")},
            **{name: whole(1, optional=True) for name in ("kv_heads", "hidden_dim")},
            **{name: whole(0) for name in ("condition_tokens", "num_classes")},
            **{
                f"{name}_dropout": number(0, 1, open_ends="m")
                for name in ("token", "attention", "residual", "feed_forward")
            },
            "norm_eps": number(0, open_ends="l"),
            "learned_positions": SWITCH,
        },
    ),
    Entry(
        "VideoModel",
        VideoModel,
        lambda: {"network": network()},
        {
            "network": values(None, 3, "network", torch.nn.Linear(1, 1)),
            "learning_rate": number(0, open_ends="l"),
            "weight_decay": number(0),
            "betas": BETAS,
            "warmup_steps": whole(0),
            "label_dropout": number(0, 1, open_ends="m"),
        },
    ),
    Entry(
        "sampling.generate.generate",
        rl.generate,
        lambda: {"model": network(), "n": 1, "condition": 1},
        {
            **SAMPLING,
            "model": values(None, 3, "network"),
            "n": whole(1),
            "condition": values("a", 2.5, True, 2, -1, torch.zeros(1), torch.zeros(3, dtype=torch.long)),
            "first_tokens": st.one_of(
                values(3, "a", [1]), values(torch.zeros(1, 1), torch.zeros(1, 9).long(), torch.tensor([[8]]))
            ),
            "indices": values(3, "a", [], [1, 2], [0.5], [True]),
            "length": BLOCKS,
            "window_blocks": whole(1, 2, optional=True),
            "context_blocks": whole(1, 1, optional=True),
            "batch_size": whole(1),
            "cache": SWITCH,
            "compile": values(None, 3, 2.5, []),
        },
    ),
    Entry(
        "explain",
        rl.explain,
        lambda: {
            "module": VideoModel(rl.VideoTransformer(**SMALL | {"grid": (4, 1, 2)})),
            "batch": {"tokens": torch.zeros(1, 8, dtype=torch.long), "label": torch.zeros(1, dtype=torch.long)},
            "callback": rl.ReCoCallback(rl.WindowSampler(4, 2)),
        },
        {"module": values(None, 3, torch.nn.Linear(1, 1)), "callback": values(None, 3, "callback")},
    ),
    Entry(
        "VideoSamplingOptions",
        VideoSamplingOptions,
        nothing,
        {**SAMPLING, "length": BLOCKS, "window_blocks": BLOCKS, "context_blocks": BLOCKS},
    ),
    Entry(
        "VQVAE",
        VQVAE,
        fixed(codebook_size=4, width=8),
        {
            "codebook_size": whole(2),
            "spatial_stride": st.one_of(whole(), values(0, 4, 12)),
            "width": st.one_of(whole(8), values(12)),
            "depth": whole(1),
            "code_dim": whole(2),
            "learning_rate": number(0, open_ends="l"),
            "weight_decay": number(0),
            "warmup_steps": whole(0),
            "decay_steps": whole(1, optional=True),
            "mse_weight": number(0),
            "gradient_weight": number(0),
            "commitment_weight": number(0),
            "codebook_decay": number(0, 1, open_ends="m"),
            "dead_code_threshold": number(0),
            "seed": SEED,
        },
    ),
    Entry("LARPTokenizer", LARPTokenizer, lambda: {"config": larp_config()}, {"config": values(3, "config", {"a": 1})}),
    Entry(
        "LARPConfig",
        LARPConfig,
        nothing,
        {
            "codebook_size": whole(1),
            "encoder_depth": whole(1),
            "stochastic": SWITCH,
            "stochastic_temperature": number(),
        },
    ),
    Entry("OmniTokenizer", OmniTokenizer, lambda: {"config": omni_config()}, {"config": values(3, "config", {"a": 1})}),
    Entry(
        "OmniTokenizerConfig",
        OmniTokenizerConfig,
        nothing,
        {
            "n_codes": whole(1),
            "temporal_depth": whole(0),
            "enc_block": TEXT,
            "spatial_pos": choice(),
            "l2_code": SWITCH,
        },
    ),
    Entry(
        "Emu3Tokenizer",
        Emu3Tokenizer,
        lambda: {"model": emu3()},
        {
            "model": values(None, 3, "emu3", torch.nn.Linear(1, 1)),
            "image_mean": st.one_of(number(), values((0.5, 0.5), (0.5, 0.5, "a"))),
            "image_std": st.one_of(number(0, open_ends="l"), values((0.5, 0.5), (0.5, 0.5, 0.0))),
        },
    ),
    Entry(
        "VidTokTokenizer",
        VidTokTokenizer,
        lambda: {"model": vidtok()},
        {"model": values(None, 3, "vidtok", torch.nn.Linear(1, 1))},
    ),
    Entry(
        "load_tokenizer",
        load_tokenizer,
        lambda: {"source": vqvae_file()},
        {"source": st.one_of(PATH, values("nothing.ckpt", "/dev/null")), "vocab_size": whole(None, 4, optional=True)},
        {"source": "tokenizer", "vocab_size": "ids"},
    ),
    Entry(
        "to_unit_range",
        to_unit_range,
        fixed(clips=torch.zeros(1, 1, 2, 2, 3).byte()),
        {"clips": RAW},
    ),
    Entry("to_uint8", to_uint8, fixed(video=torch.zeros(1, 3, 1, 2, 2)), {"video": tensors(CLIPS, torch.zeros(3))}),
    Entry(
        "latent_grid",
        lambda **arguments: latent_grid(**arguments, temporal_stride=4, spatial_stride=8),
        fixed(frames=5, height=8, width=8),
        {"frames": whole(1), "height": whole(8), "width": whole(8)},
    ),
    Entry(
        "TextVideoNetwork",
        rl.TextVideoNetwork,
        fixed(vocab_size=6, grid=(2, 1, 2), architecture=LLAMA),
        {
            "vocab_size": whole(1),
            "grid": GRID,
            "pretrained": st.one_of(MAYBE_PATH, values("nowhere.folder")),
            "architecture": values(3, "llama", [], LLAMA | {"vocab_size": 0}, LLAMA | {"model_type": 3}),
        },
    ),
    Entry(
        "TextVideoModel",
        rl.TextVideoModel,
        lambda: {"network": text_network()},
        {
            "network": values(None, 3, "network", torch.nn.Linear(1, 1)),
            "learning_rate": number(0, open_ends="l"),
            "weight_decay": number(0),
            "betas": BETAS,
            "warmup_steps": whole(0),
            "caption_dropout": number(0, 1, open_ends="m"),
            "gradient_checkpointing": SWITCH,
        },
    ),
    Entry(
        "generate_from_text",
        rl.generate_from_text,
        lambda: {"model": text_network(), "captions": ["a cat"], "tokenizer": words()},
        {
            **SAMPLING,
            "model": values(None, 3, "network", torch.nn.Linear(1, 1)),
            "captions": st.one_of(
                values(None, 3, "a cat", [], [3], b"a"),
                values(torch.zeros(1), torch.zeros(1, 2), torch.zeros(1, 2).bool(), torch.tensor([[3]])),
            ),
            "tokenizer": values(None, 3, [], "", "nowhere.folder"),
            "indices": values(3, "a", [], [1, 2], [0.5], [True]),
            "batch_size": whole(1),
        },
    ),
    Entry(
        "caption_ids",
        caption_ids,
        lambda: {"tokenizer": load_text_tokenizer(words()), "captions": ["a cat", None]},
        {
            "tokenizer": values(None, 3, "words", []),
            "captions": values(None, 3, "a cat", b"a", [3], {"a": "b"}),
            "max_tokens": whole(1, optional=True),
        },
    ),
    Entry(
        "load_text_tokenizer",
        load_text_tokenizer,
        lambda: {"folder": words()},
        {"folder": st.one_of(PATH, values("nowhere.folder"))},
        {"folder": "tokenizer"},
    ),
    Entry(
        "decode_videos",
        decode_videos,
        lambda: {"tokenizer": tokenizer(), "ids": IDS, "grid": (2, 1, 2)},
        {
            "tokenizer": values(None, 3, "vqvae", torch.nn.Linear(1, 1)),
            "ids": tensors(
                torch.zeros(1, 4), torch.zeros(1, 5).long(), torch.zeros(1, 0).long(), torch.zeros(4).long()
            ),
            "grid": GRID,
            "context_blocks": whole(1, 1, optional=True),
        },
    ),
    Entry(
        "encode_first_frames",
        encode_first_frames,
        lambda: {"tokenizer": tokenizer(), "path": f"{videos()}/a.mp4", "frames": 1, "grid": (2, 2, 2)},
        {
            "tokenizer": values(None, 3, "vqvae", torch.nn.Linear(1, 1)),
            "path": st.one_of(PATH, values("nothing.mp4")),
            "frames": whole(1),
            "grid": GRID,
        },
    ),
    Entry(
        "checkpoint_model",
        checkpoint_model,
        lambda: {"path": model_file()},
        {"path": st.one_of(PATH, values("nothing.ckpt"))},
        {"path": "checkpoint"},
    ),
    Entry(
        "load_module",
        lambda checkpoint: load_module(checkpoint, VideoModel),
        lambda: {"checkpoint": model_file()},
        {"checkpoint": st.one_of(PATH, values("nothing.ckpt"))},
    ),
    Entry(
        "network_of_size",
        network_of_size,
        fixed(size="12x1x1", vocab_size=8, grid=(2, 1, 2)),
        {"size": st.one_of(choice(), values("12x1", "0x1x1")), "vocab_size": whole(1), "grid": GRID},
    ),
    Entry(
        "Continuity",
        Continuity,
        nothing,
        {
            "weight": number(0),
            "norm": choice(),
            "lag": whole(1),
            "schedule": choice(),
            "balanced": SWITCH,
        },
    ),
    Entry(
        "RunningLosses",
        RunningLosses,
        fixed(exponent=1.0),
        {"exponent": number(0, open_ends="l")},
        {"exponent": "loss_aware"},
    ),
)
