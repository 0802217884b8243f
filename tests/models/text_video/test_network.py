# SPDX-License-Identifier: Apache-2.0
"""Captions in front of video ids in one language model: padding, the shared vocabulary, pretrained folders."""

from __future__ import annotations

import functools
import inspect
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from reco_lightning.models.text_video.network import TextVideoNetwork, rows_like

pytestmark = pytest.mark.third_party

TEXT, VIDEO, GRID = 11, 6, (3, 1, 2)
LLAMA = {
    "model_type": "llama",
    "vocab_size": TEXT,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "vocab_size": TEXT, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
TOKENS = torch.tensor([[5, 0, 3, 3, 1], [2, 2, 4, 0, 5]])


def build(architecture=LLAMA, **given):
    torch.manual_seed(0)
    network = TextVideoNetwork(VIDEO, GRID, **(given or {"architecture": architecture}))
    network.build()
    return network.eval()


def test_logits_are_those_of_the_language_model_on_shifted_ids():
    network = build()
    captions = torch.tensor([[3, 7], [9, 1]])
    start = torch.full((2, 1), TEXT + VIDEO)
    ids = torch.cat([captions, start, TOKENS + TEXT], dim=1)
    torch.testing.assert_close(network(captions, TOKENS), network.language_model(ids).logits[:, 2:])


@pytest.mark.parametrize("architecture", [LLAMA, GPT2], ids=["rotary", "learned positions"])
def test_padding_changes_no_logit(architecture):
    network = build(architecture)
    padded = torch.tensor([[-1, -1, -1, 4], [-1, -1, -1, -1], [8, 2, 10, 4], [-1, 8, -1, 2]])
    tokens = torch.cat([TOKENS, TOKENS])
    logits = network(padded, tokens)
    assert logits.isfinite().all()
    for row, (caption, own) in enumerate(zip(padded, tokens, strict=True)):
        alone = network(caption[caption >= 0][None], own[None])
        torch.testing.assert_close(logits[row], alone[0], atol=1e-5, rtol=1e-5)


def test_padding_changes_no_gradient():
    network = build()
    captions, padded = torch.tensor([[4, 2]]), torch.tensor([[-1, -1, 4, 2]])
    gradients = []
    for given in (captions, padded):
        network.zero_grad()
        network(given, TOKENS[:1]).logsumexp(dim=-1).sum().backward()
        gradients.append({name: weight.grad for name, weight in network.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_a_caption_of_no_columns_is_none():
    network = build()
    hidden = network(torch.full((2, 3), -1), TOKENS)
    torch.testing.assert_close(network(torch.empty(2, 0, dtype=torch.long), TOKENS), hidden, atol=1e-5, rtol=1e-5)


def test_a_cache_changes_no_logit():
    network, cache = build(), DynamicCache()
    captions = torch.tensor([[-1, -1, 4], [8, 2, 10]])
    rows = [network(captions, TOKENS[:, :length], cache) for length in (0, 1, 2, 5)]
    assert [row.shape[1] for row in rows] == [1, 1, 1, 3]  # the start alone at first
    torch.testing.assert_close(torch.cat(rows, dim=1), network(captions, TOKENS), atol=1e-5, rtol=1e-5)


class Renamed(torch.nn.Module):
    """A language model that takes its cache by another name."""

    def __init__(self, model, name):
        super().__init__()
        self.model = model
        self.names = inspect.signature(model.forward).parameters.keys() & {"cache", "past_key_values"}, name
        self.forward = functools.partial(self._run)
        parameters = [inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY) for one in ("input_ids", name)]
        self.forward.__signature__ = inspect.Signature(parameters)

    def _run(self, **kwargs):
        (own,), name = self.names
        return self.model(**{own if key == name else key: value for key, value in kwargs.items()})


@pytest.mark.parametrize("name", ["cache", "past_key_values", "past_key_value"])
def test_a_cache_is_handed_over_by_the_models_own_name(name):
    network, cache = build(), DynamicCache()
    captions = torch.tensor([[8, 2]])
    expected = network(captions, TOKENS[:1])
    network.language_model = Renamed(network.language_model, name)
    rows = [network(captions, TOKENS[:1, :length], cache) for length in (2, 5)]
    torch.testing.assert_close(torch.cat(rows, dim=1), expected, atol=1e-5, rtol=1e-5)


def test_a_language_model_without_a_cache_trains_and_refuses_one():
    network = build()
    captions = torch.tensor([[8, 2]])
    expected = network(captions, TOKENS[:1])
    network.language_model = Renamed(network.language_model, "memory")
    assert torch.equal(network(captions, TOKENS[:1]), expected)
    names = "by none of the names cache, past_key_values, past_key_value, layer_past"
    with pytest.raises(ValueError, match=f"cache must be None: the language model, a Renamed, .* {names}"):
        network(captions, TOKENS[:1], DynamicCache())


@pytest.mark.parametrize("tied", [False, True])
def test_a_pretrained_folder_keeps_its_text_and_gets_rows_for_the_video(tied, tmp_path):
    torch.manual_seed(1)
    config = LlamaConfig(**{k: v for k, v in LLAMA.items() if k != "model_type"}, tie_word_embeddings=tied)
    source = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        source.get_input_embeddings().weight.mul_(3).add_(1)
    source.save_pretrained(tmp_path)
    model = build(pretrained=str(tmp_path)).language_model
    ids = torch.randint(TEXT, (2, 7))
    torch.testing.assert_close(model(ids).logits[..., :TEXT], source(ids).logits)
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert table.shape == head.shape == (TEXT + VIDEO + 1, 32)
    assert (table is head) is tied
    assert model.config.vocab_size == TEXT + VIDEO + 1
    fresh, old = table[TEXT:], table[:TEXT]
    assert (fresh.mean() - old.mean()).abs() < 0.1
    assert 0.5 < fresh.std(dim=0).mean() / old.std(dim=0).mean() < 1.5  # each video id begins as one of its own


def test_a_half_precision_folder_trains_in_the_default_type(tmp_path):
    LlamaForCausalLM(LlamaConfig(**LLAMA)).bfloat16().save_pretrained(tmp_path)
    network = build(pretrained=str(tmp_path))
    assert {weight.dtype for weight in network.parameters()} == {torch.float32}


def test_config_makes_the_same_network_without_the_folder(tmp_path):
    LlamaForCausalLM(LlamaConfig(**LLAMA, rms_norm_eps=1e-3)).save_pretrained(tmp_path)
    network = build(pretrained=str(tmp_path))
    twin = TextVideoNetwork(**network.config)
    twin.build()
    twin.load_state_dict(network.state_dict())
    captions = torch.tensor([[1, 2], [-1, 2]])
    torch.testing.assert_close(twin.eval()(captions, TOKENS), network(captions, TOKENS))


def test_a_folder_of_pickled_weights_alone_is_refused(tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**GPT2))
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        build(pretrained=str(tmp_path))


def test_nothing_is_built_before_build():
    network = TextVideoNetwork(VIDEO, GRID, architecture=LLAMA)
    assert not list(network.parameters())
    with torch.device("meta"):
        network.build()
    assert {weight.device.type for weight in network.parameters()} == {"meta"}
    assert isinstance(network.language_model, AutoModelForCausalLM._model_mapping[LlamaConfig])


def test_fresh_rows_are_spread_as_the_table():
    torch.manual_seed(0)
    table = torch.randn(500, 3) * torch.tensor([1.0, 5.0, 0.1]) + torch.tensor([0.0, 2.0, -1.0])
    rows = rows_like(table.bfloat16(), 4000)
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float().std(dim=0), table.std(dim=0), rtol=0.1, atol=0.0)
    torch.testing.assert_close(rows.float().mean(dim=0), table.mean(dim=0), rtol=0.1, atol=0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a whole number of 1 or more"),
        ({"grid": (3, 2)}, r"grid must be three whole numbers of 1 or more \(blocks, rows, columns\), got \(3, 2\)"),
        ({"architecture": None}, "got neither"),
        ({"architecture": {"vocab_size": 3}}, "got none of model_type among"),
        ({"architecture": LLAMA | {"model_type": 3}}, "architecture must hold a model_type such as 'llama', got 3"),
        (
            {"architecture": LLAMA | {"vocab_size": 0}},
            r"architecture\['vocab_size'\] must be a whole number of 1 or more, got 0",
        ),
        ({"architecture": None, "pretrained": "no-such-folder"}, "'no-such-folder', which holds no config.json"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        TextVideoNetwork(**({"vocab_size": VIDEO, "grid": GRID, "architecture": LLAMA} | given))


@pytest.mark.parametrize("name", ["lama", "clip"])
def test_what_is_no_language_model_is_refused(name):
    network = TextVideoNetwork(VIDEO, GRID, architecture=LLAMA | {"model_type": name})
    with pytest.raises(ValueError, match=f"of which transformers has a causal language model, .* got '{name}'"):
        network.build()


def test_without_transformers_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"reco_lightning\[hf\]"):
        TextVideoNetwork(VIDEO, GRID, architecture=LLAMA).build()
