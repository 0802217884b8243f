# SPDX-License-Identifier: Apache-2.0
"""Sampling through the trainer: the same files from one process and two, and from any batch size."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reco_lightning import VideoModel, VideoTransformer, generate
from reco_lightning.cli.entry_point import main
from reco_lightning.data.video.clip import probe
from reco_lightning.models.larp.network import LARPTransformer
from reco_lightning.models.sampling.decoding import decode_videos, encode_first_frames
from reco_lightning.pipelines.predict.requests import GenerationRequests
from reco_lightning.pipelines.predict.video_writer import VideoWriter
from reco_lightning.support.checkpoints import load_module
from reco_lightning.support.media import write_video
from reco_lightning.tokenizers.base import to_uint8
from reco_lightning.tokenizers.vqvae import VQVAE
from tests.helpers.checkpoints import save
from tests.helpers.processes import finish, launched
from tests.helpers.sampling import predict

pytestmark = pytest.mark.slow

GRID = (3, 2, 2)
NAMES = sorted(f"{number:04d}.{kind}" for number in range(5) for kind in ("npy", "mp4"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    network = VideoTransformer(vocab_size=8, grid=GRID, dim=32, depth=2, heads=2, num_classes=3)
    for parameter in network.parameters():
        parameter.data.mul_(5 if parameter.ndim > 1 else 1)
    return save(VideoModel(network), folder / "model.ckpt"), save(VQVAE(codebook_size=8, width=8), folder / "vq.ckpt")


@pytest.fixture(scope="module")
def alone(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    predict(*saved, str(folder))
    return folder


def contents(folder):
    assert sorted(file.name for file in folder.iterdir()) == NAMES
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def written(saved, tmp_path_factory):
    """Folders of what two processes write."""
    folder = tmp_path_factory.mktemp("launched")
    for case in ("predict", "fit"):
        with launched("tests.helpers.sampling", case, *saved, folder / case, "2") as processes:
            text = finish(processes, 300)
        assert [process.returncode for process in processes] == [0, 0], f"{case}: {text[-3000:]}"
    return folder


@pytest.mark.distributed
def test_two_processes_write_the_set_of_one(written, alone):
    assert contents(written / "predict") == contents(alone)


def test_files_are_those_of_generate(saved, alone):
    model = load_module(saved[0], VideoModel)
    ids = generate(model, 5, condition=torch.tensor([2, 0, 2, 0, 2]), seed=3, length=5, context_blocks=1)
    files = [np.load(alone / f"{number:04d}.npy") for number in range(5)]
    assert (np.stack(files) == ids.view(5, 5, 2, 2).numpy()).all()
    assert probe(alone / "0003.mp4").frames == 17


@pytest.mark.parametrize("batch_size", [1, 5])
def test_the_batch_size_changes_no_file(saved, alone, tmp_path, batch_size):
    predict(*saved, str(tmp_path), batch_size=batch_size)
    assert contents(tmp_path) == contents(alone)


def test_ids_alone_without_a_tokenizer_and_from_given_ones(saved, tmp_path):
    first = np.random.default_rng(0).integers(0, 8, (5, 1, 2, 2))
    np.save(tmp_path / "first.npy", first)
    predict(saved[0], None, str(tmp_path / "out"), first_tokens=str(tmp_path / "first.npy"))
    ids = np.stack([np.load(file) for file in sorted((tmp_path / "out").iterdir())])
    assert ids.shape == (5, 5, 2, 2)
    assert (ids[:, :1] == first).all()


def test_ids_in_front_of_another_network(tmp_path):
    options = {"vocab_size": 8, "video_tokens": 6, "condition_tokens": 4, "num_classes": 0, "dim": 32, "depth": 1}
    model = VideoModel(LARPTransformer(**options, heads=2))
    torch.nn.init.normal_(model.network.output.weight)
    given = np.random.default_rng(0).integers(0, 8, (5, 4))
    np.save(tmp_path / "given.npy", given)
    path = save(model, tmp_path / "model.ckpt")
    none = {"labels": None, "length": None, "context_blocks": None}
    predict(path, None, str(tmp_path / "out"), prefix=str(tmp_path / "given.npy"), **none)
    ids = np.stack([np.load(file) for file in sorted((tmp_path / "out").iterdir())])
    assert (ids == generate(model, 5, condition=torch.from_numpy(given), seed=3).numpy()).all()
    assert ids.shape == (5, 6)


def test_the_command_line(saved, tmp_path):
    model, tokenizer = saved
    main(
        [
            "predict",
            f"--ckpt_path={model}",
            f"--model.network={{'vocab_size': 8, 'grid': {list(GRID)}, 'dim': 32, 'depth': 2, 'heads': 2, "
            "'num_classes': 3}",
            "--data=reco_lightning.pipelines.predict.requests.GenerationRequests",
            "--data.n=2",
            "--data.labels=[1]",
            "--trainer.callbacks+=reco_lightning.pipelines.predict.video_writer.VideoWriter",
            f"--trainer.callbacks.tokenizer={tokenizer}",
            f"--trainer.callbacks.output={tmp_path / 'out'}",
            "--trainer.logger=false",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
            f"--trainer.default_root_dir={tmp_path}",
            "--return_predictions=false",
        ]
    )
    names = ["0000.mp4", "0000.npy", "0001.mp4", "0001.npy"]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    ids = generate(load_module(model, VideoModel), 2, condition=1)
    assert (np.load(tmp_path / "out" / "0001.npy") == ids[1].view(GRID).numpy()).all()


@pytest.mark.distributed
def test_a_sharded_network_is_sampled_by_all_processes(written):
    files = sorted((written / "fit").rglob("*.mp4"))
    assert [file.name for file in files] == ["step-00000001.mp4", "step-00000002.mp4"]


class Recorded:
    """A tokenizer whose frames show which ids were decoded together: brightness is id / V, one id a block."""

    codebook_size, temporal_stride, spatial_stride, frame_aligned = 250, 4, 1, True

    def __init__(self, *, first_alone):
        self.first_alone, self.calls = first_alone, []

    def decode(self, ids, *, clamp=False):
        self.calls.append(ids[0, :, 0, 0].tolist())
        video = (2 * ids.double() / 255 - 1)[:, None].expand(-1, 3, -1, -1, -1)
        video = video.repeat_interleave(4, dim=2)
        return video[:, :, 3:] if self.first_alone else video


@pytest.mark.parametrize("first_alone", [True, False])
@pytest.mark.parametrize(
    ("length", "context", "windows"),
    [
        (2, None, [[0, 1]]),
        (3, 1, [[0, 1, 2]]),
        (7, 1, [[0, 1, 2], [2, 3, 4], [4, 5, 6]]),
        (6, 1, [[0, 1, 2], [2, 3, 4], [3, 4, 5]]),
        (5, None, [[0, 1, 2], [1, 2, 3], [2, 3, 4]]),
    ],
)
def test_long_videos_are_decoded_window_by_window(first_alone, length, context, windows):
    tokenizer = Recorded(first_alone=first_alone)
    ids = torch.arange(length).repeat(2, 1)
    video = decode_videos(tokenizer, ids, (3, 1, 1), context_blocks=context)
    assert tokenizer.calls == windows
    expected = torch.arange(length).repeat_interleave(4)[3 if first_alone else 0 :]
    assert torch.equal(video[:, :, 0, 0, 0], expected.to(torch.uint8).repeat(2, 1))


def test_first_frames_are_encoded_alone(saved, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)
    path = write_video(tmp_path / "video.mp4", pixels)

    class Asked(Recorded):
        def encode_first_frames(self, video, frames):
            assert video.shape == (1, 3, 5, 2, 2)
            assert frames == 5
            return torch.zeros(1, 2, 2, 2, dtype=torch.long)

    assert encode_first_frames(Asked(first_alone=True), path, frames=5, grid=GRID).shape == (1, 8)
    tokenizer = load_module(saved[1], VQVAE).eval()
    ids = encode_first_frames(tokenizer, path, frames=1, grid=GRID)
    whole = encode_first_frames(tokenizer, path, frames=5, grid=GRID)
    assert torch.equal(ids, whole[:, :4])  # this tokenizer is causal
    holistic = Recorded(first_alone=True)
    holistic.frame_aligned = False
    with pytest.raises(ValueError, match="the ids of a Recorded belong to no frames"):
        encode_first_frames(holistic, path, frames=1, grid=GRID)


def test_ids_of_no_frames_are_decoded_as_one():
    class Holistic(Recorded):
        frame_aligned = False

        def decode(self, ids, *, clamp=False):
            assert ids.shape == (2, 6)
            return torch.zeros(2, 3, 4, 2, 2)

    assert torch.equal(
        decode_videos(Holistic(first_alone=False), torch.zeros(2, 6, dtype=torch.long), (6,)),
        to_uint8(torch.zeros(2, 3, 4, 2, 2)),
    )


def test_errors(saved, tmp_path):
    for options, message in (
        ({"n": 0}, "n must be a whole number of 1 or more, got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of 1 or more, got 0"),
        ({"labels": []}, "labels must hold a class or more, or be None"),
        ({"labels": [1], "prefix": "a.npy"}, "prefix must be None where labels are given, got 'a.npy'"),
        ({"prefix": "nothing.npy"}, r"prefix must be an existing \.npy file of ids, got 'nothing\.npy'"),
        ({"first_tokens": "nothing.npy"}, r"first_tokens must be an existing \.npy file of ids, got 'nothing\.npy'"),
    ):
        with pytest.raises(ValueError, match=message):
            GenerationRequests(**options)
    np.save(tmp_path / "ids.npy", np.zeros((3, 4)))
    for n, message in ((3, r"must hold integers, .* with n=3, got float64"), (2, r"with n=2, .* of shape \(3, 4\)")):
        with pytest.raises(ValueError, match=message):
            GenerationRequests(n, first_tokens=str(tmp_path / "ids.npy"))
    with pytest.raises(ValueError, match=r"a batch must hold 'index', got \['tokens'\]"):
        load_module(saved[0], VideoModel).predict_step({"tokens": torch.zeros(1, 12)}, 0)
    with pytest.raises(ValueError, match=r"got 'nothing\.ckpt' \(no such file\)"):
        predict(saved[0], "nothing.ckpt", str(tmp_path / "out"))
    assert VideoWriter(fps=4).interval.on_batch
