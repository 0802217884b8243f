# SPDX-License-Identifier: Apache-2.0
"""Tokenising by several processes, killed at any moment: no clip is lost or doubled, and the shards are the same."""

from __future__ import annotations

import multiprocessing
import os
import signal
import warnings
from types import SimpleNamespace

import lightning.pytorch as L
import numpy as np
import pytest
import torch

from reco_lightning.callbacks.stop_on_signal import STOPPED
from reco_lightning.data.tokens import writer as token_writer
from reco_lightning.data.tokens.manifest import read_manifest
from reco_lightning.data.tokens.shards import ClipSource, TokenShards
from reco_lightning.data.video.clip import read_clip
from reco_lightning.pipelines.tokenize import encoding
from reco_lightning.pipelines.tokenize import partial_output as unfinished
from reco_lightning.pipelines.tokenize import run as tokenize
from reco_lightning.pipelines.tokenize.run import _placement, tokenize_folder
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.processes import run_module, send_from_outside

FRAMES = {"a/one.mp4": 14, "a/two.mp4": 9, "b/three.mp4": 23}
# Python warns of it from 3.12 on; the processes here compute with one thread, see _one_thread
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork")]
CLIPS = [(name, start) for name, frames in FRAMES.items() for start in range(0, frames - 4, 2)]  # 5 + 3 + 10


class Brightness:
    """Ids that can be computed by hand: mean brightness of 16 x 16 pixels of every second frame. It can be killed."""

    codebook_size, temporal_stride, spatial_stride, frame_aligned = 256, 2, 16, True

    def __init__(self, kill_at=None, stop_at=None):
        self.kill_at, self.stop_at, self.encoded = kill_at, stop_at, []

    def grid(self, frames, height, width):
        return 1 + (frames - 1) // 2, height // 16, width // 16

    def encode(self, video):
        if len(self.encoded) == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self.encoded) == self.stop_at:
            send_from_outside(signal.SIGTERM, group=True)
        self.encoded.append(len(video))
        return brightness(((video + 1) * 127.5).round().to(torch.uint8))

    def decode(self, ids, *, clamp=False): ...


def brightness(video):
    """uint8 (B, 3, T, H, W) to ids (B, t, h, w)."""
    cells = video[:, :, ::2].double().unflatten(-1, (-1, 16)).unflatten(-3, (-1, 16))
    return cells.mean((1, 4, 6)).long()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Keeps scans out of the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _one_thread():
    """A forked process must not wait for threads that were not forked with it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def videos(tmp_path):
    random = np.random.default_rng(0)
    for name, frames in FRAMES.items():
        write_video(tmp_path / "videos" / name, random.integers(0, 256, (frames, 48, 64, 3), np.uint8))
    return tmp_path / "videos"


def run(videos, output, **options):
    usual = {"tokenizer": Brightness(), "frames": 5, "size": 32, "clip_step": 2, "batch_size": 4, "num_workers": 0}
    options = usual | options
    return tokenize_folder(
        videos=str(videos), output=str(output), progress=False, device="cpu", shard_size=7, **options
    )


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(*args, **options):
    """Run in a process of its own, which has to die by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=run, args=args, kwargs=options)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def done(output, vocab_size=256, grid=(3, 2, 2)):
    work = unfinished.PartialTokens(output / ".unfinished", grid=grid, vocab_size=vocab_size, clips=len(CLIPS))
    return np.flatnonzero(work.read().done).tolist()


def check(folder, videos):
    """Every clip is there once, in order, with the ids that its own pixels give."""
    shards = TokenShards(folder)
    shards.verify()
    sources = [ClipSource(name, start, start + 5, 1) for name, start in CLIPS]
    assert [shards.source(index) for index in range(len(shards))] == sources
    for index, (name, start) in enumerate(CLIPS):
        pixels = read_clip(videos / name, start=start, frames=5, size=32)  # (T, H, W, 3)
        ids = brightness(torch.from_numpy(pixels).permute(3, 0, 1, 2)[None])
        assert torch.equal(shards[index]["tokens"], ids.flatten())
        assert shards[index]["label"] == (name[0] == "b")
    assert [shard.clips for shard in shards.manifest.shards] == [7, 7, 4]


def in_a_group(*args, **options):
    os.setpgid(0, 0)
    run(*args, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_whole_group_ends_the_run_after_the_batch_at_hand(videos, tmp_path, workers):
    options = {"tokenizer": Brightness(stop_at=1), "num_workers": workers}
    process = multiprocessing.get_context("fork").Process(
        target=in_a_group, args=(videos, tmp_path / "t"), kwargs=options
    )
    process.start()
    process.join(120)
    assert process.exitcode == STOPPED
    assert done(tmp_path / "t") == list(range(8))
    check(run(videos, tmp_path / "t"), videos)


def test_workers_read_by_default_and_the_shards_are_the_same(videos, tmp_path, monkeypatch):
    read_by = multiprocessing.get_context("fork").SimpleQueue()
    honest = tokenize.VideoFolder.read
    monkeypatch.setattr(tokenize.VideoFolder, "read", lambda *clip: read_by.put(os.getpid()) or honest(*clip))
    one = contents(run(videos, tmp_path / "default", num_workers=None))
    assert {read_by.get() for _ in CLIPS}.isdisjoint({os.getpid()})
    assert one == contents(run(videos, tmp_path / "alone"))
    cores = len(os.sched_getaffinity(0))
    assert [encoding.usual_workers(devices) for devices in (1, 1000)] == [min(8, cores), 1]
    monkeypatch.setattr(encoding.multiprocessing, "get_start_method", lambda: "spawn")
    assert encoding.usual_workers(1) == 0


@pytest.mark.parametrize("kill_at", [0, 1, 3])
def test_a_killed_run_goes_on_where_it_stopped(videos, tmp_path, kill_at):
    killed(videos, tmp_path / "tokens", tokenizer=Brightness(kill_at))
    assert done(tmp_path / "tokens") == list(range(4 * kill_at))
    rest = Brightness()
    run(videos, tmp_path / "tokens", tokenizer=rest)
    assert rest.encoded == [4, 4, 4, 4, 2][kill_at:]
    check(tmp_path / "tokens", videos)
    assert contents(tmp_path / "tokens") == contents(run(videos, tmp_path / "whole"))


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (token_writer, "file_sha256"),  # in the middle of the first shard
        (token_writer, "write_manifest"),  # all shards in place, no manifest
        (unfinished.PartialTokens, "read"),  # before the first clip, the second time before the first shard
    ],
)
def test_a_run_killed_while_it_writes_the_shards_goes_on_too(videos, tmp_path, monkeypatch, module, name):
    with monkeypatch.context() as patch:
        original, calls = getattr(module, name), []

        def kill(*args):
            calls.append(args)
            if name != "read" or len(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args)

        patch.setattr(module, name, kill)
        killed(videos, tmp_path / "tokens")
    with pytest.raises(ValueError, match=r"folder must hold token shards, got .* without a manifest.json"):
        TokenShards(tmp_path / "tokens")
    rest = Brightness()
    run(videos, tmp_path / "tokens", tokenizer=rest)
    assert rest.encoded == [4]  # one batch, for the loop's sake
    check(tmp_path / "tokens", videos)
    assert contents(tmp_path / "tokens") == contents(run(videos, tmp_path / "whole"))


def test_a_run_killed_when_all_is_written_has_ended(videos, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(unfinished.PartialTokens, "remove", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        killed(videos, tmp_path / "tokens")
    check(tmp_path / "tokens", videos)
    with pytest.raises(ValueError, match=r"folder must not hold token shards yet, got .*manifest.json"):
        run(videos, tmp_path / "tokens")
    run(videos, tmp_path / "tokens", overwrite=True)
    assert contents(tmp_path / "tokens") == contents(run(videos, tmp_path / "whole"))


def test_clips_whose_ids_are_damaged_are_encoded_again(videos, tmp_path):
    killed(videos, tmp_path / "tokens", tokenizer=Brightness(3))
    path = next((tmp_path / "tokens" / ".unfinished").glob("part-*.bin"))
    content = bytearray(path.read_bytes())
    content[5 * len(content) // 12 + 20] ^= 1
    path.write_bytes(content[:-5])
    assert done(tmp_path / "tokens") == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    rest = Brightness()
    run(videos, tmp_path / "tokens", tokenizer=rest)
    assert rest.encoded == [4, 4, 4, 2]  # whole batches, so that a clip is always encoded beside the same others
    check(tmp_path / "tokens", videos)


def test_the_old_shards_serve_until_the_new_ones_are_there(videos, tmp_path):
    before = contents(run(videos, tmp_path / "tokens", clip_step=9))
    killed(videos, tmp_path / "tokens", overwrite=True, tokenizer=Brightness(2))
    after = {name: content for name, content in before.items() if (tmp_path / "tokens" / name).is_file()}
    assert after == before
    TokenShards(tmp_path / "tokens").verify()
    with pytest.raises(ValueError, match="folder must not hold token shards yet"):
        run(videos, tmp_path / "tokens")
    rest = Brightness()
    run(videos, tmp_path / "tokens", overwrite=True, tokenizer=rest)
    assert rest.encoded == [4, 4, 2]
    assert contents(tmp_path / "tokens") == contents(run(videos, tmp_path / "whole"))


def vqvae(seed):
    torch.manual_seed(seed)
    return VQVAE(codebook_size=32, width=8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frames": 9}, "frames was 5 and is 9"),
        ({"size": (32, 48)}, r"size was \[32, 32\] and is \[32, 48\]"),
        ({"stride": 2}, "stride was 1 and is 2"),
        ({"resize": "squash"}, "resize was short_side_crop and is squash"),
        ({"clip_step": 3}, "clip_step was 2 and is 3"),
        ({"tokenizer": vqvae(1)}, "tokenizer_sha256 was [0-9a-f]{64} and is [0-9a-f]{64}"),
        ({"tokenizer": Brightness()}, "tokenizer_sha256 was [0-9a-f]{64} and is not there"),
        ({"shard_size": 5, "devices": 1, "num_workers": 1}, ""),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_going_on_with_other_settings_is_refused(videos, tmp_path, monkeypatch, options, message):
    net = vqvae(0)
    with monkeypatch.context() as patch:
        patch.setattr(net, "encode", lambda video: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(videos, tmp_path, tokenizer=net)
    options = {"tokenizer": net, "shard_size": 7, "num_workers": 0} | options

    def again(**more):
        return tokenize_folder(
            **{"frames": 5, "size": 32, "clip_step": 2, "batch_size": 4} | options | more,
            videos=str(videos),
            output=str(tmp_path / "."),
            progress=False,
            device="cpu",
        )

    if message:
        with pytest.raises(ValueError, match=rf"settings must be those of the unfinished tokenisation .*{message}"):
            again()
        again(overwrite=True)
    else:
        again()
    assert not (tmp_path / ".unfinished").exists()
    assert TokenShards(tmp_path).manifest.tokenizer == type(options["tokenizer"]).__name__


def test_going_on_with_other_videos_is_refused(videos, tmp_path):
    killed(videos, tmp_path / "tokens", tokenizer=Brightness(1))
    write_video(videos / "c" / "four.mp4", np.zeros((9, 48, 64, 3), np.uint8))
    with pytest.raises(ValueError, match=r"videos c/four.mp4 was not there and is \d+ bytes, 9 frames"):
        run(videos, tmp_path / "tokens")
    (videos / "c" / "four.mp4").rename(videos / "a" / "two.mp4")
    with pytest.raises(ValueError, match=r"videos a/two.mp4 was \d+ bytes, 9 frames and is \d+ bytes, 9 frames"):
        run(videos, tmp_path / "tokens")
    (videos / "a" / "two.mp4").unlink()
    with pytest.raises(ValueError, match=r"videos a/two.mp4 was \d+ bytes, 9 frames and is not there"):
        run(videos, tmp_path / "tokens")


def test_a_clip_that_could_not_be_read_is_tried_again(videos, tmp_path, monkeypatch):
    folder = tokenize.VideoFolder
    with monkeypatch.context() as patch:
        read = folder.read

        def broken(self, index):
            if index in (6, 9):
                raise tokenize.VideoError(self.clips[index].path, "cannot be read: the disk is away")
            return read(self, index)

        patch.setattr(folder, "read", broken)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # inherited by the process, which warns
            killed(videos, tmp_path / "tokens", tokenizer=Brightness(4))
        assert done(tmp_path / "tokens") == [*range(6), 7, 8, *range(10, 16)]
        with pytest.warns(UserWarning, match=r"(two|three).mp4: cannot be read: the disk is away\. It was"):
            partly = TokenShards(run(videos, tmp_path / "partly"))
        assert len(partly) == len(CLIPS) - 2
        assert [partly.source(index).start for index in (5, 6, 7, 8)] == [0, 4, 0, 4]
    run(videos, tmp_path / "tokens")
    check(tmp_path / "tokens", videos)


def test_shards_with_a_hole_that_nobody_knows_of_are_not_written(videos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "batches_to_do", lambda done, size: [0, 1, 3, 4])
    with pytest.raises(RuntimeError, match="4 clips were neither encoded nor given up, clip 8 for one"):
        run(videos, tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.name != "videos"] == [".unfinished"]


@pytest.mark.parametrize("batch_size", [4, 32])  # with 32 there is one batch, and nothing for the second process
def test_two_processes_make_the_same_shards_as_one(videos, tmp_path, batch_size):
    run(videos, tmp_path / "two", devices=2, strategy="ddp_fork", batch_size=batch_size)
    check(tmp_path / "two", videos)
    assert contents(tmp_path / "two") == contents(run(videos, tmp_path / "one", batch_size=batch_size))


def test_processes_that_see_other_videos_or_weights_are_refused():
    work = unfinished.PartialTokens("nowhere", grid=(3, 2, 2), vocab_size=256, clips=2)
    clips = encoding.ClipsToEncode([], work, plan={"tokenizer_sha256": "b"}, batch_size=1)
    clips.trainer = SimpleNamespace(
        is_global_zero=False,
        global_rank=1,
        strategy=SimpleNamespace(broadcast=lambda own: ([0], {"tokenizer_sha256": "a"})),
    )
    with pytest.raises(ValueError, match="between process 0 and process 1 tokenizer_sha256 was a and is b; let each"):
        clips.setup("predict")


@pytest.mark.distributed
def test_the_command_goes_on_with_two_processes(videos, tmp_path, monkeypatch):
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    net = vqvae(0)
    trainer.strategy.connect(net)
    trainer.save_checkpoint(tmp_path / "net.ckpt", weights_only=True)
    whole = run(videos, tmp_path / "whole", tokenizer=net)
    calls, encode = iter(range(9)), net.encode
    with monkeypatch.context() as patch:
        patch.setattr(net, "encode", lambda video: encode(video) if next(calls) < 2 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(videos, tmp_path / "tokens", tokenizer=net)
    options = {"frames": 5, "size": 32, "clip_step": 2, "batch_size": 4, "shard_size": 7, "device": "cpu", "devices": 2}
    paths = {"tokenizer": tmp_path / "net.ckpt", "videos": videos, "output": tmp_path / "tokens"}
    text = run_module("reco_lightning", "tokenize", *(f"--{name}={value}" for name, value in (paths | options).items()))
    said = f"Wrote 18 clips of 2 x 4 x 4 tokens (ids below 32) from 3 videos in 2 class(es) to {tmp_path / 'tokens'}."
    assert text.splitlines().count(said) == 1
    assert "2 processes" in text
    now, before = read_manifest(tmp_path / "tokens"), read_manifest(whole)
    assert now.tokenizer_sha256 == before.tokenizer_sha256
    assert now.shards == before.shards  # names, sizes and checksums


def test_arguments_for_devices(videos, tmp_path):
    with pytest.raises(ValueError, match="devices must be at least 1, or -1 for all GPUs, got 0"):
        run(videos, tmp_path, devices=0)
    with pytest.raises(ValueError, match="devices must be 1 for device='cuda:1', which is one alone, got 2"):
        _placement(torch.device("cuda:1"), 2)  # a machine without that device says so first
