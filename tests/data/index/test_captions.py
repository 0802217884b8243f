# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from reco_lightning.data.index.captions import read_captions

FILES = ["cats/a.mp4", "dogs/ß b.mp4"]


def read(folder, *lines):
    path = folder / "captions.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_captions(path, files=FILES)


def test_captions_by_file(tmp_path):
    found = read(
        tmp_path,
        '{"file": "dogs/ß b.mp4", "caption": "Ein Hund.", "source": 3}',
        "",
        '{"file": "./cats/a.mp4", "caption": ""}',
    )
    assert found == {"dogs/ß b.mp4": "Ein Hund.", "cats/a.mp4": ""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("cats/a.mp4: a cat", r"captions must be lines such as .*, got 'cats/a.mp4: a cat' \(.*line 2\)"),
        ('["cats/a.mp4"]', r"captions must be lines such as .*line 2"),
        ('{"file": "cats/a.mp4"}', r"captions must be lines such as .*line 2"),
        ('{"file": "cats/a.mp4", "caption": 3}', r"captions must be lines such as .*line 2"),
        ('{"file": "a.mp4", "caption": "x"}', r"captions must name files .* as 'cats/a.mp4', got 'a.mp4', .*line 2"),
        ('{"file": "dogs/ß b.mp4", "caption": "x"}', r"captions must be one per file, got a second one .*line 2"),
    ],
)
def test_lines_that_are_wrong_are_named(tmp_path, line, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, '{"file": "dogs/ß b.mp4", "caption": "A dog."}', line)


def test_no_file(tmp_path):
    with pytest.raises(
        ValueError, match=r"captions must be an existing file of JSON lines, got .*missing.jsonl' \(no such file\)"
    ):
        read_captions(tmp_path / "missing.jsonl", files=FILES)
