# SPDX-License-Identifier: Apache-2.0
"""An evaluation killed (SIGKILL) at random moments, or out of disk: same scores, no id lost, none made twice."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal

import numpy as np
import pytest

from reco_lightning import EvaluateVideos
from reco_lightning.pipelines.evaluate import callback as evaluation
from tests.faults.runs import Moments, in_a_process
from tests.pipelines.evaluate.test_evaluate import evaluate, files  # noqa: F401  (a fixture)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*(fewer|features).*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork"),
]


def score(files, output, kill_at=None):  # noqa: F811
    moments = Moments(EvaluateVideos, "on_test_batch_end", kill_at)
    evaluate(files, output, "--evaluation.flow=false")
    (output / "moments").write_text(str(moments.count))


def ids(output):
    return {path.name: np.load(path).tolist() for path in (output / "ids").glob("*.npy")}


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):  # noqa: F811
    """An uninterrupted evaluation: its folder."""
    output = tmp_path_factory.mktemp("whole")
    code, said = in_a_process(lambda: score(files, output), output)
    assert code == 0, said
    return output


def assert_same(output, whole):
    one, two = (json.loads((folder / "evaluation.json").read_text())["scores"] for folder in (output, whole))
    assert one == two
    assert ids(output) == ids(whole)
    assert len(ids(whole)) == 5


def test_an_evaluation_killed_three_times_has_the_same_scores(files, whole, tmp_path):  # noqa: F811
    moments = int((whole / "moments").read_text())
    source, stamps = random.Random(1), {}
    for _ in range(3):
        kill_at = source.randint(1, moments // 3)
        code, said = in_a_process(lambda at=kill_at: score(files, tmp_path, at), tmp_path)
        assert code == -signal.SIGKILL, said
        assert ids(tmp_path).items() <= ids(whole).items()  # every file that there is, is whole
        stamps |= {path: path.stat().st_mtime_ns for path in (tmp_path / "ids").glob("*.npy") if path not in stamps}
    code, said = in_a_process(lambda: score(files, tmp_path), tmp_path)
    assert code == 0, said
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert stamps
    assert_same(tmp_path, whole)


def test_ids_that_do_not_fit_on_the_disk_are_named_and_made_later(files, whole, tmp_path, monkeypatch, capsys):  # noqa: F811
    save, output = np.save, tmp_path / "output"

    def full(file, array):
        if len(list(output.glob("ids/*.npy"))) == 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.np, "save", full)
        expected = (
            r"ids/00000003.npy cannot be written \(No space left on device\): ids generated before are kept: free"
        )
        with pytest.raises(SystemExit):
            evaluate(files, output, "--evaluation.flow=false")
        assert re.search(expected, capsys.readouterr().err)
    kept = ["00000000.npy", "00000001.npy", "00000002.npy", "settings.json"]
    assert sorted(path.name for path in (output / "ids").iterdir()) == kept
    code, said = in_a_process(lambda: score(files, output), tmp_path)
    assert code == 0, said
    assert_same(output, whole)
