# SPDX-License-Identifier: Apache-2.0
"""Sampling against transformers: the same function before the clocks are compared."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from reco_lightning.cli.entry_point import main
from reco_lightning.experiments.benchmark.sampling import GenerationSpeed, as_llama, compare_generation
from reco_lightning.models.transformer import VideoTransformer

pytestmark = pytest.mark.third_party


def build(**options):
    torch.manual_seed(0)
    arguments = {"vocab_size": 17, "grid": (12, 1, 1), "dim": 48, "depth": 3, "heads": 2, "start_token": False}
    network = VideoTransformer(**{**arguments, **options})
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1 + 0.2 * torch.randn(()))
    return network.eval()


@torch.no_grad()
def test_the_llama_has_the_same_logits():
    network = build()
    ids = torch.randint(17, (3, 12))
    # the last row predicts no token of the grid
    torch.testing.assert_close(as_llama(network)(ids).logits[:, :-1], network(ids)[:, :-1], atol=1e-4, rtol=1e-4)


def test_a_llama_has_no_rows_columns_or_start_token():
    for options in ({"grid": (3, 2, 2)}, {"start_token": True}):
        with pytest.raises(ValueError, match="network must have a grid of one row and one column and no start token"):
            as_llama(build(**options))


def test_both_sample_the_same_and_are_timed():
    state = torch.get_rng_state()
    speed = compare_generation(dim=32, depth=2, heads=2, vocab_size=16, tokens=24, batch=3, repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert speed.same_ids == 1
    assert min(speed.own, speed.transformers) > 0
    assert speed.setting == "cpu, float32, 2 blocks of width 32, 16 ids, 3 x 24 tokens"


def test_a_speed_in_words():
    text = str(GenerationSpeed(own=30.0, transformers=20.0, same_ids=1.0, setting="somewhere"))
    assert text.splitlines()[0] == "somewhere"
    assert "ratio 1.50, same ids without randomness: 100.0%" in text


@pytest.mark.slow
def test_the_command_line(tmp_path, capsys):
    sizes = "--sizes=[32x1x2,48x2x2]"
    options = ["--grid=[2,2,3]", "--vocab_size=16", "--precision=32", "--batch_size=2", "--device=cpu"]
    main(["benchmark", "--generation", sizes, *options, f"--output={tmp_path}"])
    found = json.loads((tmp_path / "generation.json").read_text())
    assert [one["setting"] for one in found] == [
        "cpu, float32, 1 blocks of width 32, 16 ids, 2 x 12 tokens",
        "cpu, float32, 2 blocks of width 48, 16 ids, 2 x 12 tokens",
    ]
    table = (tmp_path / "generation.md").read_text().splitlines()
    assert len(table) == 4
    assert table[2].startswith(f"| {found[0]['setting']} | {found[0]['own']:.1f} |")
    assert "ratio" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokens", "tokens must be a whole number of 2 or more"),
        ("repeats", "repeats must be a whole number of 1 or more"),
    ],
)
def test_errors(name, message):
    with pytest.raises(ValueError, match=message):
        compare_generation(**{name: 0})


def test_without_transformers_it_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"reco_lightning\[hf\]"):
        as_llama(build())
