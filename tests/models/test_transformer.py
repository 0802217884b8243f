# SPDX-License-Identifier: Apache-2.0
"""The reference network: its sizes, its causality, its positions, its cache, and its forward written out."""

from __future__ import annotations

import pytest
import torch

from reco_lightning.models.transformer import (
    SIZES,
    KeyValueCache,
    VideoTransformer,
    rotary_table,
    rotate,
    token_places,
)
from tests.helpers import reference

GRID, N, V = (3, 2, 2), 12, 11
KINDS = {"class": {"num_classes": 3}, "start": {}, "none": {"start_token": False}}


def build(kind="start", *, dtype=torch.float32, **options):
    torch.manual_seed(0)
    arguments = {"vocab_size": V, "grid": GRID, "dim": 32, "depth": 2, "heads": 2, **KINDS[kind], **options}
    network = VideoTransformer(**arguments).to(dtype)
    for parameter in network.parameters():
        parameter.data.mul_(4 if parameter.ndim > 1 else 1)  # attention far from uniform, so that mistakes show
    return network


def inputs(kind):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(V, (4, N), generator=generator)
    return tokens, torch.tensor([0, 1, 2, 3]) if kind == "class" else None


@pytest.mark.parametrize(("name", "count"), [("110m", 110_888_448), ("343m", 342_910_976), ("770m", 774_699_520)])
def test_the_papers_sizes(name, count):
    with torch.device("meta"):
        network = VideoTransformer.from_name(name, vocab_size=16384, grid=(5, 32, 32), num_classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert {key: network.config[key] for key in SIZES[name]} == SIZES[name]


@pytest.mark.parametrize("kind", KINDS)
def test_the_forward_is_that_written_out(kind):
    network, (tokens, labels) = build(kind, dtype=torch.float64), inputs(kind)
    own = network(tokens, labels)
    assert own.shape == (4, N + network.prefix, V)
    torch.testing.assert_close(own, reference.forward(network, tokens, labels)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_no_row_sees_a_later_token(kind):
    network, (tokens, labels) = build(kind), inputs(kind)
    plain = network(tokens, labels)
    for changed in range(N):
        other = tokens.clone()
        other[:, changed] = (other[:, changed] + 1) % V
        difference = (network(other, labels) - plain).abs().amax(dim=(0, 2))
        row = changed + network.prefix
        assert not difference[:row].any()
        assert difference[row:].all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_shorter_input_gives_the_same_rows(kind):
    network, (tokens, labels) = build(kind), inputs(kind)
    plain = network(tokens, labels)
    for length in (1, 5, N - 1):
        torch.testing.assert_close(network(tokens[:, :length], labels), plain[:, : length + network.prefix])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [[1] * N, [N], [3, 1, 5, 3], [2, 10]], ids=str)
def test_cached_steps_equal_the_full_forward(kind, steps):
    network, (tokens, labels) = build(kind).eval(), inputs(kind)
    plain = network(tokens, labels)
    cache, parts, begin = network.new_cache(4), [], 0
    for step in steps:
        start = begin + network.prefix if begin else 0
        parts.append(network(tokens[:, begin : begin + step], labels if not begin else None, cache=cache, start=start))
        begin += step
    torch.testing.assert_close(torch.cat(parts, dim=1), plain)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_start_without_a_known_value_gives_the_same_rows(kind):
    network, (tokens, labels) = build(kind).eval(), inputs(kind)
    plain = network(tokens, labels)
    cache, first = network.new_cache(4), 2 + network.prefix
    cache.keys.fill_(7)  # what lies behind the rows that were run is not looked at
    parts = [network(tokens[:, :2], labels, cache=cache)]
    parts.append(network(tokens[:, 2:3], cache=cache, start=torch.tensor(first)))
    separate = KeyValueCache(tuple(cache.keys.clone()), tuple(cache.values.clone()))  # one tensor a block
    parts.append(network(tokens[:, 3:], cache=separate, start=torch.tensor(first + 1)))
    torch.testing.assert_close(torch.cat(parts, dim=1), plain)


def test_a_cache_has_the_weights_type_and_the_sequences_length():
    cache = build("class", dtype=torch.bfloat16).new_cache(3)
    assert cache.keys.shape == cache.values.shape == (2, 3, 2, N + 1, 16)
    assert cache.keys.dtype == torch.bfloat16


def test_cached_steps_run_under_autocast():
    network, (tokens, _) = build().eval(), inputs("start")
    cache = network.new_cache(4)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = network(tokens)
        first = network(tokens[:, :6], cache=cache)
        second = network(tokens[:, 6:], cache=cache, start=7)
    torch.testing.assert_close(torch.cat([first, second], dim=1), plain, atol=0.1, rtol=0.1)


def test_no_labels_are_the_class_none():
    network, (tokens, _) = build("class"), inputs("class")
    assert torch.equal(network(tokens), network(tokens, torch.full((4,), 3)))
    assert not torch.equal(network(tokens), network(tokens, torch.zeros(4, dtype=torch.long)))


def test_places_run_by_time_then_rows_then_columns():
    places = token_places((2, 2, 3)).tolist()
    assert places == [[-1, -1, -1], *([t, y, x] for t in range(2) for y in range(2) for x in range(3))]


@pytest.mark.parametrize("kind", ["start", "none"])
def test_a_key_is_turned_by_its_place_and_a_query_by_the_one_it_predicts(kind):
    network = build(kind)
    table = rotary_table(token_places(GRID), 16)
    holds = range(0 if kind == "start" else 1, N + 1)
    for row, place in enumerate(holds):
        assert torch.equal(network.key_table[row], table[place])
        assert torch.equal(network.query_table[row], table[min(place + 1, N)])


@pytest.mark.parametrize("head_dim", [6, 16, 32, 64])
def test_a_rotary_table_has_all_axes(head_dim):
    table = rotary_table(torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]), head_dim)
    assert table.shape == (4, 2, head_dim // 2)
    torch.testing.assert_close(table.square().sum(dim=1), torch.ones(4, head_dim // 2))
    turned = table[1:, 1] != 0  # which pairs each axis turns
    assert turned.sum(dim=0).eq(1).all()
    time, rows, columns = turned.sum(dim=1).tolist()
    assert rows == columns
    assert time + rows + columns == head_dim // 2
    assert min(time, rows) >= 1


def test_turned_products_depend_on_the_difference_of_places_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 1, 1, 1, 16, generator=generator)

    def product(one, other):
        tables = rotary_table(torch.tensor([one, other]), 16)
        return (rotate(query, tables[:1]) * rotate(key, tables[1:])).sum()

    torch.testing.assert_close(product([0, 0, 0], [1, 2, 3]), product([4, 1, 2], [5, 3, 5]))
    assert (product([0, 0, 0], [1, 2, 3]) - product([0, 0, 0], [1, 3, 2])).abs() > 1e-3
    assert rotate(query.bfloat16(), rotary_table(torch.zeros(1, 3), 16)).dtype == torch.bfloat16


def test_config_builds_the_same_network_and_its_weights_fit():
    network = build("class", hidden_dim=48, dropout=0.1)
    again = VideoTransformer(**network.config)
    again.load_state_dict(network.state_dict())
    tokens, labels = inputs("class")
    assert torch.equal(again.eval()(tokens, labels), network.eval()(tokens, labels))
    assert again.config == network.config


def test_weights_made_on_the_meta_device_are_filled_with_tables_and_all():
    with torch.device("meta"):
        network = VideoTransformer(vocab_size=V, grid=GRID, dim=32, depth=2, heads=2)
    network.to_empty(device="cpu")
    torch.manual_seed(5)
    network.reset_parameters()
    torch.manual_seed(5)
    plain = VideoTransformer(vocab_size=V, grid=GRID, dim=32, depth=2, heads=2)
    plain.reset_parameters()
    assert torch.equal(network.key_table, plain.key_table)
    assert network(inputs("start")[0]).isfinite().all()


def test_fresh_weights_have_the_stated_deviation():
    network = VideoTransformer(vocab_size=64, grid=GRID, dim=128, depth=4, heads=4)
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert network.blocks[0].attention.out.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert network.blocks[3].down.weight.std().item() == pytest.approx(0.02 / 8**0.5, rel=0.05)
    assert network.norm.weight.eq(1).all()


def test_dropout_acts_in_training_alone():
    network, (tokens, _) = build(dropout=0.5), inputs("start")
    assert not torch.equal(network(tokens), network(tokens))
    network.eval()
    assert torch.equal(network(tokens), network(tokens))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number of 1 or more, got 0"),
        ({"dim": 0}, "dim must be a whole number of 1 or more, got 0"),
        ({"depth": 0}, "depth must be a whole number of 1 or more, got 0"),
        ({"heads": 0}, "heads must be a whole number of 1 or more, got 0"),
        ({"grid": (2, 2)}, r"grid must be three whole numbers of 1 or more \(blocks, rows, columns\), got \(2, 2\)"),
        ({"grid": (2, 0, 2)}, r"grid must be three .* got \(2, 0, 2\)"),
        ({"dim": 33}, "dim must be a multiple of heads, got dim=33 and heads=2"),
        ({"dim": 8}, "head_dim = dim / heads must be even and 6 or more, got 4; choose dim and heads anew"),
        ({"dim": 14}, "must be even and 6 or more, got 7"),
        ({"num_classes": -1}, "num_classes must be a whole number of 0 or more, got -1"),
        ({"num_classes": 2, "start_token": False}, "got num_classes=2 and start_token=False; the class stands in"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        VideoTransformer(**{"vocab_size": V, "grid": GRID, "dim": 32, "depth": 1, "heads": 2, **options})


def test_errors_of_a_name():
    with pytest.raises(ValueError, match="name must be one of 110m, 343m, 770m, got '7b'; give dim, depth and heads"):
        VideoTransformer.from_name("7b", vocab_size=V, grid=GRID)


def test_errors_of_a_forward():
    network = build()
    with pytest.raises(ValueError, match="labels were given to an unconditional network; build it with num_classes="):
        network(torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    with pytest.raises(ValueError, match=r"tokens reach row 14, but the grid \(3, 2, 2\) has 13 rows"):
        network(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="start must be 0 without a cache, got 3; pass the cache"):
        network(torch.zeros(1, 2, dtype=torch.long), start=3)
