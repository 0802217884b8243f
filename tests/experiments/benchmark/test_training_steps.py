# SPDX-License-Identifier: Apache-2.0
"""``reco benchmark`` measures real steps of every method and writes what it found."""

from __future__ import annotations

import json

import pytest
import torch

from reco_lightning.cli.entry_point import main
from reco_lightning.experiments.benchmark.command import benchmark, benchmark_figure, benchmark_table
from reco_lightning.experiments.benchmark.training_steps import (
    METHODS,
    Measurement,
    StepBenchmark,
    matrix_rate,
    network_of_size,
)

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    network = network_of_size("32x2x2", vocab_size=32, grid=(5, 2, 2))
    before = network.head.weight.clone()
    steps = StepBenchmark(network, "32x2x2", batch_size=2, device=CPU)
    steps.warm_up(1)
    measured = steps.measure(4, rate=1e9)
    assert not torch.equal(network.head.weight, before)  # the optimizer's step is part of what is measured
    assert not [part for part in network.modules() if "forward" in vars(part)]
    return {one.method: one for one in measured}


def test_measures_every_method_against_the_plain_step(found):
    assert list(found) == list(METHODS)
    plain = found["plain"]
    assert plain.speed_up == plain.promised == 1.0
    for one in found.values():
        assert one.seconds > 0
        assert one.speed_up == pytest.approx(plain.seconds / one.seconds)
        assert one.promised == pytest.approx(plain.operations / one.operations)
        assert one.tokens_per_second == pytest.approx(2 * 20 / one.seconds)
        assert one.utilisation == pytest.approx(one.operations / one.seconds / 1e9)


def test_counts_are_ordered_as_the_methods_are(found):
    operations = [found[name].operations for name in ("fewer-frames", "reco", "local-opt", "plain")]
    assert operations == sorted(operations)
    assert found["reco"].saved_bytes < found["plain"].saved_bytes / 2 * 1.1


def test_the_rate_of_matrix_products_is_not_that_of_a_timer():
    assert 1e8 < matrix_rate(CPU, torch.float32, seconds=0.2) < 1e14


def test_command_writes_table_json_and_figure(tmp_path, capsys):
    options = ["--sizes", "[32x2x2,48x2x2]", "--grid", "[5,2,2]", "--vocab_size", "32", "--steps", "1"]
    main(["benchmark", *options, "--burn_in", "0", "--precision", "32", "--device", "cpu", "--output", str(tmp_path)])
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert [one["size"] for one in written["measurements"]] == ["32x2x2"] * 4 + ["48x2x2"] * 4
    assert written["setting"]["grid"] == [5, 2, 2]
    table = benchmark_table([Measurement(**one) for one in written["measurements"]])
    assert table in (tmp_path / "benchmark.md").read_text()
    assert table in capsys.readouterr().out
    assert (tmp_path / "benchmark.png").stat().st_size > 1000


def test_figure_has_a_bar_for_each_size_and_method(found):
    _, axes = benchmark_figure(list(found.values()))
    assert [len(ax.patches) for ax in axes] == [4, 4]
    assert axes[0].get_ylabel() == "step time (ms)"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sizes": ["32m"]}, "size must be one of 110m, 343m, 770m, or WIDTHxDEPTHxHEADS"),
        ({"methods": ["reco"]}, "methods must hold 'plain'"),
        ({"methods": ["plain", "fast"]}, "got plain, fast"),
        ({"steps": 0}, "steps must be a whole number of 1 or more, got 0"),
    ],
)
def test_refuses_what_cannot_be_measured(options, match, tmp_path):
    settings = {"sizes": ["32x2x2"], "grid": (5, 2, 2), "vocab_size": 32, "device": "cpu", "precision": "32"}
    with pytest.raises(ValueError, match=match):
        benchmark(**(settings | options), output=str(tmp_path))
