# SPDX-License-Identifier: Apache-2.0
"""Cached sampling against loops written out here: whole forwards, no cache, no batch, draws by hand."""

from __future__ import annotations

import random

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.sampling import generate as generation
from reco_lightning.models.sampling.generate import generate, window_start
from reco_lightning.models.transformer import VideoTransformer

BLOCKS, PER_BLOCK, V = 3, 4, 11
GRID = (BLOCKS, 2, 2)
N = BLOCKS * PER_BLOCK


def build(**options):
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=V, grid=GRID, dim=32, depth=2, heads=2, **options)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)  # probabilities far from even
    return network.eval()


def draw(logits, number):
    """The token in whose share of the probability a number falls."""
    reached = 0.0
    shares = logits.double().softmax(-1).tolist()
    for token, share in enumerate(shares):
        reached += share
        if number < reached:
            return token
    return len(shares) - 1


def numbers(seed, index, count):
    generator = torch.Generator().manual_seed(random.Random(f"{seed}:{index}").getrandbits(63))
    return torch.rand(count, generator=generator, dtype=torch.float64).tolist()


@torch.no_grad()
def written_out(
    network, index, *, seed=0, label=None, first=(), given=(), length=BLOCKS, size=N, context=BLOCKS - 1, scale=1.0
):
    """One video, token by token: the blocks that a full window hands on are fed as its first blocks again."""
    video, window = list(first), []
    for token in video:  # tokens that are given fill windows as sampled ones do
        if len(window) == size:
            window = window[-context * PER_BLOCK :]
        window.append(token)
    random_numbers = numbers(seed, index, length * PER_BLOCK - len(video))
    for number in random_numbers:
        if len(window) == size:
            window = window[-context * PER_BLOCK :]
        tokens = torch.tensor([[*given, *window]], dtype=torch.long)
        logits = network(tokens, None if label is None else torch.tensor([label]))[0, -1]
        if scale != 1:
            free = network(tokens, torch.tensor([network.num_classes]))[0, -1]
            logits = free + scale * (logits - free)
        token = draw(logits, number)
        window.append(token)
        video.append(token)
    return video


def test_ids_are_those_of_plain_forwards():
    network = build(num_classes=3)
    labels = [2, 0, 1]
    expected = [written_out(network, index, seed=5, label=label) for index, label in enumerate(labels)]
    assert generate(network, 3, condition=torch.tensor(labels), seed=5).tolist() == expected


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.7, 4.0])
@pytest.mark.parametrize("cache", [True, False])
def test_guidance_goes_from_no_class_towards_the_class(scale, cache):
    network = build(num_classes=3)
    expected = [written_out(network, index, label=1, scale=scale) for index in range(2)]
    assert generate(network, 2, condition=1, cfg_scale=scale, cache=cache).tolist() == expected
    if scale == 0:
        assert expected == [written_out(network, index) for index in range(2)]


def test_a_guidance_of_one_runs_no_further_row():
    network = build(num_classes=3)
    rows = []
    network.register_forward_hook(lambda module, args, output: rows.append(output.clone()))
    plain = generate(network, 2, condition=1)
    own = list(rows)
    rows.clear()
    assert torch.equal(generate(network, 2, condition=1, cfg_scale=1.0), plain)
    assert all(torch.equal(one, other) for one, other in zip(own, rows, strict=True))
    rows.clear()
    generate(network, 2, condition=1, cfg_scale=1.5)
    assert {len(row) for row in rows} == {4}  # one pass of twice the rows
    assert len(rows) == N


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(
    ("options", "label", "m"), [({}, None, 0), ({"num_classes": 3}, 2, 5), ({"start_token": False}, None, 1)], ids=str
)
def test_a_rollout_is_the_loop_over_windows(context, length, options, label, m):
    network = build(**options)
    m = min(m, PER_BLOCK * length - 1)
    first = torch.randint(V, (2, m), generator=torch.Generator().manual_seed(1))
    expected = [
        written_out(network, index, seed=3, label=label, first=first[index].tolist(), length=length, context=context)
        for index in range(2)
    ]
    arguments = {"condition": label, "first_tokens": first, "seed": 3, "length": length, "context_blocks": context}
    assert generate(network, 2, **arguments).tolist() == expected
    assert generate(network, 2, cache=False, **arguments).tolist() == expected
    assert generate(network, 2, batch_size=1, **arguments).tolist() == expected


@pytest.mark.parametrize("length", [None, 2, 7])
def test_fewer_frames_go_on_from_the_last_block(length):
    network = build(num_classes=3)
    options = {"length": length or BLOCKS, "size": 2 * PER_BLOCK, "context": 1}
    expected = [written_out(network, index, label=1, **options) for index in range(2)]
    assert generate(network, 2, condition=1, length=length, window_blocks=2).tolist() == expected
    assert generate(network, 2, condition=1, length=length, window_blocks=2, context_blocks=1).tolist() == expected


def test_a_rollout_with_guidance():
    network = build(num_classes=3)
    expected = written_out(network, 0, label=0, length=5, context=1, scale=2.0)
    assert generate(network, 1, condition=0, cfg_scale=2.0, length=5, context_blocks=1)[0].tolist() == expected


@pytest.mark.parametrize("m", [11, 12, 13, 20, 21, 27])
def test_more_than_a_window_can_be_given(m):
    network = build()
    first = torch.randint(V, (1, m), generator=torch.Generator().manual_seed(2))
    expected = written_out(network, 0, first=first[0].tolist(), length=7, context=1)
    assert generate(network, 1, first_tokens=first, length=7, context_blocks=1)[0].tolist() == expected


def test_a_rollout_keeps_the_beginning_and_forgets_by_default_one_block_at_a_time():
    network = build()
    plain = generate(network, 2)
    assert torch.equal(generate(network, 2, length=6)[:, :N], plain)
    assert torch.equal(generate(network, 2, length=6), generate(network, 2, length=6, context_blocks=2))
    assert not torch.equal(generate(network, 2, length=6), generate(network, 2, length=6, context_blocks=1))


def test_windows_overlap_by_what_is_kept():
    for window, kept in ((12, 4), (12, 8), (5, 1)):
        begins, start = [], 0
        for place in range(60):  # a window that is full hands on what is kept
            if place - start == window:
                start = place - kept
            begins.append(start)
        assert [window_start(place, window, kept) for place in range(60)] == begins


def test_a_long_video_needs_the_memory_of_one_window(monkeypatch):
    network = build()
    seen = []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0].shape[1], kwargs["cache"].keys.numel())), with_kwargs=True
    )
    generate(network, 1, length=3)
    short = set(seen)
    seen.clear()
    generate(network, 1, length=40)
    assert {memory for _, memory in seen} == {memory for _, memory in short}
    assert max(rows for rows, _ in seen) <= N


def test_a_context_is_run_in_pieces(monkeypatch):
    network = build()
    whole = generate(network, 2, length=7)
    rows = []
    network.register_forward_pre_hook(lambda module, args: rows.append(args[0].shape[1]))
    monkeypatch.setattr(generation, "_CHUNK", 3)
    assert torch.equal(generate(network, 2, length=7), whole)
    assert max(rows) == 3


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_compiled_step_gives_the_same_ids_by_one_graph(scale):
    network = build(num_classes=3)
    arguments = {"condition": 1, "cfg_scale": scale, "length": 6, "context_blocks": 1}
    counter = CompileCounter()
    torch._dynamo.reset()
    ids = generate(network, 5, batch_size=2, compile=counter, **arguments)
    assert counter.frame_count == 1  # for all places of all windows of all batches, the last one of which is short
    assert torch.equal(ids, generate(network, 5, batch_size=2, **arguments))
    assert torch.equal(generate(network, 5, batch_size=2, compile=counter, **arguments), ids)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_compiled_step_runs_through_autograd_tracing():
    network = build()
    torch._dynamo.reset()
    assert torch.equal(generate(network, 2, compile="aot_eager"), generate(network, 2))


def text_network():
    torch.manual_seed(0)
    network = LARPTransformer(
        vocab_size=V, video_tokens=8, condition_tokens=5, num_classes=0, dim=32, depth=2, heads=2, token_dropout=0.0
    )
    for parameter in network.parameters():
        parameter.data.normal_(std=0.3) if parameter.ndim > 1 else None
    return network.eval()


def test_ids_in_front_condition_and_are_left_out():
    network = text_network()
    given = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(4))
    ids = generate(network, 3, condition=given)
    expected = [written_out(network, index, given=given[index].tolist(), length=2) for index in range(3)]
    assert ids.tolist() == expected
    assert torch.equal(generate(network, 3, condition=given, cache=False), ids)
    assert torch.equal(generate(network, 3, first_tokens=given)[:, 5:], ids)
    assert len({tuple(row) for row in ids.tolist()}) == 3
    first = ids[:, :3]
    assert torch.equal(generate(network, 3, condition=given, first_tokens=first)[:, :3], first)


@pytest.mark.slow
def test_a_compiled_step_of_another_network():
    network, given = text_network(), torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(4))
    counter = CompileCounter()
    torch._dynamo.reset()
    ids = generate(network, 2, condition=given, compile=counter)
    assert counter.frame_count == 1
    assert torch.equal(ids, generate(network, 2, condition=given))


def test_a_video_depends_on_its_index_alone():
    network = build()
    whole = generate(network, 6, seed=2)
    assert torch.equal(generate(network, 3, seed=2, indices=[5, 1, 4]), whole[[5, 1, 4]])
    assert torch.equal(generate(network, 2, seed=2, indices=torch.tensor([3, 0]), batch_size=1), whole[[3, 0]])


def test_bfloat16_weights_and_autocast():
    network = build()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = generate(network, 2, length=5)
        assert torch.equal(generate(network, 2, length=5), mixed)
    low = network.bfloat16()
    assert low.new_cache(2).keys.dtype == torch.bfloat16
    ids = generate(low, 2, length=5, batch_size=1)
    assert ids.shape == mixed.shape == (2, 5 * PER_BLOCK)
    assert ids.max() < V


def test_every_part_keeps_its_mode():
    network = build(dropout=0.5).train()
    network.blocks[1].eval()
    generate(network, 1)
    assert network.training
    assert network.blocks[0].training
    assert not network.blocks[1].training


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"cfg_scale": -1.0}, r"cfg_scale must be a finite number of 0 or more, got -1\.0"),
        ({}, {"cfg_scale": 2.0}, r"cfg_scale must be 1 where condition gives no class to be guided by, got 2\.0"),
        ({"num_classes": 3}, {"cfg_scale": 2.0}, "cfg_scale must be 1 where condition gives no class"),
        ({}, {"length": 0}, "length must be a whole number of 1 or more or None, got 0"),
        ({}, {"length": 9, "context_blocks": 3}, "context_blocks must be 1 to 2, fewer than .* got 3"),
        ({}, {"length": 9, "context_blocks": 0}, "context_blocks must be a whole number of 1 or more or None, got 0"),
        ({}, {"window_blocks": 4}, "window_blocks must be 1 to the network's 3, or None for 3, got 4"),
        ({}, {"window_blocks": 1}, "length must be 1 for a window of a single frame block, .* got 3"),
        ({}, {"window_blocks": 2, "context_blocks": 2}, "context_blocks must be 1 to 1, fewer than the 2 frame"),
        ({}, {"indices": [1]}, "indices must be n=2 numbers, one for each video, or None, got 1"),
        ({}, {"compile": True, "cache": False}, "compile needs cache=True"),
        ({}, {"condition": torch.zeros(2, 4)}, "condition was given as ids in front of the tokens, which the network"),
        ({}, {"first_tokens": torch.zeros(2, 20, dtype=torch.long), "length": 5}, r"m from 0 to 19, got \(2, 20\)"),
    ],
)
def test_errors(options, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(build(**options), 2, **arguments)


def test_errors_of_other_networks():
    single = VideoTransformer(vocab_size=V, grid=(1, 2, 2), dim=32, depth=1, heads=2)
    with pytest.raises(ValueError, match=r"length must be 1 for a window of a single frame block, .* got 2"):
        generate(single, 1, length=2)
    network = text_network()
    with pytest.raises(
        ValueError, match="length, window_blocks and context_blocks must be None for a network whose tokens lie on no"
    ):
        generate(network, 1, condition=torch.zeros(1, 5), length=2)
    with pytest.raises(ValueError, match=r"condition must be ids of shape \(1, 5\), got \(1, 4\)"):
        generate(network, 1, condition=torch.zeros(1, 4))
