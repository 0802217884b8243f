# SPDX-License-Identifier: Apache-2.0
"""A block's call cut down to some rows: everything that runs along the sequence is cut, everything else is left."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from reco_lightning.windowing.engines.call_slicing import cut_call, cut_tensor, map_hidden, pack, take_hidden

T, B = 7, 2
CUT = {"start": 2, "stop": 5, "rows": T}
Output = namedtuple("Output", "states weights")


def count(*shape, dtype=torch.float32):
    return torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)


INT, BOOL, FLOAT = torch.long, torch.bool, torch.float32


@pytest.mark.parametrize(
    ("shape", "dtype", "index"),
    [
        ((B, T, 4), FLOAT, (slice(None), slice(2, 5))),  # states
        ((T, 4), FLOAT, (slice(2, 5),)),  # a rotary table
        ((1, T, 4), torch.complex64, (slice(None), slice(2, 5))),
        ((T, 1, 2, 4), FLOAT, (slice(2, 5),)),
        ((B, 3, T, 4), FLOAT, (slice(None), slice(None), slice(2, 5))),
        ((T,), INT, (slice(2, 5),)),  # position ids
        ((B, T), INT, (slice(None), slice(2, 5))),
        ((3, 1, T), INT, (slice(None), slice(None), slice(2, 5))),
        ((T, T), BOOL, (slice(2, 5), slice(0, 5))),  # masks
        ((B, 1, T, T), FLOAT, (slice(None), slice(None), slice(2, 5), slice(0, 5))),
        ((B, 1, 1, T), BOOL, (slice(None), slice(None), slice(None), slice(0, 5))),
        ((T, T, 4), FLOAT, (slice(None), slice(2, 5))),  # a batch as large as the sequence
        ((B, 4), FLOAT, ()),  # a condition
        ((B, 3, T), FLOAT, ()),  # a width that happens to be T
        ((T,), FLOAT, ()),
        ((), FLOAT, ()),
    ],
)
def test_tensors(shape, dtype, index):
    value = count(*shape, dtype=dtype)
    assert torch.equal(cut_tensor(value, **CUT), value[index])


def test_a_call_is_cut_throughout():
    states, own = count(B, T, 4), torch.zeros(B, 3, 4)
    rotary = (count(T, 2), count(T, 2) + 1)

    class Cache:
        def get_seq_length(self):
            return 0

        def update(self):
            return None

    marker = object()
    args = (states, rotary, 3, None)
    kwargs = {
        "mask": torch.ones(T, T, dtype=torch.bool).tril(),
        "again": states,
        "nested": {"ids": [torch.arange(T)]},
        "past": Cache(),
        "other": marker,
        "flag": True,
    }
    cut_args, cut_kwargs = cut_call(args, kwargs, own, **CUT)
    assert cut_args[0] is own
    assert cut_kwargs["again"] is own
    assert all(torch.equal(one, table[2:5]) for one, table in zip(cut_args[1], rotary, strict=True))
    assert isinstance(cut_args[1], tuple)
    assert cut_args[2:] == (3, None)
    assert cut_kwargs["mask"].tolist() == [[True] * 3 + [False] * 2, [True] * 4 + [False], [True] * 5]
    assert cut_kwargs["nested"]["ids"][0].tolist() == [2, 3, 4]
    assert cut_kwargs["past"] is None
    assert cut_kwargs["other"] is marker
    assert cut_kwargs["flag"] is True
    assert args[0] is states  # the caller's own are as they were
    assert kwargs["nested"]["ids"][0].shape == (T,)


def test_a_call_is_cut_to_a_part_of_the_batch():
    states, own = count(4, T, 4), torch.zeros(2, 3, 4)
    condition, ids = count(4, 5), count(4, T, dtype=INT)
    table = count(T, 2)
    args, kwargs = cut_call((states, condition), {"ids": ids, "table": table}, own, **CUT, samples=slice(1, 3), batch=4)
    assert args[0] is own
    assert torch.equal(args[1], condition[1:3])
    assert torch.equal(kwargs["ids"], ids[1:3, 2:5])
    assert torch.equal(kwargs["table"], table[2:5])


@pytest.mark.parametrize("shape", [(T, 4), (T, 1, 4), (T, T)])
def test_an_argument_that_may_be_of_the_batch_or_the_sequence_is_refused(shape):
    states = count(T, T, 4)
    with pytest.raises(ValueError, match=r"may run along the batch or the sequence, both are 7 long; .* batch_size"):
        cut_call((states, count(*shape)), {}, states, **CUT, samples=slice(0, 3), batch=T)
    (_, mask), _ = cut_call((states, count(T, 1, T, T)), {}, states, **CUT, samples=slice(0, 3), batch=T)
    assert mask.shape == (3, 1, 3, 5)


def test_states_are_the_first_floating_point_tensor():
    states = torch.zeros(1)
    assert take_hidden((torch.arange(3), states), {}) is states
    assert take_hidden((), {"ids": torch.arange(3), "x": states}) is states
    with pytest.raises(TypeError, match=r"called without states \(B, T, D\): got \['int', 'Tensor'\]"):
        take_hidden((3,), {"ids": torch.arange(3)})


def test_outputs_keep_their_form():
    states, weights = torch.ones(1, 2, 3), torch.zeros(1)
    assert torch.equal(map_hidden(states, lambda x: x + 1), states + 1)
    for output in ((states, weights), [states, weights], Output(states, weights)):
        mapped = map_hidden(output, lambda x: x + 1)
        assert type(mapped) is type(output)
        assert torch.equal(mapped[0], states + 1)
        assert mapped[1] is weights


@pytest.mark.parametrize("output", [None, {"x": torch.zeros(1)}, (), (None, torch.zeros(1))])
def test_other_outputs_are_refused(output):
    with pytest.raises(TypeError, match=f"a block returned {type(output).__name__}; a tensor or a tuple that begins"):
        map_hidden(output, lambda x: x)


def test_groups_are_packed_with_rows_of_zeros():
    one, two = torch.ones(2, 3, 4, requires_grad=True), torch.ones(1, 5, 4)
    packed = pack([one, two])
    assert packed.shape == (3, 5, 4)
    assert torch.equal(packed[:2, :3], one)
    assert packed[:2, 3:].abs().max() == 0
    assert torch.equal(packed[2:], two)
    packed.sum().backward()
    assert one.grad.eq(1).all()


def test_packed_tuples_keep_the_first_groups_rest():
    output = pack([(torch.ones(1, 2, 4), "weights"), (torch.ones(1, 3, 4), "others")])
    assert output[0].shape == (2, 3, 4)
    assert output[1] == "weights"
    alone = (torch.ones(1, 2, 4),)
    assert pack([alone]) is alone
