# SPDX-License-Identifier: Apache-2.0
"""Windows lie on the video's tokens whatever targets are left out, and batches of other lengths are met."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from reco_lightning import ReCoCallback, VideoTransformer, WindowSampler
from tests.helpers.foreign import DIM, Layer, trainer

BLOCKS, PER_BLOCK, VOCAB = 4, 3, 11
TOKENS = BLOCKS * PER_BLOCK
WINDOWS = WindowSampler(BLOCKS, PER_BLOCK, first_window_prob=None, seed=4)


class Base(pl.LightningModule):
    """A causal network over ids of any length; the subclass makes ids and targets, rows by rows of its network."""

    prefix = 1

    def __init__(self):
        super().__init__()
        self.ids, self.places = nn.Embedding(VOCAB + 1, DIM), nn.Embedding(40, DIM)
        self.blocks = nn.ModuleList(Layer(0.0) for _ in range(2))
        self.head = nn.Linear(DIM, VOCAB)

    def network(self, ids):
        states = self.ids(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            states = block(states)
        return self.head(states)

    def training_step(self, batch, batch_idx):
        ids, target = self.rows(batch)
        losses = F.cross_entropy(self.network(ids).transpose(1, 2), target, reduction="none")
        self.counted = losses.detach()[0].nonzero().flatten().tolist()
        return losses.sum() / (target != -100).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class StartToken(Base):
    def rows(self, z):
        return F.pad(z[:, :-1], (1, 0), value=VOCAB), z


class StartTokenByCat(Base):
    def rows(self, z):
        return torch.cat([torch.full_like(z[:, :1], VOCAB), z[:, :-1]], dim=1), z


class ShiftedInput(Base):
    prefix = 0

    def rows(self, z):
        return z[:, :-1], z[:, 1:]


class Rolled(Base):
    """Fed with all tokens; the last row has nothing to predict."""

    prefix = 0

    def rows(self, z):
        return z, torch.cat([z[:, 1:], torch.full_like(z[:, :1], -100)], dim=1)


class PaddedLabels(Base):
    """As transformers shifts its labels."""

    prefix = 0

    def rows(self, z):
        return z, F.pad(z, (0, 1), value=-100)[:, 1:]


class Caption(Base):
    """A caption in front, of which every row is in the loss and none counts, and two rows behind the video."""

    prefix = 4

    def rows(self, z):
        ids = torch.cat([torch.full_like(z[:, :4], VOCAB), z, torch.full_like(z[:, :2], VOCAB)], dim=1)
        target = torch.full_like(ids, -100)
        target[:, 3 : 3 + TOKENS] = z
        return ids, target


MODULES = [StartToken, StartTokenByCat, ShiftedInput, Rolled, PaddedLabels, Caption]


def clips(count=2, seed=0):
    return torch.randint(VOCAB, (count, TOKENS), generator=torch.Generator().manual_seed(seed))


def left_out(cls, which):
    """The module with some targets left out, in places that say nothing of the layout."""

    class LeftOut(cls):
        def rows(self, z):
            ids, target = super().rows(z)
            target = target.clone()
            first = max(cls.prefix - 1, 0)
            tokens = target[:, first : first + TOKENS - (cls.prefix == 0)]
            tokens[..., which] = -100
            return ids, target

    return LeftOut


def found(module, batch, **options):
    """The prefix that the callback's own trace finds; its windows are verified with it."""
    trace = ReCoCallback(WINDOWS, **options).settings.select(module, lambda: module.training_step(batch, 0)).trace
    return trace.layout(TOKENS).prefix(trace.rows)


@pytest.mark.parametrize("hinted", [True, False])
@pytest.mark.parametrize("cls", MODULES)
def test_rows_are_found_when_all_targets_count(cls, hinted):
    assert found(cls(), clips(), prefix_tokens=cls.prefix if hinted else None) == cls.prefix


@pytest.mark.parametrize("which", [slice(-1, None), slice(-4, None), slice(0, 2), slice(5, 7)], ids=str)
@pytest.mark.parametrize("cls", MODULES)
def test_targets_that_are_left_out_change_nothing_where_the_user_says_the_prefix(cls, which):
    module = left_out(cls, which)()
    assert found(module, clips(), prefix_tokens=cls.prefix) == cls.prefix
    data = DataLoader(clips(8), batch_size=2)
    callback = ReCoCallback(WINDOWS, prefix_tokens=cls.prefix, continuity_weight=0)
    watch = Watch(callback, cls.prefix)
    trainer(callback, watch).fit(module, data)
    assert watch.batches == 4


class Watch(pl.Callback):
    """Compares the loss rows that counted with those that the window's tokens have."""

    def __init__(self, callback, prefix):
        self.callback, self.prefix, self.batches = callback, prefix, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        (window,) = self.callback.windows
        allowed = range(max(window.start + self.prefix - 1, 0), window.stop + self.prefix - 1)
        assert set(module.counted) <= set(allowed)
        assert len(module.counted) >= len(allowed) - 4
        self.batches += 1


@pytest.mark.parametrize("which", [slice(-1, None), slice(-4, None)], ids=str)
@pytest.mark.parametrize("cls", [StartToken, StartTokenByCat, ShiftedInput, PaddedLabels])
def test_a_last_target_that_is_left_out_in_the_first_batch_does_not_shift_the_windows(cls, which):
    assert found(left_out(cls, which)(), clips()) == cls.prefix


def test_a_start_token_inside_the_network_is_seen_too():
    class Module(Base):
        def __init__(self):
            super().__init__()
            self.net = VideoTransformer(vocab_size=VOCAB, grid=(BLOCKS, 1, PER_BLOCK), dim=16, depth=2, heads=2)
            del self.blocks, self.head

        def training_step(self, z, batch_idx):
            return F.cross_entropy(
                self.net(z[:, :-1]).flatten(0, 1), z.index_fill(1, torch.tensor([TOKENS - 1]), -100).flatten()
            )

    assert found(Module(), clips()) == 1


def test_where_nothing_tells_the_user_is_asked():
    """One sample, the first id an ordinary one, and the last target left out: a start token, or all tokens fed."""

    class OrdinaryStart(Base):
        def rows(self, z):
            return torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], 1), z.index_fill(
                1, torch.tensor([TOKENS - 1]), -100
            )

    with pytest.raises(MisconfigurationException, match=r"the last one has no target.*set prefix_tokens=1 .*=0 if"):
        found(OrdinaryStart(), clips(1))
    assert found(OrdinaryStart(), clips(1), prefix_tokens=1) == 1


@pytest.mark.parametrize(("cls", "hint"), [(StartToken, 0), (StartToken, 2), (ShiftedInput, 1), (Caption, 3)])
def test_a_prefix_that_the_rows_contradict_is_refused(cls, hint):
    with pytest.raises(MisconfigurationException, match=f"prefix_tokens={hint}, but the sampler's"):
        found(cls(), clips(), prefix_tokens=hint)


class Lengths(StartToken):
    """Clips and padding of any length; a batch is (ids, padding behind them)."""

    def rows(self, batch):
        z, padding = batch
        ids, target = super().rows(z)
        return F.pad(ids, (0, padding)), F.pad(target, (0, padding), value=-100)


def fit_on(batches, **options):
    callback = ReCoCallback(WINDOWS, continuity_weight=0, **options)
    watch = Watch(callback, 1)
    trainer(callback, watch).fit(Lengths(), DataLoader(batches, batch_size=None))
    return watch.batches


def test_padding_behind_later_clips_moves_no_window():
    assert fit_on([(clips(), 0), (clips(), 5), (clips(), 2), (clips(), 0)], prefix_tokens=1) == 4
    assert fit_on([(clips(), 3), (clips(), 3)]) == 2


def test_padding_behind_later_clips_is_refused_where_it_may_be_a_longer_prefix():
    with pytest.raises(RuntimeError, match=r"given 12 rows .* and 17 now.*set prefix_tokens="):
        fit_on([(clips(), 0), (clips(), 5)])


@pytest.mark.parametrize("hint", [None, 1])
def test_longer_clips_are_refused(hint):
    longer = torch.cat([clips(), clips()[:, :PER_BLOCK]], dim=1)
    with pytest.raises(RuntimeError, match=r"given 12 rows .* and 15 now"):
        fit_on([(clips(), 0), (longer, 0)], prefix_tokens=hint)


def test_captions_of_any_length_move_the_windows_with_them():
    class Captions(Base):
        def rows(self, batch):
            z, length = batch
            ids = F.pad(z[:, :-1], (length, 0), value=VOCAB)
            return ids, F.pad(z, (length - 1, 0), value=-100)

    class Any(Watch):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.prefix = batch[1]
            super().on_train_batch_end(trainer, module, outputs, batch, batch_idx)

    callback = ReCoCallback(WINDOWS, continuity_weight=0)
    watch = Any(callback, None)
    data = [(clips(), 3), (clips(), 1), (clips(), 6), (clips(), 3)]
    trainer(callback, watch).fit(Captions(), DataLoader(data, batch_size=None))
    assert watch.batches == 4
