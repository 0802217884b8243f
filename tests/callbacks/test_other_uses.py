# SPDX-License-Identifier: Apache-2.0
"""What a step makes of states and logits besides the loss: refused, or kept out of the log, never a wrong number."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torchmetrics import MaxMetric, MeanMetric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from reco_lightning import ReCoCallback, WindowSampler
from tests.callbacks.test_foreign_steps import Module, build
from tests.helpers.foreign import BLOCKS, DIM, PER_BLOCK, VOCAB, batches, trainer

LAST = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=2, first_window_prob=1e-9, seed=1)


class WithLogits(Module):
    """Calls ``use`` on the states and the logits, and returns its result."""

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        states = self.states(ids)
        logits = self.head(states)
        return self.use(states, logits, ids, F.cross_entropy(logits.flatten(0, 1), ids.flatten()))


def of(use, **attributes):
    """A module whose step returns what ``use`` makes of states, logits, ids and loss."""

    class Made(WithLogits):
        def __init__(self):
            super().__init__()
            for name, make in attributes.items():
                setattr(self, name, make())

    Made.use = use
    return build(Made)


def fit(module, **options):
    run = trainer(ReCoCallback(LAST, **options), max_epochs=1)
    run.fit(module, batches(count=3))
    return run


def reward(self, states, logits, ids, loss):
    return loss + self.reward(states).square().mean()


def last_row(self, states, logits, ids, loss):
    return loss + self.reward(states[:, -1]).mean()


def norm(self, states, logits, ids, loss):
    return loss + 1e-3 * states.norm(dim=-1).mean()


def z_loss(self, states, logits, ids, loss):
    return loss + 1e-4 * logits.logsumexp(-1).square().mean()


def entropy(self, states, logits, ids, loss):
    return {"loss": loss - 0.1 * torch.distributions.Categorical(logits=logits.float()).entropy().mean()}


def distance_to_a_teacher(self, states, logits, ids, loss):
    with torch.no_grad():
        teacher = torch.randn_like(logits)
    return loss + F.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")


@pytest.mark.parametrize(
    ("use", "names"),
    [
        (reward, r"linear, square, mean, add \(modules .*'reward'"),
        (last_row, "linear, mean, add"),
        (norm, "norm, mean, mul, add"),
        (z_loss, "logsumexp, square, mean"),
        (entropy, "logsumexp"),
        (distance_to_a_teacher, "log_softmax, kl_div"),
    ],
)
def test_another_loss_on_states_or_logits_is_refused_by_name_before_a_weight_changes(use, names):
    module = of(use, reward=lambda: nn.Linear(DIM, 1))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(MisconfigurationException, match=rf"besides the cross-entropy of the head 'head', by .*{names}"):
        fit(module)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_loss_on_what_is_no_state_stays():
    """A penalty on weights, and a loss on the embeddings, which are those of all rows."""

    class Penalised(Module):
        def training_step(self, batch, batch_idx):
            penalty = self.ids.weight.square().mean() + self.embed(batch[0]).square().mean()
            return super().training_step(batch, batch_idx) + penalty

    assert "reco/cross_entropy" in fit(build(Penalised)).callback_metrics


class Rows(Module):
    """A loss that ``combine`` makes of the rows' own, and their targets."""

    def training_step(self, batch, batch_idx):
        (ids,) = batch
        logits = self.head(self.states(ids))
        return self.combine(F.cross_entropy(logits.transpose(1, 2), ids, reduction="none"), ids)


def combined(combine):
    return build(type("Combined", (Rows,), {"combine": staticmethod(combine)}))


@pytest.mark.parametrize(
    "combine",
    [
        lambda losses, ids: ((1 - (-losses).exp()) ** 2 * losses).mean(),
        lambda losses, ids: losses.flatten().topk(10).values.mean(),
        lambda losses, ids: losses[losses > losses.mean()].mean(),
        lambda losses, ids: losses.clamp(max=2.5).mean(),
        lambda losses, ids: losses.mean().exp(),
        lambda losses, ids: losses.mean(dim=1).max(),
    ],
    ids=["focal", "hardest rows", "mask", "clamp", "perplexity", "hardest sample"],
)
def test_losses_that_are_no_weighted_sum_of_the_rows_are_refused(combine):
    with pytest.raises(MisconfigurationException, match="no weighted sum of the losses"):
        fit(combined(combine))


@pytest.mark.parametrize(
    "combine",
    [
        lambda losses, ids: losses.mean(),
        lambda losses, ids: losses.sum() / ids.numel(),
        lambda losses, ids: (losses * torch.linspace(0.5, 2, ids.shape[1])).mean() + 1.0,
        lambda losses, ids: losses[ids > 3].sum() / ids.numel(),
        lambda losses, ids: {"loss": losses.mean(dim=1).mean()},
    ],
    ids=["mean", "sum", "weights", "mask of targets", "dictionary"],
)
def test_weighted_sums_of_the_rows_are_served(combine):
    assert "reco/cross_entropy" in fit(combined(combine)).callback_metrics


@pytest.mark.parametrize(
    "guard",
    [
        lambda logits: logits.isnan().any(),
        lambda logits: not torch.isfinite(logits.float().sum()),
        lambda logits: bool((logits != logits).sum() > 0),
    ],
)
@pytest.mark.parametrize("chunked", [True, False])
def test_a_guard_that_skips_every_window_is_refused(guard, chunked):
    def use(self, states, logits, ids, loss):
        return None if guard(logits) else loss

    with pytest.raises(MisconfigurationException, match="returned a loss, and None when it was run on a window"):
        fit(of(use), chunked_loss=chunked)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_steps_without_a_loss_are_no_windows_of_the_log():
    def use(self, states, logits, ids, loss):
        self.steps = getattr(self, "steps", 0) + 1
        return loss if self.steps == 1 else None

    module = of(use)
    run = trainer(ReCoCallback(LAST), max_epochs=1)
    seen = []
    module.on_train_batch_end = lambda *_: seen.append(run.callback_metrics.get("reco/cross_entropy"))
    run.fit(module, batches(count=3))
    assert len({float(value) for value in seen}) == 1


def accuracy(logits, ids):
    return (logits.argmax(-1) == ids).float().mean()


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize(
    "cast", [lambda logits: logits, lambda logits: logits.detach().float()], ids=["itself", "copy"]
)
def test_what_is_logged_of_the_logits_is_left_out_and_said_once(cast, chunked, recwarn):
    def use(self, states, logits, ids, loss):
        self.log("train/acc", accuracy(cast(logits), ids))
        self.log_dict({"train/entropy": cast(logits).softmax(-1).max(), "train/loss": loss, "lr": 0.1})
        self.metric(accuracy(cast(logits), ids))
        self.log("train/metric", self.metric)
        self.accuracies(cast(logits).transpose(1, 2), ids)
        self.log("train/accuracies", self.accuracies)
        self.number = float(accuracy(cast(logits), ids))
        self.other = accuracy(cast(logits), ids).item()
        return loss

    module = of(use, metric=MeanMetric, accuracies=lambda: MulticlassAccuracy(VOCAB))
    run = fit(module, chunked_loss=chunked)
    assert {"train/loss", "lr", "reco/cross_entropy"} <= set(run.callback_metrics)
    assert not {"train/acc", "train/entropy", "train/metric", "train/accuracies"} & set(run.callback_metrics)
    assert math.isnan(module.number)
    assert math.isnan(module.other)
    said = [str(one.message) for one in recwarn if "left out of the log" in str(one.message)]
    assert len(said) == 4
    assert any("'train/acc'" in text and "argmax, eq, mean" in text for text in said)
    assert set(vars(module)) & {"log", "log_dict"} == set()


def test_logged_values_of_other_things_are_left_alone():
    def use(self, states, logits, ids, loss):
        self.log(name="ids", value=ids.float().mean())
        self.log_dict(dictionary={"perplexity": loss.detach().exp()}, prog_bar=True)
        return loss

    run = fit(of(use))
    assert run.callback_metrics["perplexity"] > 1
    assert run.callback_metrics["ids"] > 0


@pytest.mark.filterwarnings("ignore:.*left out of the log")
@pytest.mark.parametrize("of_logits", [False, True])
def test_a_collection_of_metrics_is_logged_whole_or_without_what_is_of_the_logits(of_logits):
    def use(self, states, logits, ids, loss):
        values = logits.argmax(-1) if of_logits else ids
        self.metrics.update(values.float())
        self.log_dict(self.metrics, on_step=False, on_epoch=True)
        return loss

    run = fit(of(use, metrics=lambda: MetricCollection({"mean": MeanMetric(), "largest": MaxMetric()})))
    assert ("mean" in run.callback_metrics) == ("largest" in run.callback_metrics) == (not of_logits)


def test_a_whole_window_has_all_logits():
    def use(self, states, logits, ids, loss):
        self.log("train/acc", accuracy(logits, ids))
        return loss

    module = of(use)
    whole = ReCoCallback(WindowSampler(BLOCKS, PER_BLOCK, window_blocks=BLOCKS), chunked_loss=False)
    run = trainer(whole, max_epochs=1)
    with pytest.warns(UserWarning, match="left out of the log"):  # known from the first batch, on all windows alike
        run.fit(module, batches(count=2))
