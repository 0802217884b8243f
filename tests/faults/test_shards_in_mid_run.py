# SPDX-License-Identifier: Apache-2.0
"""Token shards that are cut off or vanish while they are read: an error that names the file, in any process."""

from __future__ import annotations

import re

import pytest

from reco_lightning import VideoModel
from reco_lightning.data.tokens.module import TokenDataModule
from reco_lightning.data.tokens.shards import TokenShards
from tests.faults.runs import before, config, fit, in_a_process, write_shards

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")


def cut(folder):
    for path in folder.glob("tokens-*.npy"):
        with open(path, "rb+") as file:
            file.truncate(100)


def vanish(folder):
    for path in folder.glob("tokens-*.npy"):
        path.unlink()


START = r"tokens-0000\d-\w+\.npy must stay there with its 320 bytes while it is read, got "
MESSAGES = {cut: START + "100 bytes", vanish: r"(?s)tokens-0000\d-\w+\.npy must .*No such file or directory"}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", MESSAGES)
def test_the_loader_names_the_file(tmp_path, fault, workers):
    shards = write_shards(tmp_path / "tokens", clips=24)

    def run():
        data = TokenDataModule(str(shards), batch_size=1, num_workers=workers, val_fraction=0)
        data.setup("fit")
        batches = iter(data.train_dataloader())
        next(batches)  # files are mapped, and the workers read ahead a few batches of 24
        fault(shards)
        list(batches)

    # its error holds the iterator: whichever test collects that waits for the workers, 5 s for each
    code, said = in_a_process(run, tmp_path)
    assert code == 1
    assert re.search(MESSAGES[fault], said), said


def test_a_table_that_is_cut_off_is_named(tmp_path):
    shards = TokenShards(write_shards(tmp_path))
    assert shards[0]["label"] == 0
    path = next(tmp_path.glob("clips-00000-*.npy"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        ValueError, match=rf"{path.name} must stay there with its 512 bytes .* got 503 bytes; .*: put it"
    ):
        shards[0]


@pytest.mark.slow
def test_a_fit_ends_with_that_message(tmp_path):
    tokens = write_shards(tmp_path / "tokens")

    def run():
        before(VideoModel, "on_train_batch_end", lambda call: vanish(tokens))
        fit(config(tokens, tmp_path / "run"))

    code, said = in_a_process(run, tmp_path)
    assert code == 2, said
    assert said.splitlines()[-1].startswith("reco fit: error: ")
    assert "got No such file or directory; it was changed meanwhile: put it back, and resume from the last" in said
