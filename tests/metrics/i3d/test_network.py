# SPDX-License-Identifier: Apache-2.0
"""Inception-I3D against outputs of the public PyTorch copy with the same weights, and the files it loads from."""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from reco_lightning.metrics.features import KNOWN_FILES, TorchScriptFeatures, git_blob_id
from reco_lightning.metrics.frechet import FrechetVideoDistance, fvd_extractor
from reco_lightning.metrics.i3d.network import I3DFeatures, InceptionI3D, load_i3d, same_padding
from reco_lightning.metrics.protocols import PROTOCOLS, FVDProtocol, resize_frames

OUTPUTS = json.loads((Path(__file__).parents[2] / "data" / "fvd" / "i3d_outputs.json").read_text())


def random_i3d(norm_epsilon):
    """A network whose weights depend on a seed alone."""
    network = InceptionI3D(norm_epsilon=norm_epsilon)
    draw = torch.Generator().manual_seed(0)
    for key, value in sorted(network.state_dict().items()):
        if key.endswith("conv3d.weight"):
            value.copy_(torch.randn(value.shape, generator=draw) * (2 / value[0].numel()) ** 0.5)
        elif key.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
        elif key.endswith(("running_mean", "bias")):
            value.copy_(torch.randn(value.shape, generator=draw) * 0.1)
    return network


def random_clip(frames):
    draw = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (1, 3, frames, 224, 224), generator=draw, dtype=torch.uint8)


@pytest.fixture(scope="module")
def network():
    return random_i3d(1e-3)


@pytest.fixture(scope="module")
def weights_file(network, tmp_path_factory):
    """A file like `i3d_pretrained_400.pt`: the state dict alone, with counters of its training."""
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    state = {k: v + 5 if k.endswith("num_batches_tracked") else v for k, v in network.state_dict().items()}
    torch.save(state, path)
    return path


@pytest.mark.slow
def test_outputs_of_the_public_copy(network):
    expected = OUTPUTS["9"]
    clip = random_clip(9)
    logits = I3DFeatures(network, FVDProtocol("x", frames=9))(clip)
    features = I3DFeatures(network, FVDProtocol("x", frames=9, output="features"))(clip)
    assert (logits.shape, features.shape) == ((1, 400), (1, 1024))
    assert logits[0].tolist() == pytest.approx(expected["logits"], abs=1e-3)
    assert features[0, :100].tolist() == pytest.approx(expected["features"], abs=1e-3)


@pytest.mark.slow
def test_outputs_of_the_public_copy_with_two_steps_of_time():
    expected = OUTPUTS["17"]
    network = random_i3d(expected["norm_epsilon"])
    assert network.features(random_clip(17) / 127.5 - 1).shape == (1, 1024, 2, 1, 1)
    logits = I3DFeatures(network, "omnitokenizer")(random_clip(17))
    assert logits[0].tolist() == pytest.approx(expected["logits"], abs=1e-3)


@pytest.mark.parametrize(
    ("size", "kernel", "stride"), [(17, 7, 2), (16, 7, 2), (9, 3, 2), (8, 3, 2), (7, 2, 2), (5, 3, 1)]
)
def test_padding_is_that_of_tensorflow(size, kernel, stride):
    before, after = same_padding((size,), (kernel,), (stride,))
    places = -(-size // stride)  # TensorFlow: as many outputs as the size divided by the stride, rounded up
    assert (size + before + after - kernel) // stride + 1 == places
    assert after - before in (0, 1)


def test_pooling_sees_no_padding():
    from reco_lightning.metrics.i3d.network import _pool

    x = torch.rand(1, 2, 5, 6, 7)
    y = np.full((5 + 2, 6 + 2, 7 + 2), -np.inf)
    for channel in range(2):
        y[1:-1, 1:-1, 1:-1] = x[0, channel].numpy()
        windows = np.lib.stride_tricks.sliding_window_view(y, (3, 3, 3)).max((-1, -2, -3))
        np.testing.assert_array_equal(_pool(x, (3, 3, 3), (1, 1, 1))[0, channel].numpy(), windows)


@pytest.mark.parametrize("shape", [(1, 3, 8, 224, 224), (1, 3, 9, 112, 112), (1, 1, 9, 224, 224), (3, 9, 224, 224)])
def test_videos_that_do_not_fit(network, shape):
    with pytest.raises(ValueError, match=r"shape \(B, 3, T, 224, 224\) with T 9 or more, got"):
        network(torch.zeros(shape))


def test_network_is_frozen(network):
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.slow
def test_weights_from_a_file(network, weights_file):
    loaded = fvd_extractor(weights_file, "styleganv")
    assert isinstance(loaded, I3DFeatures)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value)
    assert I3DFeatures(network, "styleganv").weights in loaded.weights  # counters do not change the hash
    assert f"git {git_blob_id(weights_file)[:12]} (unknown file)" in loaded.weights
    metric = FrechetVideoDistance(weights_file, "larp")
    assert metric.width == 400
    assert loaded.weights in str(metric)
    assert "extractor's own" not in str(metric)
    assert not metric.state_dict()


def test_extractor_of_another_protocol(network, weights_file):
    with pytest.raises(ValueError, match=r"extractor must be made for larp .*, got one for styleganv"):
        FrechetVideoDistance(load_i3d(weights_file, "styleganv"), "larp")
    with pytest.raises(ValueError, match=r"batch-norm epsilon 1e-05 of the protocol tats, got 0.001"):
        I3DFeatures(network, "tats")
    assert load_i3d(weights_file, "tats").network.Conv3d_1a_7x7.bn.eps == 1e-5
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        I3DFeatures(network, batch_size=0)


@pytest.mark.slow
def test_files_of_other_weights(network, tmp_path):
    state = network.state_dict()
    cases = {
        "600": {**state, "logits.conv3d.bias": torch.zeros(600)},
        "missing": {k: v for k, v in state.items() if not k.startswith("Mixed_3b.b0")},
        "foreign": {**state, "fc.weight": torch.zeros(3)},
        "list": [1, 2],
    }
    messages = {
        "600": r"1 of other shapes \['logits.conv3d.bias \(600,\) for \(400,\)'\]",
        "missing": r"6 missing \['Mixed_3b.b0.bn.bias'",
        "foreign": r"1 unknown \['fc.weight'\]",
        "list": r"344 missing",
    }
    for name, content in cases.items():
        torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=messages[name]):
            load_i3d(tmp_path / name)
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(ValueError, match=r"a file of Inception-I3D weights, got '.*text'"):
        fvd_extractor(tmp_path / "text", "larp")
    with pytest.raises(ValueError, match=r"\(no such file\); reco convert-i3d makes one"):
        fvd_extractor(tmp_path / "nothing", "larp")


class Switches(nn.Module):
    """Has the switches of StyleGAN-V's network, and tells by its output what it was given."""

    def forward(self, x, rescale: bool = False, resize: bool = False, return_features: bool = False):
        sums = x.float().mean((1, 2, 3, 4))
        return torch.stack([sums, sums * 0 + float(rescale) + 2 * float(resize) + 4 * float(return_features)], 1)


class Plain(nn.Module):
    """A network of somebody's own."""

    def forward(self, x):
        return x.float().mean((2, 3, 4))


def script(module, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.script(module).save(path)
    return path


def test_network_of_stylegan_v(tmp_path):
    path = script(Switches(), tmp_path / "i3d_torchscript.pt")
    clips = torch.randint(0, 256, (5, 3, 17, 20, 30), dtype=torch.uint8)
    for name in ("styleganv", "larp"):
        inside = TorchScriptFeatures(path, name, width=2, batch_size=2)(clips)
        torch.testing.assert_close(inside[:, 0], clips.float().mean((1, 2, 3, 4)))
        assert inside[:, 1].tolist() == [7.0] * 5  # rescale, resize and return_features
    cropping = FVDProtocol("x", frames=17, resize="short_side_crop")
    before = TorchScriptFeatures(path, cropping, width=2)(clips)
    video = resize_frames(clips.float(), "short_side_crop") / 127.5 - 1
    torch.testing.assert_close(before[:, 0], video.mean((1, 2, 3, 4)))
    assert before[:, 1].tolist() == [4.0] * 5
    with pytest.raises(
        ValueError, match=r"got StyleGAN-V's, which gives logits with a batch-norm epsilon of 0.001, for ta"
    ):
        TorchScriptFeatures(path, "tats")


def test_torchscript_of_your_own(tmp_path):
    path = script(Plain(), tmp_path / "mine.pt")
    clips = torch.randint(0, 256, (5, 3, 17, 20, 30), dtype=torch.uint8)
    extractor = TorchScriptFeatures(path, "omnitokenizer", width=3, batch_size=2)
    torch.testing.assert_close(extractor(clips), clips.float().mean((2, 3, 4)))
    assert extractor.weights == f"git {git_blob_id(path)[:12]} (TorchScript of your own)"
    torch.testing.assert_close(pickle.loads(pickle.dumps(extractor))(clips), extractor(clips))
    metric = FrechetVideoDistance(extractor, "omnitokenizer")
    assert metric.width == 3
    with pytest.raises(ValueError, match=r"features of shape \(5, 400\), got \(5, 3\)"):
        FrechetVideoDistance(TorchScriptFeatures(path, "omnitokenizer"), "omnitokenizer").update(clips, real=True)


def test_a_program_is_taken_by_its_path_where_its_hash_is_known(tmp_path, monkeypatch):
    path = script(Switches(), tmp_path / "i3d_torchscript.pt")
    with pytest.raises(ValueError, match=r"got '.*i3d_torchscript.pt', another program in TorchScript"):
        FrechetVideoDistance(path, "larp")
    monkeypatch.setitem(KNOWN_FILES, git_blob_id(path), "i3d_torchscript.pt of StyleGAN-V")
    assert isinstance(fvd_extractor(path, "larp"), TorchScriptFeatures)


def test_files_that_are_no_torchscript(tmp_path, weights_file):
    with pytest.raises(ValueError, match=r"got '.*pretrained_400.pt'; weights alone are loaded by load_i3d"):
        TorchScriptFeatures(weights_file)
    with pytest.raises(ValueError, match="no such file"):
        TorchScriptFeatures(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="batch_size must be a whole number of 1 or more, got 0"):
        TorchScriptFeatures(weights_file, batch_size=0)


def test_known_files():
    assert {len(blob) for blob in KNOWN_FILES} == {40}
    assert {protocol.norm_epsilon for protocol in PROTOCOLS.values()} == {1e-3, 1e-5}
