# SPDX-License-Identifier: Apache-2.0
"""The callback on networks of transformers, against their own cache of a context that is run under ``no_grad``."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from reco_lightning import ReCoCallback, WindowSampler
from tests.helpers.foreign import trainer
from tests.helpers.networks.references import through_cache
from tests.helpers.networks.transformers_ import missing

pytestmark = pytest.mark.third_party

VOCAB, TOKENS = 24, 30
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
QWEN3 = pytest.mark.skipif(bool(missing("qwen3")), reason=missing("qwen3"))
GROUPED = {"num_attention_heads": 4, "num_key_value_heads": 2}


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, **GROUPED))
    if name == "qwen3":
        return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SMALL, **GROUPED, head_dim=8))
    config = GPT2Config(vocab_size=VOCAB, n_positions=40, n_embd=32, n_layer=3, n_head=2, resid_pdrop=0.0)
    return GPT2LMHeadModel(config)  # with attention and embedding dropout


class Module(pl.LightningModule):
    def __init__(self, network, *, labels):
        super().__init__()
        self.model = network
        self.labels = labels

    def training_step(self, ids, batch_idx):
        if self.labels:
            return self.model(input_ids=ids, labels=ids).loss
        return F.cross_entropy(self.model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def step_gradients(network, ids, sampler, *, labels, **options):
    module = Module(network, labels=labels)
    before = copy.deepcopy(network.state_dict())
    data = torch.utils.data.DataLoader(ids, batch_size=len(ids))
    trainer(ReCoCallback(sampler, **({"continuity_weight": 0.0} | options))).fit(module, data)
    return {name: (before[name] - value) / 0.1 for name, value in network.state_dict().items()}


def cache_gradients(network, ids, window):
    first, last = max(window.start - 1, 0), window.stop - 1
    logits = through_cache(network, ids, first, last)
    F.cross_entropy(logits.flatten(0, 1), ids[:, first + 1 : last + 1].flatten()).backward()
    return {name: parameter.grad for name, parameter in network.named_parameters()}


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("labels", [True, False])
@pytest.mark.parametrize("name", ["llama", pytest.param("qwen3", marks=QWEN3), "gpt2"])
def test_gradients_equal_those_through_the_networks_own_cache(name, labels, start):
    network = build(name)
    for part in network.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    for block in network.transformer.h if name == "gpt2" else ():
        block.attn.attn_dropout.p = 0.0
    ids = torch.randint(VOCAB, (3, TOKENS))
    sampler = next(s for s in (WindowSampler(5, 6, seed=seed) for seed in range(99)) if s.sample(0).start == 6 * start)
    expected = cache_gradients(copy.deepcopy(network).train(), ids, sampler.sample(0))
    own = step_gradients(network, ids, sampler, labels=labels)
    for parameter, gradient in expected.items():
        torch.testing.assert_close(
            own[parameter], gradient, atol=2e-6, rtol=1e-4, msg=lambda t, p=parameter: f"{p}: {t}"
        )


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient(name):
    ids = torch.randint(VOCAB, (3, TOKENS))
    sampler = WindowSampler(5, 6, seed=1, first_window_prob=None)
    network, twin = build(name).train(), build(name).train()
    getattr(network, "activation_checkpointing_enable", network.gradient_checkpointing_enable)()
    torch.manual_seed(4)
    own = step_gradients(network, ids, sampler, labels=True, continuity_weight=0.1)
    torch.manual_seed(4)
    plain = step_gradients(twin, ids, sampler, labels=True, continuity_weight=0.1)
    for parameter, gradient in plain.items():
        torch.testing.assert_close(own[parameter], gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{"context": "keys"}, {"context": "dropped"}, {"windows_per_batch": 2}], ids=str)
@pytest.mark.parametrize("labels", [True, False])
def test_other_methods_train(options, labels):
    gradients = step_gradients(
        build("llama"), torch.randint(VOCAB, (4, TOKENS)), WindowSampler(5, 6, seed=1), labels=labels, **options
    )
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert any(gradient.abs().max() > 0 for gradient in gradients.values())
