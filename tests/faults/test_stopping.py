# SPDX-License-Identifier: Apache-2.0
"""SIGTERM: the batch at hand is finished, a checkpoint written, and the resumed run ends as the uninterrupted one."""

from __future__ import annotations

import multiprocessing
import os
import signal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from reco_lightning import VideoModel
from reco_lightning.callbacks.stop_on_signal import STOPPED, StopOnSignal, last_checkpoint
from tests.faults.runs import assert_same_training, before, config, fit, in_a_process
from tests.helpers.processes import send_from_outside

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
STOP = {"class_path": "reco_lightning.callbacks.stop_on_signal.StopOnSignal"}


def terminated(path, hook, call):
    """A fit that gets SIGTERM at a call of one of the module's hooks."""
    before(VideoModel, hook, lambda number: number == call and os.kill(os.getpid(), signal.SIGTERM))
    fit(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hook", "call", "step"),
    [("on_train_batch_start", 2, 2), ("on_train_batch_start", 8, 8), ("validation_step", 2, 3)],
    ids=["before-any-checkpoint", "after-some", "in-a-validation"],
)
def test_sigterm_saves_and_ends_with_143(whole, tmp_path, hook, call, step):
    tokens, folder, _ = whole
    path = config(tokens, tmp_path / "run", STOP)
    code, said = in_a_process(lambda: terminated(path, hook, call), tmp_path)
    assert code == STOPPED == 143, said
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"Stopped by SIGTERM after step {step}; go on with --ckpt_path {last}" in said
    assert torch.load(last, weights_only=True)["global_step"] == step
    code, said = in_a_process(lambda: fit(path, "--ckpt_path", "last"), tmp_path)
    assert code == 0, said
    assert_same_training(tmp_path / "run", folder / "run")


def signalled(path, number, group, method):
    """A fit whose whole group of processes, or it alone, gets a signal in its fifth batch."""
    os.setpgid(0, 0)
    multiprocessing.set_start_method(method, force=True)
    before(VideoModel, "on_train_batch_start", lambda call: call == 5 and send_from_outside(number, group=group))
    fit(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "method", "group"),
    [(0, "fork", True), (2, "fork", True), (2, "fork", False), (4, "fork", True), (1, "spawn", True)],
)
def test_workers_leave_sigterm_to_their_parent(whole, tmp_path, workers, method, group):
    tokens, folder, _ = whole
    path = config(tokens, tmp_path / "run", STOP, data={"num_workers": workers})
    code, said = in_a_process(lambda: signalled(path, signal.SIGTERM, group, method), tmp_path)
    assert code == STOPPED, said
    assert "Stopped by SIGTERM after step 5; go on with --ckpt_path" in said
    assert "Traceback" not in said
    code, said = in_a_process(lambda: fit(path, "--ckpt_path", "last"), tmp_path)
    assert code == 0, said
    assert_same_training(tmp_path / "run", folder / "run")


def trainer(folder, *callbacks, **options):
    return pl.Trainer(
        accelerator="cpu",
        logger=False,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        callbacks=list(callbacks),
        **options,
    )


def test_the_file_is_the_one_that_last_finds(tmp_path):
    assert last_checkpoint(trainer(tmp_path)) == str(tmp_path / "checkpoints" / "last.ckpt")
    own = trainer(tmp_path, checkpoints := ModelCheckpoint(dirpath=tmp_path))
    (tmp_path / "last.ckpt").touch()  # another run's
    assert last_checkpoint(own) == checkpoints.last_model_path == str(tmp_path / "last-v1.ckpt")
    checkpoints.last_model_path = str(tmp_path / "last.ckpt")
    assert last_checkpoint(own) == str(tmp_path / "last.ckpt")


class Ends(pl.LightningModule):
    """Looks at the handler while a stage runs, and may end it."""

    def __init__(self, raises=False):
        super().__init__()
        self.weight, self.raises, self.seen = torch.nn.Parameter(torch.ones(1)), raises, []

    def look(self):
        self.seen.append(signal.getsignal(signal.SIGTERM))
        if self.raises:
            raise RuntimeError("stop")

    def training_step(self, batch, batch_idx):
        self.look()
        return self.weight.sum()

    def test_step(self, batch, batch_idx):
        self.look()

    def predict_step(self, batch, batch_idx):
        self.look()
        return batch

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_the_handler_is_there_while_a_stage_runs_and_gone_after_it(tmp_path, stage, raises):
    before, module, callback = signal.getsignal(signal.SIGTERM), Ends(raises), StopOnSignal()
    run = getattr(trainer(tmp_path, callback, max_steps=1), stage)
    loader = torch.utils.data.DataLoader(torch.ones(1, 1))
    if raises:
        with pytest.raises(RuntimeError, match="stop"):
            run(module, loader)
    else:
        run(module, loader)
    assert [getattr(handler, "__self__", None) for handler in module.seen] == [callback]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("stage", ["test", "predict"])
def test_other_stages_end_after_the_batch_at_hand(tmp_path, stage):
    module, batches = Ends(), []

    def look():
        batches.append(1)
        os.kill(os.getpid(), signal.SIGTERM)

    module.look = look
    with pytest.raises(SystemExit) as ended:
        getattr(trainer(tmp_path, StopOnSignal()), stage)(module, torch.utils.data.DataLoader(torch.ones(3, 1)))
    assert ended.value.code == STOPPED
    assert batches == [1]


def test_several_processes_agree_every_few_batches():
    callback, asked = StopOnSignal(every_n_batches=4), []

    class Strategy:
        def reduce_boolean_decision(self, decision, all):
            asked.append((decision, all))
            return True  # another process was told

    class Several:
        world_size, strategy = 2, Strategy()

    assert [callback._agreed(Several(), batch) for batch in range(8)] == [False] * 3 + [True] + [False] * 3 + [True]
    assert asked == [(False, False)] * 2


def test_refuses_no_batches():
    with pytest.raises(ValueError, match="every_n_batches must be a whole number of 1 or more, got 0"):
        StopOnSignal(0)
