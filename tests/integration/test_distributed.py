# SPDX-License-Identifier: Apache-2.0
"""The callback on two processes of a CPU, by DDP and by FSDP2, against one process with the joint batch."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from tests.helpers.distributed import CASES, RANKS, STEPS, fit
from tests.helpers.processes import finish, launched

pytestmark = pytest.mark.distributed

LIMIT = 900  # seconds after which a launch counts as hanging
STRATEGIES = ("ddp", "fsdp2")
REFUSED = {"ddp": "refused-by-0", "fsdp2": "refused-by-1"}
FINISHED = [name for name in CASES if not name.startswith("refused")]
RUNS = {"ddp": FINISHED, "fsdp2": [name for name in FINISHED if not name.startswith("prefix-")]}
EQUAL = [(s, name) for s, names in RUNS.items() for name in names if name not in ("apart", "bfloat16")]


@pytest.fixture(scope="module")
def launches(tmp_path_factory):
    """Running processes and their folder, by strategy and whether the run is refused."""
    folder = tmp_path_factory.mktemp("distributed")
    cases = {(s, kind): RUNS[s] if kind == "fits" else [REFUSED[s]] for s in STRATEGIES for kind in ("fits", "refusal")}
    with ExitStack() as stack:
        running = {}
        for (strategy, kind), names in cases.items():
            own = folder / f"{strategy}-{kind}"
            own.mkdir()
            ranks = stack.enter_context(launched("tests.helpers.distributed", strategy, own, *names, ranks=RANKS))
            running[strategy, kind] = ranks, own
        yield running


@pytest.fixture(scope="module")
def single(launches):
    return {name: fit(name) for name in FINISHED}


@pytest.fixture(scope="module")
def ranks(launches):
    """What rank r saw of a case under a strategy, by (strategy, case, r)."""
    seen = {}
    for strategy in STRATEGIES:
        processes, folder = launches[strategy, "fits"]
        text = finish(processes, LIMIT)
        assert [process.returncode for process in processes] == [0] * RANKS, text[-5000:]
        for name in RUNS[strategy]:
            for rank in range(RANKS):
                seen[strategy, name, rank] = torch.load(folder / f"{name}.{rank}.pt", weights_only=True)
    return seen


def assert_equal(own, expected, **tolerances):
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(own[name], value, **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize(("strategy", "name"), EQUAL)
def test_two_processes_are_one_with_the_joint_batch(strategy, name, rank, single, ranks):
    own, expected = ranks[strategy, name, rank], single[name]
    assert own["windows"] == expected["windows"]
    assert len(own["gradients"]) == STEPS
    for one, other in zip(own["gradients"], expected["gradients"], strict=True):
        assert_equal(one, other, atol=1e-6, rtol=1e-5)
    assert_equal(own["weights"], expected["weights"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", [name for strategy, name in EQUAL if strategy == "fsdp2"])
def test_fsdp2_is_ddp(name, ranks):
    own, expected = ranks["fsdp2", name, 0], ranks["ddp", name, 0]
    assert own["windows"] == expected["windows"]
    assert_equal(own["weights"], expected["weights"], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bfloat16_weights_get_the_gradients_of_one_process_within_their_precision(strategy, single, ranks):
    expected = single["bfloat16"]["gradients"][0]
    own = ranks[strategy, "bfloat16", 0]["gradients"][0]
    assert {value.dtype for value in own.values()} == {torch.bfloat16}
    for name, value in expected.items():
        assert (own[name] - value).norm() <= 0.02 * value.norm(), name


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_rank_proves_the_windows_and_chooses_the_same_engine(strategy, single, ranks):
    for name in RUNS[strategy]:
        seen = [ranks[strategy, name, rank] for rank in range(RANKS)]
        assert all(0 <= one["proof"] < (5e-2 if name == "bfloat16" else 1e-5) for one in seen), name
        assert all(one["choice"] == single[name]["choice"] for one in seen), name


def test_windows_are_first_and_later_ones(single):
    assert single["reference"]["windows"] == [12, 18, 0, 12]
    assert single["reference-windows"]["windows"] == [9, 9, 3, 9]  # the mean of two


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("name", "prefix"), [("reference", "network.condition.weight"), ("prefix", "prompt")])
def test_what_a_window_does_not_train_gets_gradients_of_zero_and_not_none(strategy, name, prefix, ranks):
    seen = ranks[strategy, name, 1]
    for start, gradients in zip(seen["windows"], seen["gradients"], strict=True):
        assert None not in gradients.values()
        assert {key for key, value in gradients.items() if not value.any()} == (set() if start == 0 else {prefix})


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_windows_that_depend_on_the_rank_would_be_seen(strategy, single, ranks):
    seen = [ranks[strategy, "apart", rank] for rank in range(RANKS)]
    assert seen[0]["windows"] != seen[1]["windows"]
    difference = seen[0]["weights"]["network.head.weight"] - single["apart"]["weights"]["network.head.weight"]
    assert difference.abs().max() > 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_refusal_on_one_rank_ends_both_with_its_text(strategy, launches):
    processes, folder = launches[strategy, "refusal"]
    text = finish(processes, LIMIT)
    assert 0 not in [process.returncode for process in processes]
    assert "the loss covers 35 tokens of a sample, but the sampler's frame_blocks x tokens_per_block = 30" in text
    assert not list(folder.iterdir())
