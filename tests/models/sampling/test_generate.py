# SPDX-License-Identifier: Apache-2.0
"""Sampling: the same ids with and without a cache, filters against brute force, draws with the right probabilities."""

from __future__ import annotations

import pytest
import torch

from reco_lightning.models.sampling.generate import generate
from reco_lightning.models.sampling.token_sampling import sample_token
from reco_lightning.models.transformer import VideoTransformer
from reco_lightning.models.video_model import VideoModel

GRID, N, V = (3, 2, 2), 12, 11
SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "cold": {"temperature": 0.5},
    "top_k": {"top_k": 3},
    "top_p": {"top_p": 0.7},
    "all": {"temperature": 1.5, "top_k": 6, "top_p": 0.9},
}


def build(**options):
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=V, grid=GRID, dim=32, depth=2, heads=2, **options)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # probabilities far from even
    return network


def first_tokens(n, m):
    return torch.randint(V, (n, m), generator=torch.Generator().manual_seed(3))


KINDS = {
    "start": ({}, {}),
    "class": ({"num_classes": 3}, {"condition": torch.tensor([0, 1, 2, 0, 1])}),
    "none": ({"start_token": False}, {"first_tokens": first_tokens(5, 1)}),
    "continued": ({"num_classes": 3}, {"condition": 1, "first_tokens": first_tokens(5, 4)}),
    "continued none": ({"start_token": False}, {"first_tokens": first_tokens(5, 4)}),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_and_the_batch_size_change_no_id(kind, setting):
    options, arguments = KINDS[kind]
    network = build(**options)
    arguments = arguments | SETTINGS[setting]
    ids = generate(network, 5, seed=4, **arguments)
    assert ids.shape == (5, N)
    assert ids.dtype == torch.int64
    assert 0 <= ids.min() <= ids.max() < V
    assert torch.equal(generate(network, 5, seed=4, cache=False, **arguments), ids)
    assert torch.equal(generate(network, 5, seed=4, batch_size=2, **arguments), ids)
    begun = arguments.get("first_tokens")
    assert begun is None or torch.equal(ids[:, : begun.shape[1]], begun)


def test_the_seed_decides():
    network = build()
    ids = generate(network, 4, seed=1)
    torch.manual_seed(99)  # torch's own generator does not enter
    state = torch.get_rng_state()
    assert torch.equal(generate(network, 4, seed=1), ids)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(generate(network, 4, seed=2), ids)
    assert torch.equal(generate(network, 7, seed=1)[:4], ids)
    assert len({tuple(video) for video in ids.tolist()}) == 4


def test_greedy_is_the_argmax_of_the_plain_forward():
    network = build()
    tokens = torch.zeros(2, 0, dtype=torch.long)
    for _ in range(N):
        tokens = torch.cat([tokens, network(tokens)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(network, 2, temperature=0.0), tokens)


def test_a_class_for_all_is_that_class_for_each():
    network = build(num_classes=3)
    one = generate(network, 3, condition=2)
    assert torch.equal(generate(network, 3, condition=torch.tensor([2, 2, 2])), one)
    assert torch.equal(generate(network, 3, condition=torch.tensor([0, 1, 2]))[2], one[2])
    assert not torch.equal(generate(network, 3), one)


def test_the_module_and_its_network_sample_alike_and_keep_their_mode():
    network = build(dropout=0.5)
    model = VideoModel(network)
    model.train()
    ids = generate(model, 2)
    assert torch.equal(ids, generate(network, 2))
    assert network.training
    assert model.training
    model.eval()
    assert torch.equal(generate(model, 2), ids)
    assert not network.training


def test_progress_counts_tokens():
    seen = []
    generate(build(), 3, batch_size=2, first_tokens=first_tokens(3, 10), progress=lambda *done: seen.append(done))
    assert seen == [(2, 6), (4, 6), (5, 6), (6, 6)]


def brute_force(logits, *, temperature=1.0, top_k=None, top_p=None):
    """Probabilities of a row, token by token."""
    weights = (logits.double() / temperature).softmax(0).tolist()
    order = sorted(range(V), key=lambda index: -weights[index])[:top_k]
    total, kept, reached = sum(weights[index] for index in order), [], 0.0
    for index in order:
        if top_p is not None and reached >= top_p:
            break
        kept.append(index)
        reached += weights[index] / total
    total = sum(weights[index] for index in kept)
    return torch.tensor([weights[index] / total if index in kept else 0 for index in range(V)])


FILTERS = [
    {},
    {"top_k": 1},
    {"top_k": 4},
    {"top_k": V + 5},
    {"top_p": 0.05},
    {"top_p": 0.6},
    {"top_p": 1.0},
    {"top_k": 5, "top_p": 0.8},
    {"temperature": 0.3},
    {"temperature": 2.0, "top_k": 3, "top_p": 0.99},
]


@pytest.mark.parametrize("options", FILTERS, ids=str)
def test_evenly_spread_draws_hit_each_token_by_its_probability(options):
    logits = 2 * torch.randn(3, V, generator=torch.Generator().manual_seed(6))
    draws = 2000
    uniform = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    for row in logits:
        expected = brute_force(row, **options)
        ids = sample_token(row.expand(draws, V), uniform=uniform, **options)
        found = torch.bincount(ids, minlength=V) / draws
        assert ((found > 0) <= (expected > 0)).all()
        torch.testing.assert_close(found, expected, atol=1.5 / draws, rtol=0)
        assert torch.equal(ids, ids.sort().values)  # in the order of the ids


def test_the_ends_of_the_draw_hit_no_excluded_token():
    logits = torch.tensor([[0.0, 3.0, 2.0, 0.0]]).expand(2, 4)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert sample_token(logits, top_k=2, uniform=uniform).tolist() == [1, 2]


def test_a_zero_temperature_needs_no_draw():
    state = torch.get_rng_state()
    assert sample_token(torch.tensor([[0.0, 5.0], [2.0, 1.0]]), temperature=0).tolist() == [1, 0]
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_stay_as_they_are():
    logits = torch.randn(2, V)
    before = logits.clone()
    sample_token(logits, top_k=2, top_p=0.5)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"n": 0}, "n must be a whole number of 1 or more, got 0"),
        ({}, {"temperature": -1.0}, r"temperature must be a finite number of 0 or more, got -1\.0"),
        ({}, {"top_k": 0}, "top_k must be a whole number of 1 or more or None, got 0"),
        ({}, {"top_p": 0.0}, r"top_p must lie in \(0, 1\], or be None for all tokens, got 0\.0"),
        ({}, {"top_p": 1.5}, r"top_p must lie in \(0, 1\], .* got 1\.5"),
        ({}, {"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({}, {"condition": 0}, "condition was given for an unconditional network; pass None, or train one with"),
        ({"num_classes": 3}, {"condition": 3}, "condition must be a class from 0 to 2, or 2 of them, got 3"),
        ({"num_classes": 3}, {"condition": torch.tensor([0])}, "condition must be a class from 0 to 2, or 2 of them"),
        ({"start_token": False}, {}, "no start token, so first_tokens must give at least one token a video; got None"),
        ({"start_token": False}, {"first_tokens": first_tokens(2, 0)}, r"m from 1 to 11, got \(2, 0\)"),
        ({}, {"first_tokens": first_tokens(3, 2)}, r"first_tokens must be \(n, m\) with n=2 and m from 0 to 11"),
        ({}, {"first_tokens": first_tokens(2, N)}, r"m from 0 to 11, got \(2, 12\)"),
        ({}, {"first_tokens": torch.zeros(2, dtype=torch.long)}, r"m from 0 to 11, got \(2,\)"),
    ],
)
def test_errors(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(build(**options), **{"n": 2, **arguments})
