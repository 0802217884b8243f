# SPDX-License-Identifier: Apache-2.0
"""A disk that is full: the file and the remedy are named, what was there is as it was, and the run can go on."""

from __future__ import annotations

import errno
import os
import resource
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from reco_lightning import VideoModel
from reco_lightning.callbacks import sample_videos as samples
from reco_lightning.callbacks.checkpoint_io import WholeCheckpointIO
from reco_lightning.data.tokens import writer as token_writer
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.pipelines.tokenize import partial_output as unfinished
from reco_lightning.support.disk_errors import named_disk_errors
from tests.faults.runs import assert_same_training, before, config, fit, in_a_process, train
from tests.pipelines.evaluate.test_evaluate import files  # noqa: F401  (a fixture)
from tests.pipelines.tokenize.test_resume import Brightness, check, contents, done, run, videos  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.slow
def test_a_checkpoint_that_does_not_fit_leaves_the_ones_before(whole, tmp_path):
    tokens, folder, _ = whole
    path = config(tokens, tmp_path / "run")

    def full(call):
        if call == 5:  # of the batches, after the first checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    def dies():
        before(VideoModel, "on_train_batch_start", full)
        fit(path)

    code, said = in_a_process(dies, tmp_path)
    assert code not in (0, -signal.SIGXFSZ), said
    kept = tmp_path / "run" / "checkpoints"
    name = "epoch=1-step=6.ckpt"
    assert f"{kept / name} cannot be written (File too large): it needs 0." in said
    assert "checkpoints written before are as they were: free space, and resume with --ckpt_path" in said
    assert {file.name for file in kept.iterdir()} == {"epoch=0-step=3.ckpt", "last.ckpt"}
    assert torch.load(kept / "last.ckpt", weights_only=True)["global_step"] == 3
    code, said = in_a_process(lambda: train(path, None, None, "--ckpt_path", "last"), tmp_path)
    assert code == 0, said
    assert_same_training(tmp_path / "run", folder / "run")


def test_the_plugin_writes_what_lightning_writes(tmp_path):
    content = {"state_dict": {"a": torch.arange(3.0)}, "global_step": 1}
    io = WholeCheckpointIO()
    io.save_checkpoint(content, str(tmp_path / "new" / "a.ckpt"))
    assert torch.equal(io.load_checkpoint(tmp_path / "new" / "a.ckpt")["state_dict"]["a"], torch.arange(3.0))
    io.save_checkpoint(content, f"file://{tmp_path}/b.ckpt")  # a URL, which is Lightning's
    assert torch.load(tmp_path / "b.ckpt", weights_only=True)["global_step"] == 1
    with pytest.raises(TypeError, match="storage_options"):
        io.save_checkpoint(content, tmp_path / "c.ckpt", storage_options={})


@pytest.mark.slow
def test_ids_that_cannot_be_kept_end_the_tokenising_which_goes_on_later(videos, tmp_path, monkeypatch):  # noqa: F811
    append = unfinished.PartWriter.append

    def on_a_full_disk(self, clips, ids):
        if clips[0] == 8:
            self._file.close()
            self._file = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  (the writer closes it)
        append(self, clips, ids)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.PartWriter, "append", on_a_full_disk)
        with pytest.raises(
            OSError, match=r"part-00000.bin cannot be written \(No space left on device\): what was enc"
        ):
            run(videos, tmp_path / "tokens")
    assert done(tmp_path / "tokens") == list(range(8))
    rest = Brightness()
    run(videos, tmp_path / "tokens", tokenizer=rest)
    assert rest.encoded == [4, 4, 2]
    check(tmp_path / "tokens", videos)


@pytest.mark.slow
def test_shards_that_cannot_be_written_leave_the_old_ones_and_the_ids(videos, tmp_path, monkeypatch):  # noqa: F811
    before = contents(run(videos, tmp_path / "tokens", clip_step=9))
    save, calls = np.save, []

    def full(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise FULL
        save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(token_writer.np, "save", full)
        with pytest.raises(OSError, match="No space left on device"):
            run(videos, tmp_path / "tokens", overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "tokens").glob("*.*") if path.is_file()} == before
    rest = Brightness()
    run(videos, tmp_path / "tokens", tokenizer=rest, overwrite=True)
    assert rest.encoded == [4]  # one batch, for the loop's sake
    check(tmp_path / "tokens", videos)


def test_a_sample_that_cannot_be_written_does_not_end_the_training(files, tmp_path, monkeypatch):  # noqa: F811
    folder, tokenizer, model = files

    def full(path, frames, *, fps):
        raise FULL

    monkeypatch.setattr(samples, "write_video", full)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=2,
        limit_val_batches=0,
        logger=False,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[samples.SampleVideos(tokenizer, every_n_steps=1, n=1)],
    )
    data = TokenDataModule(str(folder / "tokens"), batch_size=2, val_fraction=0.2)
    with pytest.warns(
        UserWarning, match=r"step-0000000\d.mp4 cannot be written .*; the training goes on without it: free"
    ):
        trainer.fit(VideoModel.load_from_checkpoint(model), data)
    assert trainer.global_step == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, None])
def test_an_error_keeps_its_class_and_number(number):
    raised = OSError("12 requested and 4 written") if number is None else OSError(number, os.strerror(number))
    expected = r"a\.npy cannot be written \(.+\): free space"
    with pytest.raises(type(raised), match=expected) as caught, named_disk_errors("a.npy", "free space"):
        raise raised
    assert caught.value.errno == number
