# SPDX-License-Identifier: Apache-2.0
"""Token shards: what is written is read back, and nothing wrong is written or read in silence."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from reco_lightning.data.tokens.manifest import MANIFEST, file_sha256, read_manifest
from reco_lightning.data.tokens.shards import ClipSource, TokenShards, TokenShardWriter
from reco_lightning.data.tokens.writer import check_ids, token_dtype

GRID = (3, 2, 2)


def random_ids(count, vocab_size=100, seed=0):
    return torch.randint(0, vocab_size, (count, *GRID), generator=torch.Generator().manual_seed(seed))


def write(folder, ids=None, *, labels=None, sources=None, vocab_size=100, **options):
    with TokenShardWriter(folder, vocab_size=vocab_size, grid=GRID, **options) as writer:
        writer.write(random_ids(7) if ids is None else ids, labels, sources)
    return TokenShards(folder)


def edit_manifest(folder, **values):
    path = folder / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(100, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_ids_labels_and_sources_come_back(tmp_path, vocab_size, dtype):
    ids = random_ids(7, vocab_size)
    ids[0, 0, 0, 0], ids[6, 2, 1, 1] = vocab_size - 1, 0
    labels = torch.tensor([0, 1, 1, 0, 1, 0, 1])
    sources = [ClipSource(f"{n % 2}.mp4", 10 * n, 10 * n + 9, 2) for n in range(7)]
    with TokenShardWriter(
        tmp_path,
        vocab_size=vocab_size,
        grid=GRID,
        classes=["a", "b"],
        shard_size=3,
        tokenizer="net",
        video={"size": [8, 8]},
    ) as writer:
        for part in (slice(0, 2), slice(2, 7)):  # batches need not be shards
            writer.write(ids[part], labels[part], sources[part])
    shards = TokenShards(tmp_path)
    assert len(shards) == 7
    assert [shard.clips for shard in shards.manifest.shards] == [3, 3, 1]
    assert (shards.vocab_size, shards.grid, shards.classes) == (vocab_size, GRID, ("a", "b"))
    assert (shards.manifest.dtype, shards.manifest.tokenizer, shards.manifest.video) == (dtype, "net", {"size": [8, 8]})
    assert shards.manifest.sources == ("0.mp4", "1.mp4")
    for n in range(7):
        assert shards[n]["tokens"].dtype == torch.int64
        assert torch.equal(shards[n]["tokens"], ids[n].flatten())
        assert shards[n]["label"] == labels[n]
        assert shards.source(n) == sources[n]
    assert torch.equal(shards[-1]["tokens"], shards[6]["tokens"])
    assert shards.table()[:, 0].tolist() == labels.tolist()
    shards.verify()


def test_sources_and_labels_are_optional(tmp_path):
    shards = write(tmp_path)
    assert shards.source(0) is None
    assert {int(shards[n]["label"]) for n in range(7)} == {0}


def test_ids_on_no_grid(tmp_path):
    ids = torch.arange(12).view(3, 4)
    with TokenShardWriter(tmp_path, vocab_size=12, grid=(4,), frame_aligned=False) as writer:
        with pytest.raises(ValueError, match=r"ids must have shape \(n, 4\), got \(1, 2, 2\)"):
            writer.write(ids[:1].view(1, 2, 2))
        with pytest.raises(ValueError, match=r"ids must be 0 to 11, got 12 in clip 1 at place \(3,\)"):
            writer.write(ids[1:] + 1)
        writer.write(ids)
    shards = TokenShards(tmp_path)
    assert (shards.grid, shards.manifest.tokens, shards.manifest.frame_aligned) == ((4,), 4, False)
    assert torch.equal(torch.stack([shards[n]["tokens"] for n in range(3)]), ids)
    with pytest.raises(ValueError, match=r"grid must be \(t, h, w\) where ids are in order of time, got \(4,\)"):
        TokenShardWriter(tmp_path / "other", vocab_size=12, grid=(4,))
    assert not (tmp_path / "other").exists()


def test_captions_come_back(tmp_path):
    with TokenShardWriter(tmp_path, vocab_size=100, grid=GRID, shard_size=2) as writer:
        writer.write(random_ids(2), captions=["A cat.", None])
        writer.write(random_ids(1))
        writer.write(random_ids(3), captions=["A dog.", "", "A cat."])
        with pytest.raises(ValueError, match="captions must be one per clip, got 2 for 1 clips"):
            writer.write(random_ids(1), captions=["A dog.", "A cat."])
    shards = TokenShards(tmp_path)
    assert [shards.caption(n) for n in range(6)] == ["A cat.", None, None, "A dog.", "", "A cat."]
    assert shards.table()[:, 5].tolist() == [0, -1, -1, 1, 2, 0]


def test_a_folder_written_before_there_were_captions_is_read(tmp_path):
    sources = [ClipSource("a.mp4", 9 * n, 9 * n + 9) for n in range(7)]
    table = write(tmp_path, sources=sources, shard_size=4).table()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for shard in manifest["shards"]:
        path = tmp_path / shard["table"]["file"]
        np.save(path, np.load(path)[:, :5])
        shard["table"].update(bytes=path.stat().st_size, sha256=file_sha256(path))
    manifest["columns"] = manifest["columns"][:5]
    for key in ("frame_aligned", "captions"):
        del manifest[key]
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    old = TokenShards(tmp_path)
    old.verify()
    assert old.manifest.frame_aligned
    assert np.array_equal(old.table(), table)
    assert [old.source(n) for n in range(7)] == sources
    assert old.caption(0) is None


def test_the_workspace_of_a_killed_writer_is_used_again(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "tokens-00000.npy").touch()
    write(tmp_path / "tokens", workspace=tmp_path / "work")
    assert not (tmp_path / "work").exists()
    assert len(list((tmp_path / "tokens").iterdir())) == 3


def test_index_out_of_range(tmp_path):
    shards = write(tmp_path)
    for index in (7, -8):
        with pytest.raises(IndexError, match=f"index must be below 7, the number of clips, got {index}"):
            shards[index]


@pytest.mark.slow
def test_files_are_mapped_lazily_and_in_each_process_for_itself(tmp_path):
    shards = write(tmp_path)
    assert shards._maps == {}
    first = shards[0]["tokens"]
    assert all(isinstance(array, np.memmap) for array in shards._maps.values())
    copy = pickle.loads(pickle.dumps(shards))
    assert copy._maps == {}
    assert torch.equal(copy[0]["tokens"], first)
    batch = next(iter(DataLoader(shards, 7, num_workers=1, multiprocessing_context="spawn")))
    assert torch.equal(batch["tokens"], random_ids(7).flatten(1))


def test_a_tensor_does_not_reach_into_the_file(tmp_path):
    shards = write(tmp_path)
    shards[0]["tokens"].fill_(0)
    assert torch.equal(shards[0]["tokens"], random_ids(7)[0].flatten())


def test_same_content_gives_the_same_files(tmp_path):
    write(tmp_path / "one")
    write(tmp_path / "two")
    names = [sorted(path.name for path in (tmp_path / folder).iterdir()) for folder in ("one", "two")]
    assert names[0] == names[1]
    assert len(names[0]) == 3  # ids, table, manifest: nothing temporary is left


def test_existing_shards_are_not_overwritten(tmp_path):
    write(tmp_path)
    with pytest.raises(ValueError, match=rf"folder must not hold token shards yet, got .*{MANIFEST}.*overwrite=True"):
        write(tmp_path)
    (tmp_path / MANIFEST).unlink()  # as if its writing had been cut off
    with pytest.raises(ValueError, match=r"folder must not hold token shards yet, got .*clips-00000"):
        write(tmp_path)
    new = write(tmp_path, random_ids(2, seed=1), overwrite=True)
    assert len(new) == 2
    assert len(list(tmp_path.iterdir())) == 3  # the old shards are gone


def test_shards_that_appear_meanwhile_are_not_overwritten(tmp_path):
    writer = TokenShardWriter(tmp_path, vocab_size=100, grid=GRID)
    writer.write(random_ids(1))
    write(tmp_path)
    with pytest.raises(ValueError, match="folder must not hold token shards yet"):
        writer.close()
    assert len(TokenShards(tmp_path)) == 7
    assert len(list(tmp_path.iterdir())) == 3


def test_an_exception_changes_nothing(tmp_path):
    write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writers = []

    def interrupted():
        with TokenShardWriter(tmp_path, vocab_size=100, grid=GRID, shard_size=1, overwrite=True) as writer:
            writers.append(writer)
            writer.write(random_ids(2, seed=1))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        interrupted()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(ValueError, match="write must come before close"):
        writers[0].write(random_ids(1))


def test_a_folder_without_a_clip_is_refused(tmp_path):
    with pytest.raises(ValueError, match="token shards must hold at least one clip, got none"):
        TokenShardWriter(tmp_path, vocab_size=100, grid=GRID).close()
    assert list(tmp_path.iterdir()) == []


def test_writer_argument_errors(tmp_path):
    with pytest.raises(
        ValueError, match=r"grid must be three positive numbers \(t, h, w\), or one \(N,\), got \(1, 0, 2\)"
    ):
        TokenShardWriter(tmp_path, vocab_size=8, grid=(1, 0, 2))
    with pytest.raises(ValueError, match="shard_size must be a whole number of 1 or more, got 0"):
        TokenShardWriter(tmp_path, vocab_size=8, grid=GRID, shard_size=0)
    with pytest.raises(ValueError, match=r"vocab_size must be 1 to 2\*\*32, got 0"):
        token_dtype(0)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match="folder must be a folder for token shards, got the file"):
        TokenShardWriter(file, vocab_size=8, grid=GRID)


def test_what_does_not_fit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="ids must be integers, got float32"):
        check_ids(torch.zeros(1, *GRID), grid=GRID, vocab_size=8)
    with pytest.raises(ValueError, match=r"ids must have shape \(n, 3, 2, 2\), got \(1, 2, 2, 3\)"):
        check_ids(torch.zeros(1, 2, 2, 3, dtype=torch.int64), grid=GRID, vocab_size=8)
    ids = random_ids(3, 8)
    ids[2, 1, 0, 1] = 8
    with pytest.raises(ValueError, match=r"ids must be 0 to 7, got 8 in clip 2 at \(t, h, w\) \(1, 0, 1\)"):
        write(tmp_path, ids, vocab_size=8)
    ids[2, 1, 0, 1] = -1
    with pytest.raises(ValueError, match="got -1 in clip 2"):
        write(tmp_path, ids, vocab_size=8)
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(7,\), got int64 of shape \(6,\)"):
        write(tmp_path, labels=np.zeros(6, np.int64))
    with pytest.raises(ValueError, match=r"labels must be integers of shape \(7,\), got float32"):
        write(tmp_path, labels=torch.zeros(7))
    with pytest.raises(ValueError, match="labels must be 0 to 1, the places in classes, got 2"):
        write(tmp_path, labels=np.full(7, 2), classes=["a", "b"])
    with pytest.raises(ValueError, match="labels must be 0 or more, got -3"):
        write(tmp_path, labels=np.full(7, -3))
    with pytest.raises(ValueError, match="sources must be one per clip, got 1 for 7 clips"):
        write(tmp_path, sources=[ClipSource("a", 0, 1)])
    with pytest.raises(ValueError, match="sources must have 0 <= start < stop and stride >= 1, got ClipSource"):
        write(tmp_path, sources=[ClipSource("a", 5, 5)] * 7)
    assert list(tmp_path.iterdir()) == []


def test_damage_is_named(tmp_path):
    shards = write(tmp_path)
    stored = shards.manifest.shards[0].tokens
    path = tmp_path / stored.file
    content = path.read_bytes()

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    found = file_sha256(path)
    with pytest.raises(ValueError, match=f"{stored.file} must have the SHA-256 {stored.sha256} .* got {found}"):
        TokenShards(tmp_path).verify()

    path.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=f"{stored.file} must have the {len(content)} bytes .* got {len(content) - 3}"):
        TokenShards(tmp_path)

    path.unlink()
    with pytest.raises(ValueError, match=f"{stored.file} must exist, .* but is missing"):
        TokenShards(tmp_path)


def replace_tokens(folder, content):
    """Put another file in the place of the ids, with the size and checksum to match."""
    manifest = json.loads((folder / MANIFEST).read_text())
    stored = manifest["shards"][0]["tokens"]
    path = folder / stored["file"]
    path.write_bytes(content)
    stored.update(bytes=len(content), sha256=file_sha256(path))
    edit_manifest(folder, shards=manifest["shards"])
    return path


def test_an_array_of_another_shape_or_dtype_is_named(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "other.npy", np.zeros((7, 3, 2, 1), np.int32))
    replace_tokens(tmp_path, (tmp_path / "other.npy").read_bytes())
    expected = r"must hold uint16 of shape \(7, 3, 2, 2\), as manifest.json says, got int32 of shape \(7, 3, 2, 1\)"
    with pytest.raises(ValueError, match=expected):
        TokenShards(tmp_path)[0]


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("code was executed on load",))


def test_nothing_is_executed_on_load(tmp_path):
    write(tmp_path)
    np.save(tmp_path / "bomb.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    path = replace_tokens(tmp_path, (tmp_path / "bomb.npy").read_bytes())
    with pytest.raises(ValueError, match=f"{path.name} must be a .npy file of numbers"):
        TokenShards(tmp_path)[0]
    path = replace_tokens(tmp_path, pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=f"{path.name} must be a .npy file of numbers"):
        TokenShards(tmp_path)[0]


def test_manifest_errors(tmp_path):
    with pytest.raises(ValueError, match=f"folder must hold token shards, got .* without a {MANIFEST}"):
        TokenShards(tmp_path)
    write(tmp_path)
    good = (tmp_path / MANIFEST).read_text()
    assert read_manifest(tmp_path).clips == 7

    def broken(message, **values):
        (tmp_path / MANIFEST).write_text(good)
        edit_manifest(tmp_path, **values)
        with pytest.raises(ValueError, match=message):
            TokenShards(tmp_path)

    broken("version 1, .*, got 'reco_lightning.tokens', version 2", version=2)
    broken("must be of format 'reco_lightning.tokens'.*got 'other'", format="other")
    broken("must count its clips right, got clips 8 and 7 in its shards", clips=8)
    broken("must name dtype uint16 or uint32, got 'object'", dtype="object")
    broken("must have a positive grid and vocabulary", vocab_size=0)
    broken("a value is missing or wrong", grid=[1, 2])
    shards = json.loads(good)["shards"]
    shards[0]["tokens"]["file"] = "../outside.npy"
    broken("must name .npy files beside it, got '../outside.npy'", shards=shards)
    for text in ("{", "[]", "{}"):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(ValueError, match="must be a manifest of token shards, but cannot be read as one"):
            TokenShards(tmp_path)
