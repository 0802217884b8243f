# SPDX-License-Identifier: Apache-2.0
"""The LightningModule: one step by hand, plain hyperparameters in its checkpoint, labels, decay and errors."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel, weight_decay_groups
from tests.helpers import reference

GRID, N, V, B = (2, 2, 2), 8, 9, 4


def build(*, num_classes=0, start_token=True, **options):
    torch.manual_seed(0)
    network = VideoTransformer(
        vocab_size=V, grid=GRID, dim=16, depth=1, heads=1, num_classes=num_classes, start_token=start_token
    )
    return VideoModel(network, **options)


def batch(size=B):
    generator = torch.Generator().manual_seed(size)
    tokens = torch.randint(V, (size, N), generator=generator)
    return {"tokens": tokens, "label": torch.randint(3, (size,), generator=generator)}


def loader(count=2):
    whole = batch(B * count)
    samples = [{key: value[index] for key, value in whole.items()} for index in range(B * count)]
    return DataLoader(samples, batch_size=B)


def trainer(folder, **options):
    return pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **options},
    )


def loss_by_hand(network, tokens, labels):
    logits, _ = reference.forward(network, tokens[:, :-1], labels)
    targets = tokens if network.prefix else tokens[:, 1:]
    total = sum(
        -logits[sample, row].log_softmax(0)[targets[sample, row]].item()
        for sample in range(len(tokens))
        for row in range(targets.shape[1])
    )
    return total / targets.numel()


@pytest.mark.parametrize("options", [{}, {"num_classes": 3}, {"start_token": False}], ids=["start", "class", "none"])
def test_losses_are_the_cross_entropy_of_every_predicted_token(options):
    model, data = build(**options, label_dropout=0.0), batch()
    model.log = lambda *args, **kwargs: None
    expected = loss_by_hand(model.network, data["tokens"], data["label"] if model.network.num_classes else None)
    for step in (model.training_step, model.validation_step, model.test_step):
        assert step(data, 0).item() == pytest.approx(expected, 1e-5)
    grid = {**data, "tokens": data["tokens"].view(B, *GRID)}
    assert model.training_step(grid, 0).item() == pytest.approx(expected, 1e-5)
    assert model(data["tokens"]).shape == (B, N - 1 + model.network.prefix, V)


def test_a_fitted_step_is_adamw_on_that_loss(tmp_path):
    model, twin = build(learning_rate=1e-2, weight_decay=0.5), build()
    data = loader(count=1)
    trainer(tmp_path).fit(model, data)
    tokens = next(iter(data))["tokens"]
    logits, _ = reference.forward(twin.network, tokens[:, :-1])
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    for (name, after), before in zip(model.named_parameters(), twin.parameters(), strict=True):
        # The first step of AdamW: decay by lr x decay, then lr along the sign of the gradient.
        decay = 0.5 if before.ndim == 2 and "embedding" not in name and "condition" not in name else 0.0
        step = before.grad / (before.grad.abs() + 1e-8)
        clear = before.grad.abs() > 1e-6
        expected = before * (1 - 1e-2 * decay) - 1e-2 * step
        torch.testing.assert_close(after[clear], expected[clear], atol=2e-5, rtol=1e-4, msg=name)


def test_losses_are_logged(tmp_path):
    model, fit = build(), trainer(tmp_path, logger=CSVLogger(tmp_path), log_every_n_steps=1)
    fit.fit(model, loader(), loader())
    assert {"train/loss", "val/loss"} <= fit.logged_metrics.keys()
    (results,) = fit.test(model, loader(), verbose=False)
    expected = sum(loss_by_hand(model.network, part["tokens"], None) for part in loader()) / 2
    assert results["test/loss"] == pytest.approx(expected, 1e-4)


@pytest.mark.parametrize("num_classes", [0, 3])
def test_hyperparameters_are_plain_and_a_checkpoint_loads_safely(tmp_path, num_classes):
    model = build(num_classes=num_classes, learning_rate=3e-4, betas=(0.8, 0.9), warmup_steps=2)
    fit = trainer(tmp_path)
    fit.fit(model, loader())
    path = tmp_path / "model.ckpt"
    fit.save_checkpoint(path)
    stored = torch.load(path, weights_only=True)
    assert stored["hyper_parameters"]["network"] == model.network.config
    assert stored["hyper_parameters"]["learning_rate"] == 3e-4
    assert {name.split(".")[0] for name in stored["state_dict"]} == {"network"}
    again = VideoModel.load_from_checkpoint(path, map_location="cpu")
    assert again.network.config == model.network.config
    assert dict(again.hparams) == dict(model.hparams)
    tokens = batch()["tokens"]
    assert torch.equal(again.eval()(tokens), model.eval()(tokens))
    trainer(tmp_path, max_steps=3).fit(again, loader(), ckpt_path=path)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_label_dropout_hides_classes_in_training_alone(share):
    model, seen = build(num_classes=3, label_dropout=share), []
    model.log = lambda *args, **kwargs: None
    model.network.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[1]))
    data = batch(400)
    torch.manual_seed(0)
    model.training_step(data, 0)
    model.validation_step(data, 0)
    hidden = seen[0] == 3
    assert hidden.float().mean().item() == pytest.approx(share, abs=0.08)
    assert torch.equal(seen[0][~hidden], data["label"][~hidden])
    assert torch.equal(seen[1], data["label"])


def test_labels_are_not_read_without_classes():
    model = build()
    model.log = lambda *args, **kwargs: None
    assert model.training_step({"tokens": batch()["tokens"]}, 0).isfinite()


def test_matrices_decay_and_nothing_else():
    model = build(num_classes=3)
    decayed, kept = weight_decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert [names[id(parameter)] for parameter in decayed["params"]] == [
        "network.blocks.0.attention.qkv.weight",
        "network.blocks.0.attention.out.weight",
        "network.blocks.0.gate_up.weight",
        "network.blocks.0.down.weight",
        "network.head.weight",
    ]
    assert [names[id(parameter)] for parameter in kept["params"]] == [
        "network.embedding.weight",
        "network.condition.weight",
        "network.blocks.0.attention_norm.weight",
        "network.blocks.0.feed_forward_norm.weight",
        "network.norm.weight",
    ]


def test_biases_do_not_decay_and_frozen_weights_are_left_out():
    layers = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    layers[1].requires_grad_(False)
    decayed, kept = weight_decay_groups(layers, 0.1)
    assert [list(decayed["params"]), list(kept["params"])] == [[layers[0].weight], [layers[0].bias]]


def test_the_learning_rate_rises_over_the_warm_up_and_stays():
    configured = build(learning_rate=0.1, warmup_steps=4).configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    assert configured["lr_scheduler"]["interval"] == "step"
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1, 0.1])
    assert "lr_scheduler" not in build().configure_optimizers()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.0}, r"learning_rate must be a finite number above 0, got 0\.0"),
        ({"weight_decay": -0.1}, r"weight_decay must be a finite number of 0 or more, got -0\.1"),
        ({"warmup_steps": -1}, "warmup_steps must be a whole number of 0 or more, got -1"),
        ({"label_dropout": 1.0}, r"label_dropout must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("step", ["training_step", "validation_step"])
def test_a_batch_of_another_grid_is_refused(step):
    message = r"must hold 8 tokens a sample, the grid \(2, 2, 2\); got 6: the shards were made for another grid"
    with pytest.raises(ValueError, match=message):
        getattr(build(), step)({"tokens": torch.zeros(2, 6, dtype=torch.long)}, 0)
