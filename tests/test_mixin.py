# SPDX-License-Identifier: Apache-2.0
"""``ReCoMixin`` in a training step of one's own, and without a trainer."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch

from reco_lightning import ReCoCallback, ReCoMixin, VideoTransformer, WindowSampler
from tests.helpers import foreign, reference
from tests.helpers.foreign import batches, trainer

GRID = (foreign.BLOCKS, 2, 3)


class Plain(pl.LightningModule):
    def __init__(self, start_token=True):
        super().__init__()
        torch.manual_seed(0)
        self.network = VideoTransformer(
            vocab_size=foreign.VOCAB, grid=GRID, dim=32, depth=2, heads=2, start_token=start_token
        )

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        logits = self.network(tokens[:, :-1])
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, -logits.shape[1] :].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Windowed(ReCoMixin, Plain):
    def __init__(self, start_token=True, **options):
        super().__init__(start_token)
        settings = {"blocks": "network.blocks", "head": "network.head", "prefix_tokens": int(start_token)} | options
        self.init_reco(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2), **settings)

    def training_step(self, batch, batch_idx):
        tokens = batch[0]
        return self.reco_loss(self.windowed(self.network, tokens[:, :-1], targets=tokens))


@pytest.mark.parametrize("options", [{}, {"context": "keys"}, {"windows_per_batch": 3}], ids=str)
@pytest.mark.parametrize("start_token", [True, False])
def test_equals_the_callback(start_token, options):
    own, other = Windowed(start_token, **options), Plain(start_token)
    trainer().fit(own, batches(count=4))
    sampler = WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2)
    trainer(ReCoCallback(sampler, **options)).fit(other, batches(count=4))
    for (name, a), b in zip(own.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_gives_logits_targets_and_states_of_the_window():
    module = Windowed()
    tokens = next(iter(batches(count=1)))[0]
    step = module.windowed(module.network, tokens[:, :-1], targets=tokens, step=3)
    (window,) = step.windows
    assert window == WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, seed=2).sample(3)
    logits, hidden = reference.forward(module.network, tokens[:, :-1])
    span = slice(window.start, window.stop)
    torch.testing.assert_close(step.logits, logits[:, span].flatten(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(step.hidden[0], hidden[:, span], atol=1e-5, rtol=1e-5)
    assert torch.equal(step.targets, tokens[:, span].flatten())


def test_a_schedule_follows_the_progress_that_is_stated():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    sampler = WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK, schedule={0.5: foreign.BLOCKS})
    module.init_reco(sampler, blocks="network.blocks", head="network.head", prefix_tokens=1)
    with pytest.raises(ValueError, match="progress must be given where the sampler has a schedule"):
        module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)
    for progress, blocks in ((0.4, 2), (0.5, foreign.BLOCKS)):
        step = module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0, progress=progress)
        assert [len(window) for window in step.windows] == [blocks * foreign.PER_BLOCK]


def test_validation_copies_and_removal_are_plain():
    module, tokens = Windowed(), next(iter(batches(count=1)))[0]
    plain = module.network(tokens[:, :-1]).detach()
    module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)
    with torch.no_grad():
        assert torch.equal(module.network(tokens[:, :-1]), plain)
    copied = copy.deepcopy(module)
    assert torch.equal(copied.network(tokens[:, :-1]), plain)
    module.remove_reco()
    assert torch.equal(module.network(tokens[:, :-1]), plain)


def test_refuses_a_prefix_that_is_not_the_networks():
    module, tokens = Windowed(prefix_tokens=0), next(iter(batches(count=1)))[0]
    wrong = Windowed(prefix_tokens=3)
    with pytest.raises(ValueError, match="prefix_tokens=3"):
        wrong.windowed(wrong.network, tokens[:, :-1], targets=tokens, step=0)
    with pytest.raises(ValueError, match="rows of the window are not those of the targets"):
        module.windowed(module.network, tokens[:, :-1], targets=tokens, step=0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"context": "dropped"}, "context must be 'frozen', 'keys' or 'attached'"),
        ({"continuity_weight": -1.0}, "continuity_weight must be a finite number"),
        ({"prefix_tokens": -1}, "prefix_tokens must be 0 or more"),
        ({"windows_per_batch": 0}, "windows_per_batch must be 1 or more"),
    ],
)
def test_refuses_arguments_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        Windowed(**options)
