# SPDX-License-Identifier: Apache-2.0
"""Runs of the command line in processes that may die, and moments at which they do."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from reco_lightning import ReCoCallback, VideoModel
from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter

GRID, VOCAB = (3, 2, 2), 16
STEPS, EVERY = 15, 3  # of the fit, and from one checkpoint to the next
FILES = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.move", "shutil.copyfile"}


def write_shards(folder: Path, clips: int = 20, shard_size: int = 8) -> Path:
    """Clips of four files, in shards of eight."""
    ids = np.random.default_rng(0).integers(0, VOCAB, (clips, *GRID))
    sources = [ClipSource(f"{number % 4}.mp4", number // 4 * 9, number // 4 * 9 + 9) for number in range(clips)]
    with TokenShardWriter(folder, vocab_size=VOCAB, grid=GRID, shard_size=shard_size) as writer:
        writer.write(ids, sources=sources)
    return folder


def config(tokens: Path, folder: Path, *callbacks: dict[str, Any], **options: Any) -> Path:
    """Writes the config of a fit that keeps its checkpoints in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    sampler = {"class_path": "WindowSampler", "init_args": {"frame_blocks": 3, "tokens_per_block": 4}}
    checkpoints = {"dirpath": str(folder / "checkpoints"), "every_n_train_steps": EVERY, "save_last": True}
    network = {"vocab_size": VOCAB, "grid": list(GRID), "dim": 16, "depth": 2, "heads": 2, "dropout": 0.1}
    content = {
        "seed_everything": 3,
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": STEPS,
            "logger": False,
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
            "plugins": "reco_lightning.callbacks.checkpoint_io.WholeCheckpointIO",
            "callbacks": [
                {"class_path": "ReCoCallback", "init_args": {"sampler": sampler}},
                *callbacks,
                {"class_path": "ModelCheckpoint", "init_args": checkpoints},
            ],
        }
        | options.pop("trainer", {}),
        "model": {
            "class_path": "VideoModel",
            "init_args": {
                "network": {"class_path": "VideoTransformer", "init_args": network},
                "learning_rate": 0.01,
            },
        },
        "data": {
            "class_path": "TokenDataModule",
            "init_args": {"folder": str(tokens), "batch_size": 4, "val_fraction": 0.25} | options.pop("data", {}),
        },
    } | options
    path = folder / "fit.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def fit(path: Path, *options: str) -> None:
    """`reco fit`, in this process."""
    main(["fit", "--config", str(path), *options])


def in_a_process(run: Callable[[], Any], folder: Path, seconds: float = 240) -> tuple[int, str]:
    """Runs in a process of its own; returns its exit code, minus the signal that killed it, and all that it said."""
    log = folder / "log.txt"
    folder.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(target=_body, args=(run, log))
    process.start()
    process.join(seconds)
    ended = process.exitcode is not None
    if not ended:
        process.kill()
        process.join()
    assert ended, f"not ended after {seconds} s: {log.read_text()}"
    return process.exitcode, log.read_text()


def _body(run: Callable[[], Any], log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = sys.stderr = open(descriptor, "w", buffering=1)  # noqa: SIM115  (until the process ends)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)
    warnings.simplefilter("ignore")  # the test's own filter would make errors of them
    torch.set_num_threads(1)
    run()


def before(owner: type, method: str, act: Callable[[int], Any]) -> None:
    """Lets something happen before each call of a method; it gets the call's number, from 1. For a forked process."""
    original, calls = getattr(owner, method), itertools.count(1)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        act(next(calls))
        return original(*args, **kwargs)

    setattr(owner, method, wrapped)


class Moments:
    """Counts what a process does from the first call of a method on: every such call and every file that it touches.

    Args:
        owner: The method's class.
        method: Its name.
        kill_at: The moment at which the process kills itself (SIGKILL), from 1; None never does.
    """

    def __init__(self, owner: type, method: str, kill_at: int | None = None) -> None:
        self.kill_at, self.count, self.started = kill_at, 0, False
        before(owner, method, self.begin)
        sys.addaudithook(self.hook)

    def begin(self, call: int) -> None:
        self.started = True
        self.tick()

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.started and event in FILES:
            self.tick()

    def tick(self) -> None:
        self.count += 1
        if self.count == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    path: Path, journal: Path | None, kill_at: int | None = None, *options: str, count: Path | None = None
) -> None:
    """A fit that may be killed at a moment.

    Args:
        path: The config.
        journal: File that gets a line for each step: its number, and what its batch, window and loss are.
        kill_at: The moment.
        options: Of the command.
        count: File for the number of moments that there were.
    """
    if journal is not None:
        end = ReCoCallback.on_train_batch_end

        def on_train_batch_end(
            callback: ReCoCallback, trainer: Any, module: Any, outputs: Any, batch: Any, n: int
        ) -> None:
            end(callback, trainer, module, outputs, batch, n)
            seen = [float(trainer.callback_metrics[f"reco/{name}"]) for name in ("window_start", "cross_entropy")]
            with open(journal, "a") as file:
                file.write(f"{trainer.global_step} {batch['tokens'].flatten().tolist()} {seen}\n")

        ReCoCallback.on_train_batch_end = on_train_batch_end
    moments = Moments(VideoModel, "training_step", kill_at)
    fit(path, *options)
    if count is not None:
        count.write_text(str(moments.count))


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same, bit for bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def assert_same_training(folder: Path, other: Path) -> None:
    """Weights and optimizer of two folders' last checkpoints are the same, after the same number of steps."""
    one, two = (torch.load(path / "checkpoints" / "last.ckpt", weights_only=True) for path in (folder, other))
    assert one["global_step"] == two["global_step"] == STEPS
    assert same(one["state_dict"], two["state_dict"])
    assert same(one["optimizer_states"], two["optimizer_states"])
