# SPDX-License-Identifier: Apache-2.0
"""The litdata back end; `run.sh` runs these in an environment that has litdata."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from reco_lightning import ReCoCallback, VideoModel, VideoTransformer, WindowSampler
from reco_lightning.data.tokens.litdata import LitTokenDataModule, export_litdata
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import ClipSource, TokenShards, TokenShardWriter

GRID, VOCAB, CLIPS = (3, 2, 2), 70_000, 60  # ids beyond uint16
TRAIN, BATCH = 48, 4
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """A forked process must not wait for threads that were not forked with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 clips of 10 videos; the first id of each is its place."""
    path = tmp_path_factory.mktemp("tokens")
    ids = torch.randint(0, VOCAB, (CLIPS, *GRID), generator=torch.Generator().manual_seed(0))
    ids[:, 0, 0, 0] = torch.arange(CLIPS)
    sources = [ClipSource(f"{n // 6}.mp4", 9 * (n % 6), 9 * (n % 6) + 9) for n in range(CLIPS)]
    with TokenShardWriter(path, vocab_size=VOCAB, grid=GRID, classes=["a", "b", "c"], shard_size=17) as writer:
        writer.write(ids, torch.arange(CLIPS) % 3, sources)
    return str(path)


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    path = str(tmp_path_factory.mktemp("export") / "new")
    export_litdata(folder, path, val_fraction=0.2, chunk_clips=7)
    return path


def ready(exported, **options):
    module = LitTokenDataModule(exported, **{"batch_size": BATCH, **options})
    module.setup("fit")
    return module


def places(batches):
    return [batch["tokens"][:, 0].tolist() for batch in batches]


def flat(batches):
    return [place for batch in places(batches) for place in batch]


def serve(loader, batches):
    """Serve some batches and leave the epoch there."""
    for _ in zip(range(batches), loader):  # noqa: B905  # the range first: it ends before one batch more is taken
        pass


def sums(folder):
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


def test_an_export_holds_what_the_shards_hold_split_as_the_token_module_splits(folder, exported):
    reference = TokenDataModule(folder, batch_size=BATCH, val_fraction=0.2)
    reference.setup("fit")
    module = ready(exported)
    assert module.manifest == TokenShards(folder).manifest
    for loader, clips in (
        (module.train_dataloader(), reference.train_set),
        (module.val_dataloader(), reference.val_set),
    ):
        batches = list(loader)
        found = {int(row[0]): (row, label) for b in batches for row, label in zip(b["tokens"], b["label"], strict=True)}
        assert sorted(found) == clips.indices
        for place in clips.indices:
            assert torch.equal(found[place][0], clips.dataset[place]["tokens"])
            assert torch.equal(found[place][1], clips.dataset[place]["label"])
        kind = next(iter(reference.train_dataloader()))
        assert {key: (value.dtype, value.shape) for key, value in batches[0].items()} == {
            key: (value.dtype, value.shape) for key, value in kind.items()
        }
    assert flat(module.val_dataloader()) == reference.val_set.indices
    assert flat(module.test_dataloader()) == reference.val_set.indices


def test_no_split_stores_all_clips_for_training(folder, tmp_path):
    export_litdata(folder, str(tmp_path / "all"), val_fraction=0)
    module = ready(str(tmp_path / "all"))
    assert module.val_dataloader() == []
    assert sorted(flat(module.train_dataloader())) == sorted(flat(module.test_dataloader())) == list(range(CLIPS))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_epoch_holds_each_clip_once_in_an_order_of_its_own(exported, workers):
    loader = ready(exported, num_workers=workers).train_dataloader()
    epochs = [flat(loader) for _ in range(3)]
    assert len(loader) * BATCH == TRAIN
    assert all(len(epoch) == len(set(epoch)) == TRAIN for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    again = ready(exported, num_workers=workers).train_dataloader()
    assert [flat(again) for _ in range(3)] == epochs
    assert flat(ready(exported, num_workers=workers, seed=1).train_dataloader()) != epochs[0]


def test_clips_of_a_file_are_apart(exported):
    first = flat(ready(exported).train_dataloader())[:12]
    assert len({place // 6 for place in first}) > 3  # in order, 12 clips would be of 2 or 3 videos


def test_without_shuffling_all_epochs_are_alike(exported):
    loader = ready(exported, shuffle=False).train_dataloader()
    assert flat(loader) == flat(loader)


def test_reading_leaves_the_files_as_they_are(exported, tmp_path):
    before = sums(Path(exported))
    for workers in (0, 2):
        flat(ready(exported, num_workers=workers).train_dataloader())
    assert sums(Path(exported)) == before


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("stop", [1, 5, 11])
def test_a_resumed_loader_serves_what_was_left(exported, workers, stop):
    whole = ready(exported, num_workers=workers).train_dataloader()
    epochs = [list(whole) for _ in range(3)]
    stopped = ready(exported, num_workers=workers).train_dataloader()
    flat(stopped)
    serve(stopped, stop)
    state = json.loads(json.dumps(stopped.state_dict()))
    resumed = ready(exported, num_workers=workers).train_dataloader()
    resumed.load_state_dict(state)
    rest = list(resumed)
    assert len(rest) == len(epochs[1]) - stop
    for batch, expected in zip(rest, epochs[1][stop:], strict=True):
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    assert places(resumed) == places(epochs[2])


@pytest.mark.parametrize("workers", [0, 1])
def test_resuming_twice_in_one_epoch(exported, workers):
    whole, first, second, third = (ready(exported, num_workers=workers).train_dataloader() for _ in range(4))
    flat(whole)
    flat(first)
    serve(first, 3)
    second.load_state_dict(first.state_dict())
    serve(second, 4)
    third.load_state_dict(second.state_dict())
    assert places(third) == places(whole)[7:]


def test_a_state_of_another_seed_is_refused(exported):
    loader = ready(exported).train_dataloader()
    next(iter(loader))
    other = ready(exported, seed=1).train_dataloader()
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match="`seed` state doesn't match"):
        list(other)


class Net(L.LightningModule):
    """Writes down the clips of every batch, a file for each process, and saves after `save` steps."""

    def __init__(self, path, save=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, 2)
        self.path, self.save = path, save

    def training_step(self, batch, batch_idx):
        with open(f"{self.path}-{self.global_rank}", "a") as file:
            print(batch["tokens"][:, 0].tolist(), file=file)
        return self.embed(batch["tokens"]).square().mean()

    def validation_step(self, batch, batch_idx):
        pass

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == self.save:
            self.trainer.save_checkpoint(f"{self.path}.ckpt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(path, exported, *, save=None, resume=None, workers=0, **options):
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(enable_progress_bar=False, enable_model_summary=False, **settings)
    data = LitTokenDataModule(exported, batch_size=BATCH, num_workers=workers)
    trainer.fit(Net(path, save), datamodule=data, ckpt_path=resume)
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in sorted(path.parent.glob("*-?"))]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("save", [5, 17, 24])
def test_a_resumed_run_goes_on_over_several_epochs(exported, tmp_path, workers, save):
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    (whole,) = fit(tmp_path / "whole" / "seen", exported, save=save, workers=workers)
    (again,) = fit(tmp_path / "again" / "seen", exported, resume=str(tmp_path / "whole" / "seen.ckpt"), workers=workers)
    assert len(whole) == 36
    assert again == whole[save:]
    assert len({str(whole[n : n + 12]) for n in (0, 12, 24)}) == 3


def test_a_run_stopped_by_max_steps_goes_on_with_what_was_left(exported, tmp_path):
    for name in ("whole", "first", "again"):
        (tmp_path / name).mkdir()
    (whole,) = fit(tmp_path / "whole" / "seen", exported, max_epochs=-1, max_steps=30)
    path = tmp_path / "first" / "seen"
    fit(path, exported, max_epochs=-1, max_steps=17, save=17)
    (again,) = fit(tmp_path / "again" / "seen", exported, max_epochs=-1, max_steps=30, resume=f"{path}.ckpt")
    assert again == whole[17:]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_run_resumed_between_epochs_goes_on_with_the_next_order(exported, tmp_path):
    for name in ("whole", "first", "again"):
        (tmp_path / name).mkdir()
    (whole,) = fit(tmp_path / "whole" / "seen", exported)
    last = ModelCheckpoint(tmp_path / "saved", save_on_train_epoch_end=True)
    options = {"enable_checkpointing": True, "callbacks": [last]}
    fit(tmp_path / "first" / "seen", exported, max_epochs=2, **options)
    (again,) = fit(tmp_path / "again" / "seen", exported, resume=last.best_model_path, **options)
    assert again == whole[24:]


def test_two_processes_get_disjoint_halves_and_go_on_in_the_middle_of_an_epoch(exported, tmp_path):
    for name in ("whole", "again"):
        (tmp_path / name).mkdir()
    options = {"devices": 2, "strategy": "ddp_fork", "max_epochs": 2, "num_sanity_val_steps": 0}
    whole = fit(tmp_path / "whole" / "seen", exported, save=8, **options)
    again = fit(tmp_path / "again" / "seen", exported, resume=str(tmp_path / "whole" / "seen.ckpt"), **options)
    assert [len(lines) for lines in whole] == [12, 12]
    for epoch in (slice(0, 6), slice(6, 12)):
        halves = [{place for line in lines[epoch] for place in line} for lines in whole]
        assert [len(half) for half in halves] == [TRAIN // 2] * 2
        assert not halves[0] & halves[1]
    assert again == [lines[8:] for lines in whole]


def test_litdatas_own_variables_split_the_clips_too(exported, monkeypatch):
    halves = []
    for rank in ("0", "1"):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("GLOBAL_RANK", rank)
        halves.append(set(flat(ready(exported).train_dataloader())))
    assert [len(half) for half in halves] == [TRAIN // 2] * 2
    assert not halves[0] & halves[1]


def test_shards_that_do_not_fit_are_refused(exported, tmp_path):
    def refused(network, message, *callbacks):
        model = VideoModel(VideoTransformer(dim=8, depth=1, heads=1, **network))
        trainer = L.Trainer(
            default_root_dir=tmp_path, accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=list(callbacks),
        )  # fmt: skip
        with pytest.raises(ValueError, match=message):
            trainer.fit(model, datamodule=LitTokenDataModule(exported, batch_size=BATCH))

    refused({"vocab_size": 16, "grid": GRID}, "the shards have vocab_size 70000, the model 16")
    refused({"vocab_size": VOCAB, "grid": (3, 2, 3)}, r"the shards have grid \(3, 2, 2\), the model \(3, 2, 3\)")
    window = ReCoCallback(WindowSampler(5, 4))
    refused({"vocab_size": VOCAB, "grid": GRID}, "the shards hold 12 ids a clip, the sampler expects 20", window)


def test_data_that_several_processes_share_is_refused(exported):
    module = ready(exported)
    shared = {"rank": 0, "num_replicas": 2}
    module.trainer = SimpleNamespace(lightning_module=None, distributed_sampler_kwargs=shared, current_epoch=0)
    with pytest.raises(ValueError, match="strategy must give data of its own to each process"):
        module.train_dataloader()


def test_items_that_would_be_unpickled_are_refused(exported, tmp_path):
    strange = tmp_path / "strange"
    shutil.copytree(exported, strange)
    index = strange / "train" / "index.json"
    content = json.loads(index.read_text())
    content["config"]["data_format"] = ["pickle"] * len(content["config"]["data_format"])
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="litdata's format 'pickle', whose reading can run code"):
        next(iter(ready(str(strange)).train_dataloader()))


def test_argument_errors(folder, exported, tmp_path):
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        LitTokenDataModule(exported, batch_size=0)
    with pytest.raises(ValueError, match="num_workers must be a whole number of 0 or more, got -1"):
        LitTokenDataModule(exported, num_workers=-1)
    with pytest.raises(ValueError, match=r"seed must be 0 to 2\*\*32 - 1, got -1"):
        LitTokenDataModule(exported, seed=-1)
    with pytest.raises(ValueError, match=r"output must be a new or empty folder, got .* which holds files"):
        export_litdata(folder, exported)
    with pytest.raises(ValueError, match="split must be 'source' or 'time', got 'file'"):
        export_litdata(folder, str(tmp_path), split="file")
    with pytest.raises(ValueError, match="chunk_clips must be a whole number of 1 or more or None, got 0"):
        export_litdata(folder, str(tmp_path), chunk_clips=0)
    with pytest.raises(ValueError, match=r"folder must hold token shards, got .* without a manifest.json"):
        export_litdata(str(tmp_path), str(tmp_path / "new"))
    with pytest.raises(ValueError, match=r"folder must hold token shards, got .* without a manifest.json"):
        ready(str(tmp_path))
    with pytest.raises(ValueError, match=r"folder must hold what export_litdata writes, got .* without split.json"):
        ready(folder)
    with pytest.raises(ValueError, match=r"the 48 train clips of .* on each of 1 process\(es\), got 49; lower it"):
        ready(exported, batch_size=49).train_dataloader()


def test_without_litdata_the_extra_is_named(folder, exported, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "litdata", None)
    for use in (lambda: export_litdata(folder, str(tmp_path / "new")), lambda: ready(exported)):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "reco_lightning\[litdata\]"'):
            use()
    assert not (tmp_path / "new").exists()
