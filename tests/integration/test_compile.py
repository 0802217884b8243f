# SPDX-License-Identifier: Apache-2.0
"""The callback on networks under ``torch.compile``: the same weights as without, no graph break, one graph a window."""

from __future__ import annotations

from functools import partial

import lightning.pytorch as pl
import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from reco_lightning import ReCoCallback, VideoTransformer, WindowSampler
from reco_lightning.windowing.injection.windowed_step import Injection
from tests.helpers.foreign import BLOCKS, DIM, PER_BLOCK, TOKENS, VOCAB, Network, batches, trainer
from tests.helpers.networks.common import quieten
from tests.helpers.settings import SETTINGS, WINDOWS

pytestmark = pytest.mark.slow

# each window has a graph of its own, and compiling is what takes the time
FIRST_AND_LAST = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=3, stride_blocks=2, seed=2)
LAST = WindowSampler(BLOCKS, PER_BLOCK, window_blocks=3, stride_blocks=2, first_window_prob=1e-9, seed=2)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, DIM)
        self.position = nn.Parameter(torch.randn(1, TOKENS, DIM) * 0.2)
        layer = nn.TransformerEncoderLayer(DIM, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.out = nn.Linear(DIM, VOCAB)

    def forward(self, ids):
        x = self.embedding(ids) + self.position[:, : ids.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.out(self.encoder(x, mask=mask, is_causal=True))


class Llama(nn.Module):
    def __init__(self, attention):
        super().__init__()
        sizes = {"hidden_size": DIM, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, attn_implementation=attention, **sizes))

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


def reference_network():
    return VideoTransformer(vocab_size=VOCAB, grid=(BLOCKS, 2, 3), dim=DIM, depth=1, heads=2)


NETWORKS = {
    "reference": (reference_network, {}),
    "reference, two windows a batch": (reference_network, {"windows_per_batch": 2}),
    "reference, prefix engine": (reference_network, {"engine": "prefix"}),
    "gpt": (partial(Network, depth=1), {}),
    "nn.TransformerEncoder": (Encoder, {}),
    "llama": (lambda: Llama("sdpa"), {}),
    "llama, eager attention": (lambda: Llama("eager"), {}),
}


class Module(pl.LightningModule):
    def __init__(self, network):
        super().__init__()
        self.net = network

    def training_step(self, batch, batch_idx):
        ids = batch[0]
        logits = self.net(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, -logits.shape[1] :].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(build, how, sampler, *, dynamic=None, **options):
    torch.manual_seed(3)
    module = Module(build())
    compiling = {"backend": "eager", "fullgraph": True, "dynamic": dynamic}  # a graph break is an error
    if how == "wrapped":
        module.net = torch.compile(module.net, **compiling)
    elif how == "in place":
        module.net.compile(**compiling)
    elif how == "blocks":
        for block in module.net.h:
            block.compile(**compiling)
    torch._dynamo.reset()
    counters.clear()
    trainer(ReCoCallback(sampler, **options), max_epochs=3).fit(module, batches(count=4))
    return {name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()}


def assert_equal(own, plain):
    for name, value in plain.items():
        torch.testing.assert_close(own[name], value, atol=1e-6, rtol=1e-5, msg=lambda t, name=name: f"{name}: {t}")


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_train_to_the_same_weights_without_a_graph_break(name):
    build, options = NETWORKS[name]
    windows = FIRST_AND_LAST if name == "reference" else LAST
    plain = fit(build, None, windows, **options)
    own = fit(build, "in place", windows, **options)
    assert_equal(own, plain)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= (2 if name == "reference" else 1)


# SDPA called by us, by torch and by transformers; other engines and groups cut the same calls
@pytest.mark.parametrize("name", ["reference", "nn.TransformerEncoder", "llama"])
def test_sizes_that_are_symbols(name):
    """torch makes them so where one network runs on sequences of several lengths."""
    build, options = NETWORKS[name]
    compiled = fit(build, "in place", LAST, dynamic=True, **options)
    assert_equal(compiled, fit(build, None, LAST, **options))


# a warning that torch gives itself while it traces a block on states with a graph
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(("how", "graphs"), [("wrapped", 1), ("blocks", 2)])
def test_compiled_by_a_wrapper_or_block_by_block(how, graphs):
    plain = fit(partial(Network, depth=2), None, LAST)
    own = fit(partial(Network, depth=2), how, LAST)
    assert_equal(own, plain)
    assert not counters["graph_break"]
    assert 1 <= counters["stats"]["unique_graphs"] <= graphs


@torch._dynamo.config.patch(recompile_limit=1)
def test_more_windows_than_torch_compiles_graphs_of_one_function():
    assert len({FIRST_AND_LAST.sample(step) for step in range(12)}) == 2
    plain = fit(partial(Network, depth=1), None, FIRST_AND_LAST)
    own = fit(partial(Network, depth=1), "in place", FIRST_AND_LAST)
    assert_equal(own, plain)
    assert counters["stats"]["unique_graphs"] == 2
    assert torch._dynamo.config.recompile_limit == 1


# the backend "eager" calls a loss inside the graph a second time, under the tap that has met it
@pytest.mark.parametrize(("name", "backend"), [("own", "eager"), ("llama-labels", "aot_eager")])
def test_autocast_under_a_compiler_gives_the_gradients_of_autocast_without(name, backend):
    """Copies of weights that autocast makes in the context pass have no graph; logits may be copied in float32."""
    (setting,) = [one for one in SETTINGS if one.name == name]
    found = []
    for compiled in (False, True):
        module, batch = quieten(setting.make()).train(), setting.draw(0)
        callback = ReCoCallback(WINDOWS)
        with torch.autocast("cpu", torch.bfloat16):
            selection = callback.settings.select(module, lambda: module.training_step(batch, 0))  # noqa: B023 - called here
        if compiled:
            torch._dynamo.reset()
            module.get_submodule(setting.compiled).compile(backend=backend, fullgraph=True)
        injection = Injection(selection.engine, selection.trace, callback.settings.continuity)
        selection.engine.install()
        with torch.autocast("cpu", torch.bfloat16):
            loss, _ = injection.run([WINDOWS.sample(1)], lambda: module.loss(batch))  # noqa: B023
        loss.backward()
        selection.engine.remove()
        found.append({name: parameter.grad for name, parameter in module.named_parameters()})
    for name, gradient in found[0].items():
        distance = (found[1][name] - gradient).norm()
        assert distance <= 0.05 * max(gradient.norm(), 1e-3), name
