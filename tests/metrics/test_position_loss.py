# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy by position: hand-made logits, a network run prefix by prefix, and samples of its own."""

from __future__ import annotations

import json
import math

import pytest
import torch

from reco_lightning.metrics.own_samples import generated_batches
from reco_lightning.metrics.position_loss import (
    PositionLoss,
    measure_position_loss,
    position_loss,
)
from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel
from tests.helpers.metrics import joined

GRID, N, V = (3, 2, 1), 6, 5


def certain(probabilities, targets):
    """Logits that give each target a probability and the rest to the others evenly, (B, N, V)."""
    p = torch.tensor(probabilities, dtype=torch.float64)
    others = ((1 - p) / (V - 1))[..., None].repeat(1, 1, V)
    return others.scatter(2, targets[..., None], p[..., None]).log()


def build(**options):
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=V, grid=GRID, dim=32, depth=2, heads=2, **options)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # probabilities far from even
    return network


def batches(*sizes, classes=0, seed=1):
    generator = torch.Generator().manual_seed(seed)
    made = [{"tokens": torch.randint(V, (size, *GRID), generator=generator)} for size in sizes]
    if classes:
        made = [b | {"label": torch.arange(len(b["tokens"])) % classes} for b in made]
    return made


def by_prefix(network, tokens, labels=None):
    """Losses of single tokens, each from a run that ends before it."""
    tokens = tokens.flatten(1)
    losses = torch.full(tokens.shape, float("nan"), dtype=torch.float64)
    for place in range(1 - network.prefix, N):
        logits = network(tokens[:, :place], labels)[:, -1].double()
        losses[:, place] = -logits.log_softmax(-1).gather(1, tokens[:, place, None])[:, 0]
    return losses


TARGETS = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 4]])
PROBABILITIES = [[0.5, 0.25, 0.1, 0.9, 0.2, 0.2], [0.5, 0.5, 0.4, 0.3, 0.2, 0.7]]


def test_hand_made_logits():
    metric = PositionLoss(6, 2)
    for row in range(2):
        metric.update(certain(PROBABILITIES[row : row + 1], TARGETS[row : row + 1]), TARGETS[row : row + 1])
    found = metric.compute()
    expected = [-(math.log(a) + math.log(b)) / 2 for a, b in zip(*PROBABILITIES, strict=True)]
    assert found["position"].dtype == torch.float64
    assert found["position"].tolist() == pytest.approx(expected, rel=1e-6)
    assert found["block"].tolist() == pytest.approx([sum(expected[k : k + 2]) / 2 for k in (0, 2, 4)], rel=1e-6)
    assert found["mean"].item() == pytest.approx(sum(expected) / 6, rel=1e-6)


def test_even_logits_cost_the_logarithm_of_the_vocabulary():
    losses = position_loss(torch.zeros(2, 3, V, dtype=torch.bfloat16), torch.zeros(2, 3, dtype=torch.long))
    assert losses.dtype == torch.float32
    assert losses.flatten().tolist() == pytest.approx([math.log(V)] * 6)


def test_tokens_that_do_not_count_count_nowhere():
    targets = TARGETS.clone()
    targets[0, :2] = targets[:, 5] = -100
    metric = PositionLoss(6, 2)
    metric.update(certain(PROBABILITIES, TARGETS), targets)
    found = metric.compute()
    assert found["position"][:2].tolist() == pytest.approx([math.log(2)] * 2)
    assert math.isnan(found["position"][5])
    assert found["block"][2].item() == pytest.approx(-math.log(0.2))
    counted = [0.5, 0.5, 0.1, 0.4, 0.9, 0.3, 0.2, 0.2]
    assert found["mean"].item() == pytest.approx(-sum(map(math.log, counted)) / 8)


def test_fewer_rows_belong_to_the_last_tokens():
    metric = PositionLoss(6, 2)
    metric.update(certain(PROBABILITIES, TARGETS)[:, 1:], TARGETS[:, 1:])
    found = metric.compute()["position"]
    assert math.isnan(found[0])
    assert found[5].item() == pytest.approx(-(math.log(0.2) + math.log(0.7)) / 2)
    _, ax = metric.plot()
    means = [line.get_ydata()[0] for line in ax.lines[1:4]]
    assert means[0] == pytest.approx(found[1].item())  # of the one token of block 0 that is predicted


def test_two_processes_give_what_one_gives():
    logits, targets = torch.randn(5, 6, V), torch.randint(V, (5, 6))
    one, first, second = (PositionLoss(6, 2) for _ in range(3))
    one.update(logits, targets)
    first.update(logits[:4], targets[:4])
    second.update(logits[4:], targets[4:])
    expected, found = one.compute(), joined(first, second)
    assert all(torch.allclose(found[name], expected[name], rtol=1e-12) for name in expected)


@pytest.mark.parametrize(
    ("options", "classes"),
    [({}, 0), ({"num_classes": 3}, 3), ({"start_token": False}, 0)],
    ids=["start", "class", "none"],
)
def test_a_network_is_measured_as_its_prefixes_say(options, classes):
    network = build(**options)
    data = batches(3, 2, classes=classes)
    metric = measure_position_loss(network, data)
    losses = torch.cat([by_prefix(network, batch["tokens"], batch.get("label")) for batch in data])
    torch.testing.assert_close(metric.compute()["position"], losses.mean(0), rtol=1e-5, atol=1e-6, equal_nan=True)
    record = metric.record()
    assert (record["clips"], record["tokens_per_block"]) == (5, 2)
    assert (record["value"]["position"][0] is None) == (network.prefix == 0)
    assert record["value"]["mean"] == metric.compute()["mean"].item()
    json.dumps(record, allow_nan=False)


def test_the_mode_and_the_random_numbers_stay_and_dropout_is_off():
    network = build(dropout=0.5)
    model = VideoModel(network)
    model.train()
    state = torch.get_rng_state()
    first = measure_position_loss(model, batches(4)).compute()["position"]
    assert network.training
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(measure_position_loss(network.eval(), batches(4)).compute()["position"], first)
    assert not network.training


def test_an_own_metric_is_added_to():
    network = build()
    metric = PositionLoss(6, 3)
    assert measure_position_loss(network, batches(2), metric=metric) is metric
    measure_position_loss(network, batches(1), metric=metric)
    assert metric.counts.tolist() == [3] * 6
    assert metric.compute()["block"].shape == (2,)


def test_generated_batches_are_samples_under_the_same_labels():
    network = build(num_classes=3)
    data = batches(3, 3, classes=3)
    made = list(generated_batches(network, data, seed=5))
    assert [batch["label"].tolist() for batch in made] == [[0, 1, 2]] * 2
    assert all(batch["tokens"].shape == (3, N) for batch in made)
    assert not torch.equal(made[0]["tokens"], made[1]["tokens"])
    again = list(generated_batches(VideoModel(network), data, seed=5))
    assert all(torch.equal(a["tokens"], b["tokens"]) for a, b in zip(made, again, strict=True))
    assert not torch.equal(next(generated_batches(network, data, seed=6))["tokens"], made[0]["tokens"])
    greedy = next(generated_batches(network, data, temperature=0.0))["tokens"]
    assert torch.equal(greedy, generate(network, 3, condition=data[0]["label"], temperature=0.0))
    joint = {name: torch.cat([batch[name] for batch in data]) for name in data[0]}
    one = next(generated_batches(network, [joint], seed=5))["tokens"]
    assert torch.equal(one, torch.cat([batch["tokens"] for batch in made]))  # batches may be of any size
    late = next(generated_batches(network, data[1:], seed=5, first_index=3))["tokens"]
    assert torch.equal(late, made[1]["tokens"])


def test_a_true_first_frame_stays_and_the_rest_follows_from_it():
    network = build()
    data = batches(4)
    true = data[0]["tokens"].flatten(1)
    made = next(generated_batches(network, data, given_blocks=1, temperature=0.0))["tokens"]
    assert torch.equal(made[:, :2], true[:, :2])
    assert torch.equal(made, generate(network, 4, first_tokens=true[:, :2], temperature=0.0))
    assert torch.equal(next(generated_batches(network, data, given_blocks=2))["tokens"][:, :4], true[:, :4])


def test_without_a_start_token_the_first_token_is_given():
    data = batches(4)
    made = next(generated_batches(build(start_token=False), data))["tokens"]
    assert torch.equal(made[:, 0], data[0]["tokens"].flatten(1)[:, 0])


def test_the_loss_on_own_samples_is_the_entropy_of_the_model():
    network = build()
    network.head.weight.data.mul_(4)
    made = generated_batches(network, batches(400), seed=2)
    found = measure_position_loss(network, made).compute()["position"][0].item()
    probabilities = network(torch.zeros(1, 0, dtype=torch.long))[0, 0].double().softmax(-1)
    entropy = -(probabilities * probabilities.log()).sum().item()
    assert found == pytest.approx(entropy, abs=0.1)
    assert entropy < math.log(V) - 0.2


def test_ids_of_a_condition_stand_in_front_and_do_not_count():
    torch.manual_seed(0)
    network = LARPTransformer(vocab_size=V, video_tokens=4, condition_tokens=3, num_classes=0, dim=32, depth=1, heads=2)
    torch.nn.init.normal_(network.output.weight)
    data = [{"tokens": torch.randint(V, (5, 7))}]
    metric = measure_position_loss(network, data)
    with torch.no_grad():
        rows = network.eval()(data[0]["tokens"][:, :-1]).log_softmax(-1)
    expected = -rows.gather(2, data[0]["tokens"][:, 3:, None]).mean((0, 2))
    torch.testing.assert_close(metric.compute()["position"].float(), expected)
    assert (metric.num_tokens, metric.tokens_per_block) == (4, 4)
    made = next(generated_batches(network, data, temperature=0.0))["tokens"]
    assert torch.equal(made[:, :3], data[0]["tokens"][:, :3])
    assert torch.equal(made[:, 3], network(made[:, :3])[:, -1].argmax(-1))
    with pytest.raises(ValueError, match="given_blocks must lie from 0 to 0 for a network with 1 frame blocks, got 1"):
        next(generated_batches(network, data, given_blocks=1))


def test_several_curves_in_one_figure():
    network = build()
    curves = {name: measure_position_loss(network, batches(2, seed=s)).compute() for s, name in enumerate("ab")}
    fig, ax = PositionLoss(6, 2).plot(curves)
    assert fig is ax.figure
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a (mean of block)", "b (mean of block)"]
    assert [text.get_text() for text in ax.texts] == ["block 0", "block 1", "block 2"]
    assert ax.get_ylabel() == "cross-entropy (nats)"


def test_refusals():
    with pytest.raises(
        ValueError, match=r"num_tokens must be whole frame blocks .* got num_tokens=5 and tokens_per_bl"
    ):
        PositionLoss(5, 2)
    with pytest.raises(
        ValueError, match=r"logits must be \(B, N, V\) and targets \(B, N\), got \(2, 3, 5\) and \(2, 4"
    ):
        position_loss(torch.zeros(2, 3, V), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="logits must have 6 rows or less a sample, got 7"):
        PositionLoss(6, 2).update(torch.zeros(1, 7, V), torch.zeros(1, 7, dtype=torch.long))
    with pytest.raises(ValueError, match=r"must hold 6 tokens a sample, the grid \(3, 2, 1\); got 4"):
        measure_position_loss(build(), [{"tokens": torch.zeros(1, 4, dtype=torch.long)}])
    with pytest.raises(ValueError, match="given_blocks must lie from 0 to 2 for a network with 3 frame blocks, got 3"):
        next(generated_batches(build(), batches(1), given_blocks=3))
