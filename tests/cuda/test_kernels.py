# SPDX-License-Identifier: Apache-2.0
"""Windows on each of torch's attention kernels, under ``torch.compile``, and without waiting for the device."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from reco_lightning import ReCoCallback, VideoTransformer, WindowSampler
from reco_lightning.windowing.engines.attention import AttentionCall, attend_with_context
from reco_lightning.windowing.injection.windowed_step import Injection
from reco_lightning.windowing.losses.chunked_cross_entropy import linear_cross_entropy
from tests.cuda.conftest import DEVICE
from tests.cuda.steps import assert_close, windowed_gradients
from tests.helpers import foreign
from tests.helpers.settings import SETTINGS

ON_CUDA = DEVICE.type == "cuda"
NAMED = {setting.name: setting for setting in SETTINGS}
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    **({"efficient": SDPBackend.EFFICIENT_ATTENTION} if ON_CUDA else {}),
    "math": SDPBackend.MATH,
}
AUTOCAST = partial(torch.autocast, DEVICE.type, torch.bfloat16)
CPU = torch.device("cpu")


# the memory-efficient kernel takes no grouped heads (Llama's), in a plain step neither
@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        (name, kernel)
        for name in ("own", "own-classes", "llama-labels", "gpt2-logits", "fused", "mingpt")
        for kernel in KERNELS
        if (name, kernel) != ("llama-labels", "efficient")
    ],
)
def test_each_kernel_gives_the_gradients_of_float32(name, kernel, device):
    expected, _ = windowed_gradients(NAMED[name], CPU)
    with sdpa_kernel(KERNELS[kernel]):
        own, engine = windowed_gradients(NAMED[name], device, autocast=AUTOCAST)
    assert engine == "frozen"
    for mine, other in zip(own, expected, strict=True):
        assert_close(mine, other, 0.1)


@pytest.mark.parametrize(
    ("heads", "kernel"),
    [(heads, kernel) for heads in ((4, 4), (4, 2)) for kernel in KERNELS if (heads, kernel) != ((4, 2), "efficient")],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(64, 192), (96, 96), (37, 101)])
def test_attention_from_the_lower_right_equals_softmax_written_out(heads, rows, keys, dtype, kernel, device):
    torch.manual_seed(0)
    shapes = [(2, heads[0], rows, 64), (2, heads[1], keys, 64), (2, heads[1], keys, 64)]
    half = [torch.randn(shape, dtype=dtype, device=device).requires_grad_() for shape in shapes]
    with sdpa_kernel(KERNELS[kernel]):
        own = attend_with_context(AttentionCall(*half, is_causal=True, enable_gqa=heads[0] != heads[1]))
    cotangent = torch.randn_like(own)
    gradients = torch.autograd.grad(own, half, cotangent)
    query, key, value = (tensor.detach().double().requires_grad_() for tensor in half)
    groups = heads[0] // heads[1]
    scores = query @ key.repeat_interleave(groups, 1).mT / 8
    hidden = torch.ones(rows, keys, dtype=torch.bool, device=device).triu(keys - rows + 1)
    expected = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ value.repeat_interleave(groups, 1)
    wanted = torch.autograd.grad(expected, (query, key, value), cotangent.double())
    names = "output", "query", "key", "value"
    found = dict(zip(names, (own.detach(), *gradients), strict=True))
    reference = dict(zip(names, (expected.detach().cpu(), *(value.cpu() for value in wanted)), strict=True))
    assert_close(found, reference, 2e-2)


def test_a_window_runs_on_flash_attention_forward_and_backward(device):
    query = torch.randn(2, 4, 256, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    key = torch.randn(2, 4, 1024, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_CUDA else [])]) as seen:
        attend_with_context(AttentionCall(query, key, key, is_causal=True)).sum().backward()
    names = " ".join(event.key for event in seen.key_averages())
    wanted = ("flash_fwd", "flash_bwd") if ON_CUDA else ("flash_attention_for_cpu", "flash_attention_for_cpu_backward")
    assert all(name in names for name in wanted), names


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["own", "llama-labels"])
def test_a_compiled_network_gives_the_same_gradients(name, precision, device):
    setting = NAMED[name]
    options = {} if precision == "float32" else {"autocast": AUTOCAST}
    expected, _ = windowed_gradients(setting, device, **options)

    def compile_network(module):
        module.get_submodule(setting.compiled).compile(fullgraph=True)

    own, _ = windowed_gradients(setting, device, prepare=compile_network, **options)
    for mine, other in zip(own, expected, strict=True):
        other = {key: value.cpu() for key, value in other.items()}
        assert_close(mine, other, 1e-4 if precision == "float32" else 0.1)


@contextmanager
def no_synchronisation():
    """A copy to or from the device that is waited for is an error; a CPU has none."""
    if not ON_CUDA:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("options", foreign.STEP_OPTIONS, ids=str)
def test_a_step_does_not_wait_for_the_device(options, device):
    torch.manual_seed(0)
    module = foreign.ShiftedInput().to(device)
    ids = next(iter(foreign.batches()))[0].to(device)
    callback = ReCoCallback(WindowSampler(foreign.BLOCKS, foreign.PER_BLOCK), **options)
    selection = callback.settings.select(module, lambda: module.training_step([ids], 0))
    injection = Injection(
        selection.engine, selection.trace, callback.settings.continuity, by_group=callback._losses is not None
    )
    groups = callback.settings.windows_per_batch
    selection.engine.install()
    try:
        for first in range(len(callback.settings.sampler.windows) - groups + 1):
            windows = callback.settings.sampler.windows[first : first + groups]
            for step in range(2):  # the first one may make what is kept
                with no_synchronisation() if step else torch.enable_grad():
                    loss, _ = injection.run(windows, lambda: module.training_step([ids], 0))
                    loss.backward()
                    selection.engine.deactivate()
    finally:
        selection.engine.remove()
    assert all(parameter.grad.isfinite().all() for parameter in module.net.h.parameters())


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_the_loss_in_chunks_is_the_plain_loss(autocast, device):
    torch.manual_seed(0)
    states = torch.randn(200, 64, device=device, requires_grad=True)
    weight = torch.randn(512, 64, device=device, requires_grad=True)
    bias = torch.randn(512, device=device, requires_grad=True)
    target = torch.randint(512, (200,), device=device)
    target[::7] = -100
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        total, _ = linear_cross_entropy(states, weight, target, bias=bias, chunk_elements=512 * 30)
    own = total / (target != -100).sum()
    gradients = torch.autograd.grad(own, (states, weight, bias))
    parts = [part.detach().cpu().double().requires_grad_() for part in (states, weight, bias)]
    logits = torch.nn.functional.linear(*parts)
    expected = torch.nn.functional.cross_entropy(logits, target.cpu())
    wanted = torch.autograd.grad(expected, parts)
    assert float(own.detach()) == pytest.approx(float(expected.detach()), rel=2e-2 if autocast else 1e-5)
    names = "states", "weight", "bias"
    assert_close(
        dict(zip(names, gradients, strict=True)), dict(zip(names, wanted, strict=True)), 3e-2 if autocast else 1e-4
    )


FLEX = {
    "vocab_size": 20, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip


class Llama(foreign.Base):
    """A Llama whose heads are as wide as flex attention asks for."""

    def __init__(self, attention):
        torch.nn.Module.__init__(self)
        super(foreign.Base, self).__init__()
        config = LlamaConfig(**FLEX)
        config._attn_implementation = attention
        self.net = LlamaForCausalLM(config)

    def training_step(self, batch, batch_idx):
        logits = self.net(input_ids=batch[0], use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[0][:, 1:].flatten())


# torch has no backward pass of flex attention on a CPU
@pytest.mark.parametrize("attention", ["flex_attention", "eager"] if ON_CUDA else ["eager"])
def test_attention_that_is_not_sdpa_gives_the_gradients_of_sdpa(attention, device):
    found = []
    for implementation in ("sdpa", attention):
        torch.manual_seed(0)
        module = Llama(implementation).to(device)
        ids = torch.randint(20, (3, 256), device=device)
        callback = ReCoCallback(WindowSampler(4, 64), continuity_weight=0.5)
        selection = callback.settings.select(module, lambda: module.training_step([ids], 0))  # noqa: B023 - called here
        injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
        selection.engine.install()
        try:
            loss, _ = injection.run([callback.settings.sampler.windows[1]], lambda: module.training_step([ids], 0))  # noqa: B023
            loss.backward()
        finally:
            selection.engine.remove()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
        assert selection.engine.name == ("frozen" if implementation == "sdpa" else "cache")
    assert_close(found[1], {name: gradient.cpu() for name, gradient in found[0].items()}, 1e-3)


def test_the_kernel_is_not_taken_where_it_is_forbidden(device):
    query = torch.randn(1, 2, 8, 16, dtype=torch.bfloat16, device=device)
    key = torch.randn(1, 2, 24, 16, dtype=torch.bfloat16, device=device)
    with sdpa_kernel(SDPBackend.MATH), profile(activities=[ProfilerActivity.CPU]) as seen:
        attend_with_context(AttentionCall(query, key, key, is_causal=True))
    assert not [event.key for event in seen.key_averages() if "flash" in event.key]


def test_a_network_in_bfloat16_is_served(device):
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=32, grid=(4, 4, 4), dim=64, depth=2, heads=4).to(device, torch.bfloat16)
    module = foreign.Base()
    module.net = network
    module.training_step = lambda batch, index: torch.nn.functional.cross_entropy(
        network(batch[0][:, :-1]).flatten(0, 1), batch[0].flatten()
    )
    ids = torch.randint(32, (2, 64), device=device)
    callback = ReCoCallback(WindowSampler(4, 16))
    selection = callback.settings.select(module, lambda: module.training_step([ids], 0))
    assert selection.engine.name == "frozen"
