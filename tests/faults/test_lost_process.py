# SPDX-License-Identifier: Apache-2.0
"""A process of a distributed run that dies, hangs or is told to stop: the others end too, and say why."""

from __future__ import annotations

import os
import re
import signal
from contextlib import suppress
from datetime import timedelta
from subprocess import Popen

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.callbacks.stop_on_signal import StopOnSignal
from tests.faults.runs import GRID, VOCAB, in_a_process

pytestmark = [pytest.mark.distributed, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")]


class Lose(pl.Callback):
    """Sends a signal to the process of the second rank at its third batch."""

    def __init__(self, number, folder, gone_after):
        self.number, self.folder, self.gone_after = number, folder, gone_after

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        (self.folder / f"{trainer.global_rank}.pid").write_text(str(os.getpid()))
        if batch_idx == 2 and trainer.global_rank == 1:
            if self.number == signal.SIGSTOP:  # torch would wait half a minute for it to end, after all has been said
                Popen(["sh", "-c", f"sleep {self.gone_after}; kill -9 {os.getpid()}"])
            os.kill(os.getpid(), self.number)


def fit(folder, number, seconds):
    """Two processes on a CPU, which would go on for long."""
    torch.manual_seed(0)
    model = VideoModel(VideoTransformer(vocab_size=VOCAB, grid=GRID, dim=16, depth=1, heads=2))
    clips = [{"tokens": row, "label": torch.tensor(0)} for row in torch.randint(VOCAB, (4000, 12))]
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(timeout=timedelta(seconds=seconds), start_method="fork"),
        max_epochs=1,
        logger=False,
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[
            ReCoCallback(WindowSampler(3, 4)),
            StopOnSignal(every_n_batches=3),
            Lose(number, folder, gone_after=seconds + 6),
        ],
    )
    trainer.fit(model, torch.utils.data.DataLoader(clips, batch_size=2))


def run(folder, number, seconds):
    try:
        return in_a_process(lambda: fit(folder, number, seconds), folder)
    finally:
        for path in folder.glob("*.pid"):  # a stopped process does not end by itself
            with suppress(ProcessLookupError):
                os.kill(int(path.read_text()), signal.SIGKILL)


@pytest.mark.parametrize(
    ("number", "seconds", "texts"),
    [
        (signal.SIGKILL, 600, ("process 1 terminated with signal SIGKILL", "Connection closed by peer")),
        (signal.SIGSTOP, 5, ("Timed out waiting 5000ms",)),
    ],
    ids=["killed", "hanging"],
)
def test_the_run_ends_when_a_process_is_lost(tmp_path, number, seconds, texts):
    code, said = run(tmp_path, number, seconds)
    assert code != 0, said
    assert any(text in said for text in texts), said


def test_one_of_two_processes_is_told_to_stop_and_both_end(tmp_path):
    _, said = run(tmp_path, signal.SIGTERM, 600)
    path = tmp_path / "checkpoints" / "last.ckpt"
    told = re.search(rf"Stopped by SIGTERM after step (\d+); go on with --ckpt_path {re.escape(str(path))}", said)
    assert told, said
    assert torch.load(path, weights_only=True)["global_step"] == int(told[1]) >= 3  # the signal takes a moment
