# SPDX-License-Identifier: Apache-2.0
"""Sampling behind captions against a loop without a cache, a batch of one and two passes."""

from __future__ import annotations

import pytest
import torch

from reco_lightning.data.tokens.caption_ids import load_text_tokenizer
from reco_lightning.models.sampling.token_sampling import per_sample_uniforms, sample_token
from reco_lightning.models.text_video.generate import generate_from_text
from tests.helpers.words import save_words
from tests.models.text_video.test_network import TEXT, VIDEO, build

CAPTIONS = torch.tensor([[-1, -1, 4], [8, 2, 10], [-1, -1, -1], [-1, 5, 4]])


def by_hand(network, captions, *, scale=1.0, seed=0, indices=None, **options):
    """One video after the other, all rows run for every token, the caption unpadded."""
    videos = []
    for index, caption in zip(indices or range(len(captions)), captions, strict=True):
        given, none = caption[caption >= 0][None], torch.empty(1, 0, dtype=torch.long)
        tokens = torch.empty(1, 0, dtype=torch.long)
        for draw in per_sample_uniforms(seed, [index], network.num_tokens):
            with torch.no_grad():
                logits = network(given, tokens)[:, -1, TEXT : TEXT + VIDEO]
                if scale != 1:
                    free = network(none, tokens)[:, -1, TEXT : TEXT + VIDEO]
                    logits = free + scale * (logits - free)
            tokens = torch.cat([tokens, sample_token(logits, uniform=draw, **options)[:, None]], dim=1)
        videos.append(tokens)
    return torch.cat(videos)


def sharp():
    """A network whose ids depend on the caption."""
    network = build()
    with torch.no_grad():
        network.language_model.get_output_embeddings().weight.mul_(15)
    return network


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 4, "top_p": 0.9}, {"temperature": 0}], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
def test_videos_are_those_of_a_loop_without_cache(scale, options):
    network = sharp()
    expected = by_hand(network, CAPTIONS, scale=scale, seed=3, **options)
    assert generate_from_text(network, CAPTIONS, cfg_scale=scale, seed=3, **options).equal(expected)


def test_a_video_depends_on_seed_index_and_caption_alone():
    network = sharp()
    whole = generate_from_text(network, CAPTIONS, seed=1, cfg_scale=2.0)
    parts = generate_from_text(network, CAPTIONS, seed=1, cfg_scale=2.0, batch_size=3)
    one = generate_from_text(network, CAPTIONS[1:2], seed=1, cfg_scale=2.0, indices=[1])
    assert parts.equal(whole)
    assert one.equal(whole[1:2])
    assert not generate_from_text(network, CAPTIONS, seed=2, cfg_scale=2.0).equal(whole)


def test_scale_0_forgets_the_caption_and_padding_alone_is_none():
    network = sharp()
    assert generate_from_text(network, CAPTIONS, cfg_scale=0.0).equal(
        generate_from_text(network, torch.full_like(CAPTIONS, -1))
    )


def test_only_video_ids_are_drawn():
    network = build()
    with torch.no_grad():  # the network would rather say a word
        network.language_model.get_output_embeddings().weight[:TEXT] *= 1000
    tokens = generate_from_text(network, CAPTIONS.repeat(8, 1))
    assert sorted(tokens.unique().tolist()) == list(range(VIDEO))


def test_random_state_and_modes_are_left_alone():
    network = build().train()
    network.language_model.model.layers[0].eval()
    state, steps = torch.get_rng_state(), []
    generate_from_text(network, CAPTIONS, batch_size=3, progress=lambda done, total: steps.append((done, total)))
    assert torch.get_rng_state().equal(state)
    assert network.training
    assert not network.language_model.model.layers[0].training
    assert steps[-1] == (24, 24)
    assert steps == sorted(steps)


def test_texts_go_through_the_tokenizer(tmp_path):
    folder = save_words(tmp_path, ["red", "square"])
    network, texts = sharp(), ["red", "red square blue"]
    expected = generate_from_text(network, torch.tensor([[-1, -1, 0], [0, 1, 2]]))
    assert generate_from_text(network, texts, tokenizer=load_text_tokenizer(folder)).equal(expected)
    assert generate_from_text(network, texts, tokenizer=folder).equal(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"temperature": -1.0}, "temperature must be a finite number of 0 or more"),
        ({"top_k": 0}, "top_k must be a whole number of 1 or more or None"),
        ({"top_p": 1.5}, r"top_p must lie in \(0, 1\]"),
        ({"cfg_scale": -0.5}, "cfg_scale must be a finite number of 0 or more"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more"),
        ({"indices": [1]}, "indices must be 4 numbers"),
        ({"captions": ["red"]}, "tokenizer must be the text tokenizer or its folder"),
        ({"captions": []}, "captions must be one or more"),
        ({"captions": torch.tensor([[TEXT]])}, "below the network's 11 text ids"),
        ({"captions": torch.tensor([1, 2])}, r"ids of shape \(n, C\)"),
    ],
)
def test_bad_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        generate_from_text(build(), **({"captions": CAPTIONS} | given))


def test_a_network_that_is_not_built_is_refused():
    network = build()
    network.language_model = None
    with pytest.raises(ValueError, match=r"model must be .*, got a TextVideoNetwork, which is not built"):
        generate_from_text(network, CAPTIONS)
