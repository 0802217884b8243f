# SPDX-License-Identifier: Apache-2.0
"""Splitting clips, and the data module inside a trainer."""

from __future__ import annotations

import json

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from torch import nn

from reco_lightning.data.clips.folder import Clip
from reco_lightning.data.clips.module import split_clips
from reco_lightning.data.tokens.module import TokenDataModule, split_by_source, split_by_time
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter

GRID = (3, 2, 2)


def table_of(*clips):
    """Rows (source, start, stop) as `TokenShards.table` has them."""
    return np.array([[0, *clip, 1] for clip in clips])


@pytest.fixture
def folder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    sources = [ClipSource(f"{n // 5}.mp4", 9 * (n % 5), 9 * (n % 5) + 9) for n in range(20)]
    with TokenShardWriter(tmp_path, vocab_size=16, grid=GRID, classes=["a", "b"], shard_size=8) as writer:
        writer.write(torch.randint(0, 16, (20, *GRID), generator=generator), torch.arange(20) % 2, sources)
    return str(tmp_path)


def ready(folder, **options):
    module = TokenDataModule(folder, **options)
    module.setup("fit")
    return module


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4])
def test_split_by_source_holds_out_the_files_that_the_video_module_holds_out(seed, fraction):
    clips = [
        Clip(f"{name}.mp4", 17 * n, 0)
        for name, count in zip("abcdefg", (3, 1, 4, 1, 5, 2, 2), strict=True)
        for n in range(count)
    ]
    sources = {path: n for n, path in enumerate(dict.fromkeys(clip.path for clip in clips))}
    table = table_of(*((sources[clip.path], clip.start, clip.start + 17) for clip in clips))
    expected = split_clips(clips, val_fraction=fraction, span=17, seed=seed)
    assert split_by_source(table, val_fraction=fraction, seed=seed) == expected


def test_split_by_source_of_one_file_is_by_time():
    table = table_of(*((0, 10 * n, 10 * n + 17) for n in range(10)))
    train, held_out = split_by_source(table, val_fraction=0.2)
    assert held_out == [8, 9]
    assert train == [0, 1, 2, 3, 4, 5, 6]  # clip 7 ends at frame 87, clip 8 starts at 80


def test_split_by_time_takes_the_end_of_every_file():
    table = table_of((1, 20, 30), (1, 0, 10), (0, 0, 10), (1, 10, 20), (0, 10, 20), (2, 0, 10))
    assert split_by_time(table, val_fraction=0.3) == ([1, 2, 3, 5], [0, 4])


def test_split_by_time_of_clips_of_unknown_origin_is_by_order():
    assert split_by_time(table_of(*[(-1, -1, -1)] * 5), val_fraction=0.4) == ([0, 1, 2], [3, 4])


def test_split_errors():
    for split in (split_by_source, split_by_time):
        with pytest.raises(ValueError, match=r"val_fraction must be at least 0 and below 1, got 1.0"):
            split(table_of((0, 0, 9)), val_fraction=1.0)
        with pytest.raises(
            ValueError, match=r"val_fraction must leave clips .* got 0.1 of 1 clips, which leaves 1 and 0"
        ):
            split(table_of((0, 0, 9)), val_fraction=0.1)
        with pytest.raises(ValueError, match=r"got 0.5 of 2 clips, which leaves 0 and 1"):
            split(table_of((0, 0, 9), (0, 1, 10)), val_fraction=0.5)


def test_batches(folder):
    module = ready(folder, batch_size=4, val_fraction=0.25)
    assert (len(module.train_set), len(module.val_set)) == (15, 5)
    batch = next(iter(module.train_dataloader()))
    assert batch["tokens"].shape == (4, 12)
    assert batch["tokens"].dtype == batch["label"].dtype == torch.int64
    assert len(module.train_dataloader()) == 3
    assert len(ready(folder, batch_size=4, val_fraction=0.25, drop_last=False).train_dataloader()) == 4
    assert [len(batch["label"]) for batch in module.val_dataloader()] == [4, 1]
    assert sum(len(batch["label"]) for batch in module.predict_dataloader()) == 20
    assert ready(folder, val_fraction=0).val_dataloader() == []


def test_split_time_reports_what_is_left_out(tmp_path, caplog):
    with TokenShardWriter(tmp_path, vocab_size=16, grid=GRID) as writer:
        writer.write(np.zeros((6, *GRID), np.int64), sources=[ClipSource("a", 4 * n, 4 * n + 9) for n in range(6)])
    with caplog.at_level("INFO"):
        module = ready(str(tmp_path), split="time", val_fraction=0.2, batch_size=1)
    assert (module.train_set.indices, module.val_set.indices) == ([0, 1, 2], [5])
    assert "2 clips share frames with the validation clips" in caplog.text


def test_the_split_does_not_depend_on_the_seed_of_the_order(folder):
    one, two = ready(folder, seed=0), ready(folder, seed=1)
    assert one.val_set.indices == two.val_set.indices
    orders = [torch.cat([batch["tokens"] for batch in module.train_dataloader()]) for module in (one, two)]
    assert not torch.equal(*orders)


def test_argument_errors(folder):
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        TokenDataModule(folder, batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be a whole number of 0 or more, got -1"):
        TokenDataModule(folder, num_workers=-1)
    with pytest.raises(ValueError, match="split must be 'source' or 'time', got 'file'"):
        TokenDataModule(folder, split="file")
    with pytest.raises(ValueError, match=r"val_fraction must be at least 0 and below 1, got -0.1"):
        TokenDataModule(folder, val_fraction=-0.1)
    with pytest.raises(
        ValueError, match=r"batch_size must let the 15 training clips .* on each of 1 process\(es\), got 16"
    ):
        ready(folder, batch_size=16).train_dataloader()


def test_verify_reads_the_checksums(folder, tmp_path):
    TokenDataModule(folder, verify=True).prepare_data()
    path = next(tmp_path.glob("tokens-00000*"))
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    TokenDataModule(folder).prepare_data()
    with pytest.raises(ValueError, match="must have the SHA-256"):
        TokenDataModule(folder, verify=True).prepare_data()


class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 4)

    def training_step(self, batch, batch_idx):
        return self.embed(batch["tokens"]).mean(1)[batch["label"] == 0].square().sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


def trainer(folder, **options):
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        **options,
    )


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 2}, {"limit_train_batches": 0.7}], ids=str)
@pytest.mark.parametrize("stop", [2, 5, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(folder, tmp_path, stop, options):
    whole, first, resumed = Net(), Net(), Net()
    trainer(tmp_path, max_steps=10, **options).fit(whole, datamodule=TokenDataModule(folder, batch_size=4))
    stopped = trainer(tmp_path, max_steps=stop, **options)
    stopped.fit(first, datamodule=TokenDataModule(folder, batch_size=4))
    stopped.save_checkpoint(tmp_path / "stop.ckpt")
    path = str(tmp_path / "stop.ckpt")
    trainer(tmp_path, max_steps=10, **options).fit(
        resumed, datamodule=TokenDataModule(folder, batch_size=4), ckpt_path=path
    )
    assert torch.equal(resumed.embed.weight, whole.embed.weight)


class Diary(Net):
    """Writes down the clips of every batch, a file for each process."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def training_step(self, batch, batch_idx):
        with open(f"{self.path}-{self.global_rank}", "a") as file:
            print(batch["tokens"].tolist(), file=file)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == 5:
            self.trainer.save_checkpoint(f"{self.path}.ckpt")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")
def test_two_processes_share_the_clips_and_go_on_in_the_middle_of_an_epoch(folder, tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that were not forked with it

    def seen(name, steps, resume=None):
        one = L.Trainer(
            accelerator="cpu",
            devices=2,
            strategy="ddp_fork",
            max_steps=steps,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TokenDataModule(folder, batch_size=2, val_fraction=0.2, num_workers=0)
        one.fit(Diary(tmp_path / name / "seen"), datamodule=data, ckpt_path=resume)
        return [(tmp_path / name / f"seen-{rank}").read_text().splitlines() for rank in (0, 1)]

    # of 15 training clips an epoch is 3 steps of 2 processes with 2 clips each; step 5 is inside the second
    (tmp_path / "whole").mkdir()
    (tmp_path / "again").mkdir()
    whole = seen("whole", 9)
    again = seen("again", 9, resume=str(tmp_path / "whole" / "seen.ckpt"))
    torch.set_num_threads(threads)
    training = {str(item["tokens"].tolist()) for item in ready(folder, val_fraction=0.2).train_set}
    assert (len(training), [len(lines) for lines in whole]) == (15, [9, 9])
    for epoch in (slice(0, 3), slice(3, 6), slice(6, 9)):
        clips = [str(clip) for lines in whole for line in lines[epoch] for clip in json.loads(line)]
        assert len(clips) == len(set(clips)) == 12
        assert set(clips) <= training
    assert again == [lines[5:] for lines in whole]


def test_resuming_with_another_batch_size_is_refused(folder, tmp_path):
    stopped = trainer(tmp_path, max_steps=2)
    stopped.fit(Net(), datamodule=TokenDataModule(folder, batch_size=4))
    path = str(tmp_path / "stop.ckpt")
    stopped.save_checkpoint(path)
    with pytest.raises(ValueError, match="batch_size was 4 and is 5"):
        trainer(tmp_path, max_steps=4).fit(Net(), datamodule=TokenDataModule(folder, batch_size=5), ckpt_path=path)
    module = TokenDataModule(folder, batch_size=5, strict_resume=False)
    with pytest.warns(UserWarning, match="served from its beginning, as batch_size was 4 and is 5"):
        trainer(tmp_path, max_steps=4).fit(Net(), datamodule=module, ckpt_path=path)


def test_test_serves_the_held_out_clips_or_all_without_any(folder):
    assert sum(len(batch["tokens"]) for batch in ready(folder, val_fraction=0.25).test_dataloader()) == 5
    assert sum(len(batch["tokens"]) for batch in ready(folder, val_fraction=0.0).test_dataloader()) == 20
