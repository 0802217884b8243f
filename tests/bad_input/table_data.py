# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: videos, token shards, captions and media files."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from reco_lightning.data.clips.folder import VideoFolder
from reco_lightning.data.clips.module import VideoDataModule
from reco_lightning.data.index.captions import read_captions
from reco_lightning.data.index.layouts import open_index
from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.data.tokens.caption_module import CaptionDataModule
from reco_lightning.data.tokens.litdata import LitTokenDataModule, export_litdata
from reco_lightning.data.tokens.manifest import read_manifest
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import TokenShards
from reco_lightning.data.tokens.writer import TokenShardWriter
from reco_lightning.data.video.clip import probe, read_clip
from reco_lightning.pipelines.predict.caption_requests import CaptionRequests
from reco_lightning.pipelines.predict.requests import GenerationRequests
from reco_lightning.pipelines.predict.video_writer import VideoWriter
from reco_lightning.support.media import video_grid, video_strip, write_video
from tests.bad_input.samples import (
    fixed,
    folder,
    new_folder,
    nothing,
    text_file,
    token_folder,
    videos,
)
from tests.bad_input.strategies import (
    BLOCKS,
    GRID,
    MAYBE_PATH,
    PATH,
    SAMPLING,
    SEED,
    SIZE,
    SWITCH,
    TEXT,
    Entry,
    Wrong,
    choice,
    number,
    values,
    whole,
)

__all__ = ["DATA"]

NO_FOLDER = st.one_of(PATH, values("nowhere"))
TOKEN_DATA: dict[str, Wrong] = {
    "folder": PATH,
    "batch_size": whole(1),
    "num_workers": whole(0),
    "val_fraction": number(0, 1, open_ends="m"),
    "split": choice(),
    "shuffle": SWITCH,
    "seed": SEED,
    "split_seed": SEED,
    "drop_last": SWITCH,
    "strict_resume": SWITCH,
    "verify": SWITCH,
}

DATA: tuple[Entry, ...] = (
    Entry(
        "VideoFolder",
        VideoFolder,
        lambda: {"root": videos(), "frames": 2},
        {
            "root": st.one_of(PATH, values("nowhere")),
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
            "clip_step": whole(1, optional=True),
            "on_error": choice(),
            "on_damage": choice(),
            "extensions": values(None, 3, ".mp4", ["mp4"], [3], [None]),
            "cache": SWITCH,
            "layout": choice(),
            "split": values(3, 2.5, b"train", ["train"]),
            "index": st.one_of(MAYBE_PATH, values("nothing.jsonl")),
        },
    ),
    Entry(
        "VideoDataModule",
        VideoDataModule,
        lambda: {"root": videos()},
        {
            "root": PATH,
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
            "clip_step": whole(1, optional=True),
            "on_error": choice(),
            "on_damage": choice(),
            "extensions": values(None, 3, ".mp4", ["mp4"], [3]),
            "cache": SWITCH,
            "batch_size": whole(1),
            "num_workers": whole(0),
            "start_method": choice(optional=True),
            "val_fraction": number(0, 1, open_ends="m"),
            "seed": SEED,
            "layout": choice(),
            "split": values(3, 2.5, b"train", ["train"]),
            "index": MAYBE_PATH,
        },
    ),
    Entry(
        "TokenDataModule",
        TokenDataModule,
        fixed(folder="tokens"),
        TOKEN_DATA,
    ),
    Entry(
        "TokenShardWriter",
        TokenShardWriter,
        lambda: {"folder": new_folder(), "vocab_size": 8, "grid": (2, 1, 2)},
        {
            "folder": PATH,
            "vocab_size": whole(1, 2**32),
            "grid": GRID,
            "tokenizer": TEXT,
            "tokenizer_sha256": TEXT,
            "classes": values(None, 3, "ab"),
            "video": values(3, "ab", [1]),
            "shard_size": whole(1),
            "overwrite": SWITCH,
            "frame_aligned": SWITCH,
            "workspace": MAYBE_PATH,
        },
    ),
    Entry(
        "probe",
        probe,
        lambda: {"path": f"{videos()}/a.mp4"},
        {"path": st.one_of(PATH, values("nothing.mp4")), "on_damage": choice()},
    ),
    Entry(
        "read_clip",
        read_clip,
        lambda: {"path": f"{videos()}/a.mp4", "start": 0, "frames": 2, "size": 16},
        {
            "path": st.one_of(PATH, values("nothing.mp4")),
            "start": whole(0),
            "frames": whole(1),
            "stride": whole(1),
            "size": SIZE,
            "resize": choice(),
        },
    ),
    Entry(
        "GenerationRequests",
        GenerationRequests,
        fixed(n=2),
        {
            **SAMPLING,
            "n": whole(1),
            "labels": values(3, "12", [], [-1], [0.5], [True], {1}),
            "prefix": st.one_of(MAYBE_PATH, values("nothing.npy")),
            "first_tokens": st.one_of(MAYBE_PATH, values("nothing.npy")),
            "length": BLOCKS,
            "window_blocks": BLOCKS,
            "context_blocks": BLOCKS,
            "batch_size": whole(1),
        },
    ),
    Entry(
        "VideoWriter",
        VideoWriter,
        nothing,
        {"tokenizer": MAYBE_PATH, "output": PATH, "fps": number(0, 1000, open_ends="l")},
    ),
    Entry(
        "write_video",
        write_video,
        lambda: {"path": folder() / "b.mp4", "frames": np.zeros((2, 16, 16, 3), np.uint8)},
        {
            "path": st.one_of(PATH, values("b.avi")),
            "frames": values(np.zeros(2), np.zeros((2, 16, 16, 3)), np.zeros((16, 16, 3), np.uint8)),
            "fps": number(0, 1000, open_ends="l"),
        },
    ),
    Entry(
        "video_grid",
        video_grid,
        fixed(clips=np.zeros((2, 1, 2, 2, 3), np.uint8), columns=1),
        {"clips": values(np.zeros(2), np.zeros((2, 2))), "columns": whole(1)},
    ),
    Entry(
        "video_strip",
        video_strip,
        fixed(frames=np.zeros((2, 2, 2, 3), np.uint8)),
        {"frames": values(np.zeros(2), np.zeros((2, 2))), "count": whole(1)},
    ),
    Entry(
        "CaptionDataModule",
        CaptionDataModule,
        fixed(folder="tokens", text_tokenizer="words"),
        {**TOKEN_DATA, "text_tokenizer": PATH, "max_caption_tokens": whole(1)},
    ),
    Entry(
        "CaptionRequests",
        CaptionRequests,
        fixed(captions="captions.txt", text_tokenizer="words"),
        {
            **SAMPLING,
            "captions": PATH,
            "text_tokenizer": PATH,
            "max_caption_tokens": whole(1),
            "videos_per_caption": whole(1),
            "batch_size": whole(1),
        },
    ),
    Entry(
        "read_captions",
        lambda path: read_captions(path, files=["a.mp4"]),
        lambda: {"path": text_file("captions.jsonl", '{"file": "a.mp4", "caption": "A cat."}\n')},
        {"path": st.one_of(PATH, values("nothing.jsonl"))},
        {"path": "captions"},
    ),
    Entry(
        "open_index",
        open_index,
        lambda: {"root": videos()},
        {
            "root": st.one_of(PATH, values("nowhere")),
            "layout": choice(),
            "split": values(3, 2.5, b"train", ["train"], "nothing"),
            "index": st.one_of(MAYBE_PATH, values("nothing.jsonl")),
            "extensions": values(None, 3, ".mp4", ["mp4"], [3], [None]),
        },
    ),
    Entry("TokenShards", TokenShards, lambda: {"folder": token_folder()}, {"folder": NO_FOLDER}),
    Entry("read_manifest", read_manifest, lambda: {"folder": token_folder()}, {"folder": NO_FOLDER}),
    Entry(
        "LitTokenDataModule",
        LitTokenDataModule,
        fixed(folder="s3://tokens"),
        {
            "folder": PATH,
            "batch_size": whole(1),
            "num_workers": whole(0),
            "shuffle": SWITCH,
            "seed": whole(0, 2**32 - 1),
            "storage_options": values(3, "a", ["a"], True),
        },
    ),
    Entry(
        "export_litdata",
        lambda **arguments: export_litdata(**{"folder": token_folder(), "output": new_folder()} | arguments),
        None,
        {
            "folder": PATH,
            "output": PATH,
            "val_fraction": number(),
            "split": choice(),
            "split_seed": SEED,
            "chunk_clips": whole(1, optional=True),
            "storage_options": values(3, "a", ["a"], True),
        },
    ),
    Entry(
        "ResumableDataLoader",
        ResumableDataLoader,
        fixed(dataset=range(4), rank=0, world_size=2),
        {
            "dataset": values(None, 3, object()),
            "batch_size": whole(1),
            **dict.fromkeys(("shuffle", "drop_last", "strict", "pin_memory", "persistent_workers"), SWITCH),
            "seed": SEED,
            "epoch_batches": number(0, open_ends="l"),
            "rank": whole(0, 1),
            "world_size": whole(1),
            "num_workers": whole(0),
            "timeout": number(0),
            "prefetch_factor": whole(1, optional=True),
            "sampler": values(3, "random", [0, 1]),
            "batch_sampler": values(3, "random", [[0], [1]]),
            **{name: values(3, "a", []) for name in ("collate_fn", "worker_init_fn")},
            "multiprocessing_context": choice(optional=True),
        },
    ),
)
