# SPDX-License-Identifier: Apache-2.0
"""The 7B text-to-video recipe: parsed, counted on the meta device, and its sharding run on two processes when small."""

from __future__ import annotations

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from reco_lightning.cli.entry_point import main
from reco_lightning.models.text_video.network import TextVideoNetwork
from tests.helpers.distributed import RANKS, STEPS
from tests.helpers.processes import finish, launched
from tests.helpers.text_video import CASES, SMALL, fit, recipe

pytestmark = pytest.mark.distributed

LIMIT = 900  # seconds after which the launch counts as hanging


def test_the_recipe_has_the_parameters_of_llama_2_7b_and_the_video_ids():
    network = TextVideoNetwork(**recipe()["network"]["init_args"])
    with torch.device("meta"):
        network.build()
    width, inner, layers, ids = 4096, 11008, 32, 32000 + 8192 + 1  # text, video, the start of a video
    layer = 4 * width * width + 3 * width * inner + 2 * width  # attention, feed-forward, two norms
    by_hand = 2 * ids * width + layers * layer + width  # embedding and head, layers, last norm
    assert by_hand == 6_738_415_616 + 2 * (8192 + 1) * width == 6_805_532_672  # the first is Llama-2-7B's own number
    assert sum(weight.numel() for weight in network.parameters()) == by_hand
    assert {weight.device.type for weight in network.parameters()} == {"meta"}


@pytest.mark.parametrize("pieces", [("data/vimeo", "model/llama-7b", "method/reco"), ("data/msrvtt", "model/llama-7b")])
def test_the_pieces_parse_as_one_run(pieces, capsys):
    options = [part for piece in pieces for part in ("--config", f"recipe:{piece}")]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *options, "--print_config"])
    assert not ended.value.code
    run = yaml.safe_load(capsys.readouterr().out)
    assert run["model"]["class_path"] == "reco_lightning.models.text_video.lightning_module.TextVideoModel"
    assert run["model"]["init_args"]["gradient_checkpointing"] is True
    assert run["data"]["class_path"] == "reco_lightning.data.tokens.caption_module.CaptionDataModule"
    assert run["data"]["init_args"]["batch_size"] == 4
    assert run["trainer"]["precision"] == "bf16-mixed"
    strategy = run["trainer"]["strategy"]
    assert strategy["class_path"] == "lightning.pytorch.strategies.ModelParallelStrategy"
    assert strategy["init_args"]["data_parallel_size"] == run["trainer"]["devices"] == 8
    callbacks = [callback["class_path"].split(".")[-1] for callback in run["trainer"]["callbacks"] or []]
    assert callbacks == ["ReCoCallback"][: len(pieces) - 2]


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What one process and both of two saw of every case, by (case, None or rank)."""
    folder = tmp_path_factory.mktemp("seven")
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder / "llama")
    with launched("tests.helpers.text_video", folder, *CASES, ranks=RANKS) as processes:
        found = {(name, None): fit(name, folder) for name in CASES}
        text = finish(processes, LIMIT)
    assert [process.returncode for process in processes] == [0] * RANKS, text[-5000:]
    for name in CASES:
        for rank in range(RANKS):
            found[name, rank] = torch.load(folder / f"{name}.{rank}.pt", weights_only=True)
    return found


@pytest.mark.parametrize("name", CASES)
def test_every_parameter_is_sharded_over_both_processes(name, seen):
    plans = [seen[name, rank]["plan"] for rank in range(RANKS)]
    assert plans[0].keys() == plans[1].keys() == seen[name, None]["weights"].keys()
    for parameter, (whole, here, how) in plans[0].items():
        assert how == "(Shard(dim=0),) on 2", parameter
        assert here[1:] == whole[1:], parameter
        assert here[0] + plans[1][parameter][1][0] == whole[0], parameter


def assert_equal(own, expected):
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            own[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", CASES)
def test_two_processes_are_one_with_the_joint_batch(name, rank, seen):
    own, expected = seen[name, rank], seen[name, None]
    assert own["windows"] == expected["windows"]
    assert min(own["windows"]) == 0 < max(own["windows"])
    assert len(own["gradients"]) == STEPS
    for one, other in zip(own["gradients"], expected["gradients"], strict=True):
        assert_equal(one, other)
    assert_equal(own["weights"], expected["weights"])


@pytest.mark.parametrize("name", CASES)
def test_shards_are_sampled_together(name, seen):
    videos = [seen[name, rank]["videos"] for rank in (None, *range(RANKS))]
    assert videos[0].equal(videos[1])
    assert videos[0].equal(videos[2])
