# SPDX-License-Identifier: Apache-2.0
"""`reco fit` on two nodes of one process each, over loopback, as torchrun and as SLURM start it; by DDP."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reco_lightning.cli.entry_point import main
from reco_lightning.data.tokens.shards import ClipSource, TokenShardWriter
from tests.helpers.processes import clean_environment, forked, free_port

pytestmark = pytest.mark.distributed

LIMIT = 900  # seconds after which a launch counts as hanging
NODES, BATCH = 2, 8  # the batch of both nodes together


def options(tokens: Path, output: Path, *, nodes: int) -> list[str]:
    """`reco fit` of the recipe, made small; four steps."""
    values = {
        "data.folder": tokens, "data.batch_size": BATCH // nodes, "data.val_fraction": 0.25,
        "model.network.dim": 32, "model.network.depth": 2, "model.network.heads": 2,
        "trainer.accelerator": "cpu", "trainer.num_nodes": nodes, "trainer.devices": 1,
        "trainer.strategy": "ddp" if nodes > 1 else "auto", "trainer.precision": "32-true", "trainer.max_epochs": 1,
        "trainer.enable_progress_bar": False, "trainer.enable_model_summary": False,
        "trainer.logger": "CSVLogger", "trainer.logger.save_dir": output,
    }  # fmt: skip
    return ["fit", "--config", "recipe:reco", *(f"--{name}={value}" for name, value in values.items())]


def torchrun(node: int, port: str, arguments: list[str]) -> AbstractContextManager[list[Any]]:
    line = ["--nnodes", str(NODES), "--nproc_per_node", "1", "--node_rank", str(node)]
    line += ["--master_addr", "127.0.0.1", "--master_port", port]
    return forked("torch.distributed.run", *line, "-m", "reco_lightning", *arguments)


def slurm(node: int, port: str, arguments: list[str]) -> AbstractContextManager[list[Any]]:
    """What `srun` tells a process in a job of two nodes with one task each."""
    job = {"JOB_ID": 1, "JOB_NAME": "train", "NTASKS": NODES, "NTASKS_PER_NODE": 1, "NNODES": NODES}
    task = {"PROCID": node, "LOCALID": 0, "NODEID": node, "NODELIST": "127.0.0.1"}
    told = {f"SLURM_{name}": str(value) for name, value in (job | task).items()}
    return forked("reco_lightning", *arguments, environment=clean_environment(MASTER_PORT=port, **told))


LAUNCHERS = {"torchrun": torchrun, "slurm": slurm}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    sources = [ClipSource(f"{number}.mp4", 0, 17) for number in range(48)]
    with TokenShardWriter(folder, vocab_size=16, grid=(5, 2, 2)) as writer:
        writer.write(np.random.default_rng(0).integers(0, 16, (48, 5, 2, 2)), np.arange(48), sources)
    return folder


@pytest.fixture(scope="module", params=LAUNCHERS)
def launch(request, tokens, tmp_path_factory):
    """Folder and words of a run on two nodes."""
    folder, port = tmp_path_factory.mktemp(request.param), free_port()
    with ExitStack() as stack:
        nodes = []
        for node in range(NODES):
            nodes += stack.enter_context(LAUNCHERS[request.param](node, port, options(tokens, folder, nodes=NODES)))
        texts = [node.communicate(timeout=LIMIT)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0] * NODES, "\n".join(texts)[-5000:]
    return folder, texts


@pytest.fixture(scope="module")
def single(tokens, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    main(options(tokens, folder, nodes=1))
    return weights(folder)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (checkpoint,) = folder.rglob("last.ckpt")
    stored = torch.load(checkpoint, weights_only=False)
    assert stored["global_step"] == 4
    return stored["state_dict"]


def test_two_nodes_are_one_process_with_the_joint_batch(launch, single):
    folder, texts = launch
    own = weights(folder)
    assert own.keys() == single.keys()
    for name, value in single.items():
        torch.testing.assert_close(
            own[name], value, atol=1e-6, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    words = "".join(texts)
    assert all(f"GLOBAL_RANK: {rank}, MEMBER: {rank + 1}/{NODES}" in words for rank in range(NODES))
    assert "engine 'frozen'" in words
