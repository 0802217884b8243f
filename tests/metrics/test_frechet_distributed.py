# SPDX-License-Identifier: Apache-2.0
"""The metrics on running sums in two processes with unequal shares, against one process with all clips."""

from __future__ import annotations

import pytest
import torch

from tests.helpers.processes import finish, launched
from tests.metrics.test_frechet_metric import KINDS, filled

pytestmark = pytest.mark.distributed


PROCESS = """
import os, sys, torch, torch.distributed as dist
from tests.metrics.test_frechet_metric import KINDS, clips_of
rank, folder = int(os.environ["LOCAL_RANK"]), sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = {}
for name, make in KINDS.items():
    metric, stored = make(), make()
    share = slice(0, 13) if rank == 0 else slice(13, None)
    metric.update(clips_of(40)[share], real=True)
    metric.update(clips_of(36, seed=1, dark=2)[share], real=False)
    metric.save_real(f"{folder}/{name}.npz")
    dist.barrier()
    stored.load_real(f"{folder}/{name}.npz")
    stored.update(clips_of(36, seed=1, dark=2)[share], real=False)
    found[name] = (metric.compute().item(), stored.compute().item(), metric.record()["clips"], stored.record()["clips"])
    assert metric.real_count.dtype == torch.float64 and metric.moments(real=True).clips == (13 if rank == 0 else 27)
torch.save(found, f"{folder}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_processes_give_the_number_of_one(tmp_path):
    (tmp_path / "process.py").write_text(PROCESS)
    with launched(tmp_path / "process.py", tmp_path) as processes:
        text = finish(processes, 300)
    assert [process.returncode for process in processes] == [0, 0], text
    for name, make in KINDS.items():
        alone = filled(make())
        for rank in range(2):
            value, stored, counts, stored_counts = torch.load(tmp_path / f"{rank}.pt")[name]
            assert value == pytest.approx(alone.compute().item(), rel=1e-9)
            assert stored == pytest.approx(value, rel=1e-12)
            assert counts == stored_counts == {"real": 40, "generated": 36}
