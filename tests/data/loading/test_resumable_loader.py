# SPDX-License-Identifier: Apache-2.0
"""The resumable loader alone, and inside Lightning: a resumed run equals the uninterrupted one."""

from __future__ import annotations

import io
import pickle
from multiprocessing.reduction import ForkingPickler

import lightning.pytorch as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from reco_lightning.data.loading.resumable_loader import ResumableDataLoader
from reco_lightning.data.loading.sample_order import EpochSampler, LoaderState, data_ranks, epoch_order, rank_share

ITEMS, BATCH = 14, 4  # three full batches and two items over


class Rows(Dataset):
    def __init__(self, length=ITEMS):
        self.values = torch.randn(length, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return {"index": index, "value": self.values[index]}


class Net(L.LightningModule):
    """Weights depend on every batch and on the order of the batches."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch["index"].tolist()))
        return self.layer(batch["value"]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.log("val", self.layer(batch["value"]).mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Saver(L.Callback):
    """Saves at one hook, as often as it is called."""

    def __init__(self, folder, hook):
        self.paths = []

        def save(trainer, *_):
            self.paths.append(folder / f"{hook}-{len(self.paths)}.ckpt")
            trainer.save_checkpoint(self.paths[-1])

        setattr(self, hook, save)


def make(length=ITEMS, batch_size=BATCH, **options):
    return ResumableDataLoader(Rows(length), batch_size, **options)


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def flat(batches):
    return [index for batch in batches for index in batch]


def batches(net):
    return [indices for _, _, indices in net.seen]


def train(folder, *, loader, epochs=3, resume=None, val=None, callbacks=(), **options):
    net = Net()
    trainer = L.Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        **options,
    )
    trainer.fit(net, loader, val, ckpt_path=resume)
    return net


def test_order_is_a_function_of_seed_and_pass():
    orders = {tuple(epoch_order(20, seed=s, number=e).tolist()) for s in range(3) for e in range(3)}
    assert len(orders) == 9
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_every_iteration_of_a_plain_loop_is_a_new_pass():
    loader = make(seed=3)
    for number in range(3):
        assert flat(indices(loader)) == epoch_order(ITEMS, seed=3, number=number).tolist()


def test_set_epoch_chooses_the_pass():
    loader = make(seed=3)
    for epoch in (2, 0, 0, 1):
        loader.set_epoch(epoch)
        assert flat(indices(loader)) == epoch_order(ITEMS, seed=3, number=epoch).tolist()


def test_an_epoch_cut_short_is_gone_on_with_in_the_next_one():
    loader = make()
    loader.set_epoch(0)
    iterator = iter(loader)
    served = [next(iterator)["index"].tolist() for _ in range(3)]
    loader.set_epoch(1)
    served += indices(loader)
    loader.set_epoch(2)
    served += indices(loader)
    whole = make()
    assert served == (indices(whole) + indices(whole) + indices(whole))[:11]


@pytest.mark.parametrize(
    ("place", "epoch", "expected"),
    [
        (LoaderState(epoch=1, start=4, batches=2, loaded=True, resumed=True), 1, range(6, 8)),  # the middle of an epoch
        (LoaderState(epoch=1, start=4, batches=4, loaded=True, resumed=True), 1, range(8, 8)),  # its end
        (LoaderState(epoch=1, start=4, batches=4, loaded=True, resumed=True), 2, range(8, 12)),
        (
            LoaderState(epoch=1, start=4, batches=4, loaded=True, resumed=True),
            3,
            range(8, 12),
        ),  # Lightning counts one too many
        (LoaderState(epoch=1, start=4, batches=2, loaded=True, resumed=True), 2, range(6, 10)),  # ended by max_steps
        (LoaderState(epoch=2, start=8, batches=0, resumed=True), 3, range(8, 12)),  # it announced an empty epoch
        (LoaderState(epoch=1, start=4, batches=2), 1, range(4, 8)),  # a second fit with the same loader
        (LoaderState(epoch=1, start=4, batches=2), 0, range(0, 4)),
        (LoaderState(epoch=1, start=4, batches=2), 2, range(6, 10)),  # ended by limit_train_batches
        (LoaderState(epoch=0, start=0, batches=0), 5, range(20, 24)),  # a loop of one's own
        (LoaderState(epoch=0, start=0, batches=4), None, range(4, 8)),
        (LoaderState(epoch=0, start=0, batches=2), None, range(0, 4)),
        (LoaderState(epoch=0, start=0, batches=2, loaded=True, resumed=True), None, range(2, 4)),
    ],
)
def test_which_batches_follow(place, epoch, expected):
    if epoch is not None:
        place.announce(epoch, 4)
    assert place.begin(4) == expected


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("length", [12, 13, 14, 15])
def test_processes_get_equal_batch_counts_and_share_the_dataset(length, drop_last):
    loaders = [make(length, 2, rank=rank, world_size=3, drop_last=drop_last) for rank in range(3)]
    served = [indices(loader) for loader in loaders]
    assert {len(batches) for batches in served} == {len(loaders[0])}
    assert len({tuple(len(batch) for batch in batches) for batches in served}) == 1
    everything = flat(flat(served))
    if drop_last:
        assert len(set(everything)) == len(everything)
    else:
        assert set(everything) == set(range(length))
        assert len(everything) - length < 3


def test_share_of_fewer_items_than_processes_wraps_around():
    shares = [rank_share(torch.arange(2), rank=r, world_size=5, drop_last=False).tolist() for r in range(5)]
    assert shares == [[0], [1], [0], [1], [0]]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_state_serves_exactly_the_remaining_batches(stop, workers):
    whole = make()
    whole.set_epoch(2)
    expected = indices(whole)

    first = make(num_workers=workers)
    first.set_epoch(2)
    iterator = iter(first)
    for batch in expected[:stop]:
        assert next(iterator)["index"].tolist() == batch
    state = first.state_dict()
    assert (state["epoch"], state["batches"]) == (2, stop)

    resumed = make(num_workers=workers)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert len(resumed) == len(expected)  # Lightning counts from the start of the epoch
    resumed.set_epoch(2)  # what Lightning does after loading
    assert indices(resumed) == expected[stop:]
    assert resumed.state_dict()["batches"] == len(expected)
    resumed.set_epoch(3)
    assert flat(indices(resumed)) == epoch_order(ITEMS, seed=0, number=3).tolist()


def test_an_iterator_that_was_given_up_does_not_disturb_the_count():
    loader = make()
    old = iter(loader)
    next(old)
    new = iter(loader)
    next(new)
    next(old)
    next(old)
    assert loader.state_dict()["batches"] == 1


def test_iterating_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    indices(make(num_workers=2))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_can_be_sent_to_another_process(workers):
    loader = make(num_workers=workers)
    expected = indices(loader)
    buffer = io.BytesIO()
    ForkingPickler(buffer).dump(loader)  # what torch.multiprocessing does
    assert loader.generator is None  # it cannot be sent
    copy = pickle.loads(pickle.dumps(make(num_workers=workers)))
    assert indices(copy) == expected


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"length": 15}, "dataset_length was 14 and is 15"),
        ({"batch_size": 2}, "batch_size was 4 and is 2"),
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"rank": 0, "world_size": 2}, "world_size was 1 and is 2"),
        ({"shuffle": False}, "shuffle was True and is False"),
    ],
)
def test_a_state_of_another_loader_is_refused(now, message):
    state = {**make().state_dict(), "batches": 2}
    with pytest.raises(ValueError, match=f"{message}.*strict=False"):
        make(**now).load_state_dict(state)
    lenient = make(**now, strict=False)
    with pytest.warns(UserWarning, match=message):
        lenient.load_state_dict(state)
    assert len(indices(lenient)) == len(lenient)


def test_argument_errors():
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        make(batch_size=0)
    for wrong in (0, 0.0, 1.5):
        with pytest.raises(ValueError, match=f"epoch_batches must be a number from 1 or a share .*, got {wrong}"):
            make(epoch_batches=wrong)
    with pytest.raises(ValueError, match=r"sampler must be None, .* got a RandomSampler"):
        make(sampler=RandomSampler(Rows()))
    with pytest.raises(ValueError, match="rank and world_size must be given both or neither, got 1 and None"):
        make(rank=1)
    with pytest.raises(ValueError, match="rank must be 0 to 1, below world_size, got 2"):
        make(rank=2, world_size=2)
    with pytest.raises(ValueError, match=r"batch_size must let 14 items fill a batch on each of 1 process.*, got 20"):
        indices(make(batch_size=20, drop_last=True))


def test_lightning_leaves_the_sampler_in_place():
    loader = make()
    assert isinstance(loader.sampler, DistributedSampler)  # the class that Lightning looks for
    trainer = L.Trainer(strategy="ddp", devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert data_ranks(trainer) == (0, 2)
    assert data_ranks(None) == (None, None)
    assert trainer.strategy.process_dataloader(loader) is loader


def test_ranks_are_looked_up_when_needed(monkeypatch):
    sampler = EpochSampler(range(7), batch_size=1, shuffle=False)
    assert len(sampler) == 7
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    assert len(sampler) == 4
    assert list(sampler) == [1, 3, 5, 0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_fit_resumed_at_any_step_equals_the_uninterrupted_run(tmp_path, workers):
    saver = Saver(tmp_path, "on_train_batch_end")
    whole = train(tmp_path, loader=make(num_workers=workers), callbacks=[saver])
    assert len({str(batch) for _, _, batch in whole.seen}) == len(whole.seen) == 12
    steps = range(1, 12) if workers == 0 else (1, 3, 4, 6)  # 4 and 8 are the ends of epochs
    for step in steps:
        resumed = train(tmp_path, loader=make(num_workers=workers), resume=saver.paths[step - 1])
        assert resumed.seen == whole.seen[step:], step
        assert torch.equal(resumed.layer.weight, whole.layer.weight), step
        assert torch.equal(resumed.layer.bias, whole.layer.bias), step


@pytest.mark.parametrize("stop", [1, 2, 4, 5, 7, 8])
def test_fit_stopped_by_max_steps_and_resumed(tmp_path, stop):
    whole = train(tmp_path, loader=make(), max_steps=11)
    saver = Saver(tmp_path, "on_train_end")
    train(tmp_path, loader=make(), callbacks=[saver], max_steps=stop)
    # Lightning takes the epoch that max_steps ended for a whole one; its count of epochs is not that of the passes
    resumed = train(tmp_path, loader=make(), resume=saver.paths[0], max_steps=11, epochs=-1)
    assert batches(resumed) == batches(whole)[stop:]
    assert torch.equal(resumed.layer.weight, whole.layer.weight)


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_end", "on_train_epoch_end"])
@pytest.mark.parametrize(
    "options",
    [
        {"val_check_interval": 2},
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"max_steps": 7},
        {"max_steps": 8, "limit_train_batches": 0.75},
    ],
    ids="-".join,
)
def test_fit_resumed_with_validation_accumulation_and_limits(tmp_path, hook, options):
    val = DataLoader(Rows(4), 2)
    saver = Saver(tmp_path, hook)
    epoch_batches = options.get("limit_train_batches", 1.0)
    if "max_steps" in options:
        options = {**options, "epochs": -1}  # Lightning counts an epoch too many when it resumes at the end of one
    whole = train(tmp_path, loader=make(epoch_batches=epoch_batches), val=val, callbacks=[saver], **options)
    if "accumulate_grad_batches" in options and hook == "on_train_batch_end":
        saver.paths = saver.paths[1::2]  # half an accumulation is in no checkpoint: Lightning does not store gradients
    assert saver.paths
    for path in saver.paths:
        resumed = train(tmp_path, loader=make(epoch_batches=epoch_batches), val=val, resume=path, **options)
        assert batches(resumed) == batches(whole)[len(whole.seen) - len(resumed.seen) :], path.name
        assert torch.equal(resumed.layer.weight, whole.layer.weight), path.name


def test_state_in_the_checkpoint_is_plain(tmp_path):
    saver = Saver(tmp_path, "on_train_batch_end")
    train(tmp_path, loader=make(), epochs=1, callbacks=[saver], limit_train_batches=2)
    checkpoint = torch.load(saver.paths[-1], weights_only=True)
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    assert (state["epoch"], state["batches"], state["dataset_length"]) == (0, 2, ITEMS)


def test_overfit_batches_makes_the_loader_anew_without_shuffling(tmp_path):
    with pytest.warns(UserWarning, match="turning off the train dataloader shuffling"):
        net = train(tmp_path, loader=make(seed=5), epochs=2, overfit_batches=2)
    assert [batch for _, _, batch in net.seen] == 2 * [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_a_seed_below_0_is_a_seed():
    orders = {tuple(epoch_order(50, seed=seed, number=0).tolist()) for seed in (-1, 0, 1, -(2**63))}
    assert len(orders) == 4
