# SPDX-License-Identifier: Apache-2.0
"""Conversion of a TensorFlow checkpoint that the test itself writes, in TensorFlow's format, with all 230 tensors."""

from __future__ import annotations

import struct

import pytest
import torch

from reco_lightning.metrics.features import git_blob_id
from reco_lightning.metrics.i3d import convert as i3d_convert
from reco_lightning.metrics.i3d.convert import convert_i3d, i3d_weights
from reco_lightning.metrics.i3d.network import load_i3d
from reco_lightning.metrics.i3d.tf_checkpoint import _crc32c, bundle_files, read_index, read_tensor

SCOPE = "RGB/inception_i3d/"
# Convolutions of DeepMind's i3d.py: name, kernel, channels in and out. Mixed layers in the order of its lines.
STEM = [("Conv3d_1a_7x7", 7, 3, 64), ("Conv3d_2b_1x1", 1, 64, 64), ("Conv3d_2c_3x3", 3, 64, 192)]
MIXED = """
3b 192 64 96 128 16 32 32
3c 256 128 128 192 32 96 64
4b 480 192 96 208 16 48 64
4c 512 160 112 224 24 64 64
4d 512 128 128 256 24 64 64
4e 512 112 144 288 32 64 64
4f 528 256 160 320 32 128 128
5b 832 256 160 320 32 128 128
5c 832 384 192 384 48 128 128
"""


def units():
    yield from STEM
    for line in MIXED.strip().splitlines():
        name, *numbers = line.split()
        inside, b0, b1a, b1b, b2a, b2b, b3 = map(int, numbers)
        third = "Conv3d_0a_3x3" if name == "5b" else "Conv3d_0b_3x3"  # as it stands in i3d.py
        for unit, kernel, channels, outside in (
            ("Branch_0/Conv3d_0a_1x1", 1, inside, b0),
            ("Branch_1/Conv3d_0a_1x1", 1, inside, b1a),
            ("Branch_1/Conv3d_0b_3x3", 3, b1a, b1b),
            ("Branch_2/Conv3d_0a_1x1", 1, inside, b2a),
            (f"Branch_2/{third}", 3, b2a, b2b),
            ("Branch_3/Conv3d_0b_1x1", 1, inside, b3),
        ):
            yield f"Mixed_{name}/{unit}", kernel, channels, outside


def checkpoint_tensors():
    """All 230 tensors, with random values."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}
    for name, kernel, inside, outside in units():
        tensors[f"{SCOPE}{name}/conv_3d/w"] = torch.randn(kernel, kernel, kernel, inside, outside, generator=draw)
        for part in ("beta", "moving_mean", "moving_variance"):
            tensors[f"{SCOPE}{name}/batch_norm/{part}"] = torch.rand(outside, generator=draw)
    tensors[f"{SCOPE}Logits/Conv3d_0c_1x1/conv_3d/w"] = torch.randn(1, 1, 1, 1024, 400, generator=draw)
    tensors[f"{SCOPE}Logits/Conv3d_0c_1x1/conv_3d/b"] = torch.randn(400, generator=draw)
    return tensors


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number % 128 + 128)
        number //= 128
    return bytes([*out, number])


def nested(field, content):
    return varint(field * 8 + 2) + varint(len(content)) + content


def crc32c(content):
    """Bit by bit, as the polynomial's definition has it."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 * (crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % 2**32


def table(entries, *, compression=0, per_block=50, interval=16):
    """A table in LevelDB's format: blocks of keys that share beginnings, an empty meta-index, an index, a footer."""
    out = bytearray()

    def block(pairs):
        body, restarts, last = bytearray(), [], b""
        for number, (key, value) in enumerate(pairs):
            shared = 0
            if number % interval == 0:
                restarts.append(len(body))
            else:
                while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                    shared += 1
            body += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
            last = key
        body += struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))
        handle = varint(len(out)) + varint(len(body))
        out.extend(body + bytes([compression]))
        out.extend(struct.pack("<I", crc32c(bytes(body) + bytes([compression]))))
        return handle

    pairs = sorted(entries.items())
    index = []
    for start in range(0, len(pairs), per_block):
        part = pairs[start : start + per_block]
        index.append((part[-1][0], block(part)))
    footer = block([]) + block(index)
    return bytes(out) + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def write_checkpoint(folder, tensors, *, header=b"\x08\x01\x1a\x02\x08\x01", change=None, **options):
    folder.mkdir()
    entries, data = {b"": header}, bytearray()
    for name, tensor in sorted(tensors.items()):
        shape = b"".join(nested(2, b"\x08" + varint(size)) for size in tensor.shape)
        content = tensor.contiguous().numpy().tobytes()
        entry = b"\x08\x01" + nested(2, shape)
        if data:
            entry += b"\x20" + varint(len(data))  # proto3 leaves an offset of 0 out
        entry += b"\x28" + varint(len(content)) + b"\x35" + b"\0\0\0\0"
        entries[name.encode()] = change(entry) if change else entry
        data += content
    (folder / "model.ckpt.index").write_bytes(table(entries, **options))
    (folder / "model.ckpt.data-00000-of-00001").write_bytes(data)
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"')
    return folder


@pytest.fixture(scope="module")
def tensors():
    return checkpoint_tensors()


@pytest.fixture(scope="module")
def checkpoint(tensors, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("tf") / "rgb_scratch", tensors)


def small(folder, **options):
    return write_checkpoint(folder, {"a/b": torch.arange(6.0).view(2, 3), "a/c": torch.ones(())}, **options)


def test_checkpoint_is_as_large_as_the_real_one(checkpoint, tensors):
    index, data = bundle_files(checkpoint)
    assert len(tensors) == len(read_index(index)) == 230
    assert data.stat().st_size == 50_818_176


def test_every_tensor_is_read(checkpoint, tensors):
    index, data = bundle_files(checkpoint / "model.ckpt")
    entries = read_index(index)
    assert list(entries) == sorted(tensors)
    for name in (min(tensors), max(tensors), f"{SCOPE}Mixed_4d/Branch_1/Conv3d_0b_3x3/conv_3d/w"):
        assert torch.equal(read_tensor(data, entries[name]), tensors[name])


@pytest.mark.slow
def test_converted_weights_load(checkpoint, tensors, tmp_path, capsys, monkeypatch):
    blob = git_blob_id(bundle_files(checkpoint)[1])
    monkeypatch.setattr(i3d_convert, "RGB_SCRATCH", blob)
    convert_i3d(str(checkpoint), str(tmp_path / "deep" / "i3d.pt"))
    assert f"Wrote 230 tensors of git {blob[:12]}" in capsys.readouterr().out
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["i3d.pt"]
    extractor = load_i3d(tmp_path / "deep" / "i3d.pt")
    assert extractor.weights.endswith(f"from git {blob[:12]} (unknown)")
    state = extractor.network.state_dict()
    for key, name in {
        "Conv3d_1a_7x7": "Conv3d_1a_7x7",
        "Mixed_3b.b0": "Mixed_3b/Branch_0/Conv3d_0a_1x1",
        "Mixed_4f.b1a": "Mixed_4f/Branch_1/Conv3d_0a_1x1",
        "Mixed_4f.b1b": "Mixed_4f/Branch_1/Conv3d_0b_3x3",
        "Mixed_5b.b2a": "Mixed_5b/Branch_2/Conv3d_0a_1x1",
        "Mixed_5b.b2b": "Mixed_5b/Branch_2/Conv3d_0a_3x3",
        "Mixed_5c.b2b": "Mixed_5c/Branch_2/Conv3d_0b_3x3",
        "Mixed_5c.b3b": "Mixed_5c/Branch_3/Conv3d_0b_1x1",
    }.items():
        kernel = tensors[f"{SCOPE}{name}/conv_3d/w"]
        t, y, x, i, o = (0, -1, 0, 5 % kernel.shape[3], 3)
        assert state[f"{key}.conv3d.weight"][o, i, t, y, x] == kernel[t, y, x, i, o]
        assert torch.equal(state[f"{key}.bn.bias"], tensors[f"{SCOPE}{name}/batch_norm/beta"])
        assert torch.equal(state[f"{key}.bn.running_mean"], tensors[f"{SCOPE}{name}/batch_norm/moving_mean"])
        assert torch.equal(state[f"{key}.bn.running_var"], tensors[f"{SCOPE}{name}/batch_norm/moving_variance"])
        assert torch.equal(state[f"{key}.bn.weight"], torch.ones(kernel.shape[4]))
    scores = tensors[f"{SCOPE}Logits/Conv3d_0c_1x1/conv_3d/w"]
    assert torch.equal(state["logits.conv3d.weight"].flatten(1), scores.flatten(0, 3).T)
    assert torch.equal(state["logits.conv3d.bias"], tensors[f"{SCOPE}Logits/Conv3d_0c_1x1/conv_3d/b"])


def test_each_value_is_used_once(tensors):
    weights = i3d_weights(
        {name: torch.full_like(tensor, number) for number, (name, tensor) in enumerate(tensors.items())}
    )
    seen = sorted(
        int(value.flatten()[0]) for key, value in weights.items() if not key.endswith(("bn.weight", "tracked"))
    )
    assert seen == list(range(230))


def test_unknown_checkpoints(checkpoint, tmp_path):
    with pytest.raises(
        ValueError, match=r"git id fa7df95674dbf3579e7fccd954e51e706b4734c1, got .*\(unknown\).*allow_unkno"
    ):
        convert_i3d(str(checkpoint), str(tmp_path / "i3d.pt"))
    assert not (tmp_path / "i3d.pt").exists()
    with pytest.raises(ValueError, match=r"230 tensors .* got 2 with 230 missing .* and 2 unknown \['a/b', 'a/c'\]"):
        convert_i3d(str(small(tmp_path / "other")), str(tmp_path / "i3d.pt"), allow_unknown=True)
    assert not (tmp_path / "i3d.pt").exists()


def test_tensors_that_do_not_fit(tensors):
    name = f"{SCOPE}Logits/Conv3d_0c_1x1/conv_3d/w"
    with pytest.raises(
        ValueError, match=r"hold RGB.*conv_3d/w of shape \(1, 1, 1, 1024, 400\), got \(1, 1, 1, 1024, 600\)"
    ):
        i3d_weights({**tensors, name: torch.zeros(1, 1, 1, 1024, 600)})
    with pytest.raises(ValueError, match=rf"1 missing \['{name}'\] and 0 unknown"):
        i3d_weights({key: value for key, value in tensors.items() if key != name})


def test_small_tables(tmp_path):
    for number, options in enumerate(({"per_block": 1}, {"interval": 1}, {})):
        index, data = bundle_files(small(tmp_path / str(number), **options))
        entries = read_index(index)
        assert {name: entry.shape for name, entry in entries.items()} == {"a/b": (2, 3), "a/c": ()}
        assert read_tensor(data, entries["a/b"]).tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compression": 1}, r"compressed \(kind 1\), as in TF-Hub's; take that of google-deepmind/kinetics-i3d"),
        ({"header": b"\x08\x02"}, "its data is in 2 files"),
        ({"header": b"\x08\x01\x10\x01"}, "big-endian"),
        ({"change": lambda entry: entry.replace(b"\x08\x01", b"\x08\x02", 1)}, "a/b is of type 2, not float32"),
        ({"change": lambda entry: entry + nested(7, b"\x08\x01")}, "its tensor a/b is sliced"),
        ({"change": lambda entry: entry.replace(b"\x28", b"\x28\x01\x30", 1)}, "a/b of shape .* has 1 bytes"),
        ({"change": lambda entry: entry + b"\x0b"}, "field of kind 3"),
    ],
)
def test_tables_that_are_not_read(options, message, tmp_path):
    index, _ = bundle_files(small(tmp_path / "x", **options))
    with pytest.raises(ValueError, match=message):
        read_index(index)


def test_checksum():
    assert _crc32c(b"123456789") == 0xE3069283  # the check value in the catalogue of CRCs


def test_damaged_files(tmp_path):
    index, data = bundle_files(small(tmp_path / "x"))
    content = index.read_bytes()
    entry = read_index(index)["a/b"]
    for damaged, message in (
        (content[:-1], "does not end as an index ends"),
        (b"", "does not end as an index ends"),
        (content[:12] + b"X" + content[13:], "checksum does not match; download it again"),
        (b"\xff" * 40 + content[-8:], "which is damaged"),
        (content[-48:], "which is damaged"),
    ):
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=message):
            read_index(index)
    data.write_bytes(data.read_bytes()[:10])
    with pytest.raises(ValueError, match="which ends too early; download it again"):
        read_tensor(data, entry)


def test_files_that_are_not_there(tmp_path):
    folder = small(tmp_path / "x")
    for name in ("", "model.ckpt", "model.ckpt.index", "model.ckpt.data-00000-of-00001"):
        assert bundle_files(folder / name)[0] == folder / "model.ckpt.index"
    (folder / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(ValueError, match=r"no .data-00000-of-00001 file"):
        bundle_files(folder)
    (folder / "other.index").touch()
    with pytest.raises(ValueError, match=r"with model.ckpt.index, other.index; give a prefix"):
        bundle_files(folder)
    with pytest.raises(ValueError, match=r"no .index file"):
        bundle_files(tmp_path)
