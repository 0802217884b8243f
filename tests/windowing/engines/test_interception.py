# SPDX-License-Identifier: Apache-2.0
"""Patched methods and tapped functions: in force while they should be, and without a trace afterwards."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from reco_lightning.windowing.engines.attention import AttentionCall, attend_with_context
from reco_lightning.windowing.engines.interception import FunctionInterceptor, PatchedMethod


class Doubler(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0]))

    def forward(self, x, scale=1):
        return self.weight * x * scale


def add(amount):
    return lambda original, *args, **kwargs: original(*args, **kwargs) + amount


def patched(module, amount=1):
    patch = PatchedMethod(module, "forward", add(amount))
    patch.install()
    return patch


ONE = torch.ones(1)


def test_a_patch_acts_until_removed_and_leaves_nothing():
    module = Doubler()
    before, keys = dict(vars(module)), list(module.state_dict())
    hook = module.register_forward_hook(lambda _m, _args, output: output * 10)
    patch = patched(module)
    assert module(ONE, scale=3) == 70
    assert list(module.state_dict()) == keys
    assert inspect.signature(module.forward) == inspect.signature(Doubler().forward)
    hook.remove()
    patch.remove()
    patch.remove()  # a second time does nothing
    assert dict(vars(module)) == before
    assert module(ONE) == 2


def test_installing_twice_is_installing_once():
    module = Doubler()
    patch = patched(module)
    patch.install()
    assert module(ONE) == 3
    patch.remove()
    assert module(ONE) == 2
    patch.install()
    assert module(ONE) == 3


def test_nested_patches_run_from_the_last_to_the_first():
    module = Doubler()
    first = patched(module)
    second = PatchedMethod(module, "forward", lambda original, x: original(x) * 10)
    second.install()
    assert module(ONE) == 30
    second.remove()
    assert module(ONE) == 3
    first.remove()
    assert "forward" not in vars(module)


def test_a_patch_removed_under_another_ceases_to_act():
    module = Doubler()
    first, second = patched(module, 1), patched(module, 10)
    first.remove()
    assert module(ONE) == 12
    second.remove()
    assert module(ONE) == 2
    first.install()
    assert module(ONE) == 3
    first.remove()
    assert module(ONE) == 2


def test_what_another_library_had_put_there_is_wrapped_and_comes_back():
    module = Doubler()
    foreign = vars(module)["forward"] = lambda x: x * 100
    patch = patched(module)
    assert module(ONE) == 101
    patch.remove()
    assert vars(module)["forward"] is foreign


def pickled(module):
    return pickle.loads(pickle.dumps(module))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("patches", [1, 2])
def test_copies_hold_the_plain_method(duplicate, patches):
    network = nn.Sequential(Doubler(), nn.Identity())
    for _ in range(patches):
        patched(network[0])
    twin = duplicate(network)
    assert network(ONE) == 2 + patches
    assert twin(ONE) == 2
    with torch.no_grad():
        network[0].weight.fill_(5)
    assert twin(ONE) == 2  # bound to the copy, not to the original
    assert duplicate(twin)(ONE) == 2
    again = patched(twin[0])
    assert twin(ONE) == 3
    again.remove()
    assert twin(ONE) == 2


def hundredfold(x):
    return x * 100


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_copies_keep_another_librarys_method(duplicate):
    module = Doubler()
    vars(module)["forward"] = hundredfold
    patched(module)
    assert module(ONE) == 101
    assert duplicate(module)(ONE) == 100


def test_a_copy_of_the_module_alone_is_bound_to_the_copy():
    module = Doubler()
    patched(module)
    twin = copy.copy(module)  # shares what it holds, the patch included
    assert twin(ONE) == 3


def test_a_tap_sees_calls_by_any_name_and_stops_at_its_end():
    relu = F.relu
    with FunctionInterceptor({F.relu: lambda x, inplace=False: x + 1}):
        assert relu(ONE) == F.relu(ONE) == nn.ReLU()(ONE) == 2
        assert F.relu6(ONE) == 1
    assert F.relu(ONE) == 1


def test_a_handler_may_call_the_function_that_it_replaces():
    with FunctionInterceptor({F.relu: lambda x, inplace=False: F.relu(x) + 1}):
        assert F.relu(-ONE) == 1


def test_a_tap_ends_with_an_exception():
    def fail(*args, **kwargs):
        raise KeyError("reached")

    for function, call in ((F.relu, F.relu), (F.scaled_dot_product_attention, attention)):
        with pytest.raises(KeyError, match="reached"), FunctionInterceptor({function: fail}):
            call(torch.zeros(1, 3, 8))
    assert F.relu(ONE) == 1
    assert F.scaled_dot_product_attention is SDPA


def test_nested_taps_run_from_the_inner_to_the_outer():
    seen = []

    def note(name):
        def handler(x, inplace=False):
            seen.append(name)
            return F.relu(x)

        return handler

    with FunctionInterceptor({F.relu: note("outer")}), FunctionInterceptor({F.relu: note("inner")}):
        F.relu(ONE)
    assert seen == ["inner", "outer"]


SDPA = F.scaled_dot_product_attention
torch.manual_seed(0)
MULTIHEAD = nn.MultiheadAttention(8, 2, batch_first=True)


def attention(x, rows=None, **options):
    mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
    return MULTIHEAD(x if rows is None else x[:, rows], x, x, attn_mask=mask, need_weights=False, **options)[0]


@pytest.mark.parametrize("is_causal", [False, True])
def test_multihead_attention_is_tapped_once(is_causal):
    seen = []

    def handler(query, key, value, *args, **kwargs):
        seen.append(tuple(query.shape))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    x = torch.randn(2, 5, 8)
    plain = attention(x, is_causal=is_causal)
    with FunctionInterceptor({SDPA: handler}):
        own = attention(x, is_causal=is_causal)
    assert seen == [(2, 2, 5, 4)]
    assert torch.equal(own, plain)
    assert F.scaled_dot_product_attention is SDPA


def test_nested_taps_of_multihead_attention_run_from_the_inner_to_the_outer():
    seen = []

    def note(name):
        def handler(*args, **kwargs):
            seen.append(name)
            return F.scaled_dot_product_attention(*args, **kwargs)

        return handler

    x = torch.randn(2, 5, 8)
    with (
        FunctionInterceptor({SDPA: note("outer")}),
        FunctionInterceptor({SDPA: note("middle")}),
        FunctionInterceptor({SDPA: note("inner")}),
    ):
        own = attention(x)
    assert seen == ["inner", "middle", "outer"]
    assert torch.equal(own, attention(x))
    assert F.scaled_dot_product_attention is SDPA


def test_multihead_attention_of_a_window_takes_the_context_in_front():
    x = torch.randn(2, 6, 8)
    plain = attention(x)
    kept = []

    def record(query, key, value, *args, **kwargs):
        kept.append((key, value))
        return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

    def attend(*args, **kwargs):
        return attend_with_context(AttentionCall(*args, **kwargs), kept[0])

    mask = nn.Transformer.generate_square_subsequent_mask(6)
    with FunctionInterceptor({SDPA: record}):
        attention(x[:, :4])
    with FunctionInterceptor({SDPA: attend}):
        # As a block's call is cut: the mask keeps the columns before the window, torch itself wants the window's alone.
        window = MULTIHEAD(x[:, 4:], x[:, 4:], x[:, 4:], attn_mask=mask[4:], need_weights=False)[0]
    torch.testing.assert_close(window, plain[:, 4:])


def test_a_tap_without_attention_leaves_multihead_attention_alone():
    x = torch.randn(2, 5, 8)
    with FunctionInterceptor({F.relu: lambda x, inplace=False: x}):
        assert torch.equal(attention(x), attention(x))


@pytest.mark.slow
@pytest.mark.parametrize("call", [lambda x: x.unflatten(-1, (2, -1)), lambda x: x.unflatten(dim=1, sizes=(2, 2))])
def test_a_method_of_tensors_that_is_written_in_python_is_no_graph_break(call):
    def intercepted(x):
        with FunctionInterceptor({SDPA: F.relu}):
            return call(x) * 2

    x = torch.randn(2, 4)
    torch.testing.assert_close(torch.compile(intercepted, backend="eager", fullgraph=True)(x), call(x) * 2)
