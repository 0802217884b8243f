# SPDX-License-Identifier: Apache-2.0
"""Converts DeepMind's TensorFlow checkpoint of Inception-I3D for `load_i3d`.

The checkpoint is in the repository google-deepmind/kinetics-i3d, under `data/checkpoints/rgb_scratch`. Its data file is
byte for byte that of the TF-Hub module of the first FVD: this is the network that the protocols mean.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from reco_lightning.metrics.features import KNOWN_FILES, git_blob_id
from reco_lightning.metrics.i3d.network import InceptionI3D
from reco_lightning.metrics.i3d.tf_checkpoint import bundle_files, read_index, read_tensor
from reco_lightning.support.argument_checks import check_flag, check_path
from reco_lightning.support.atomic_write import atomic_write

__all__ = ["RGB_SCRATCH", "convert_i3d", "i3d_weights", "tensor_name"]

#: Git object id of the data file of `rgb_scratch`.
RGB_SCRATCH = "fa7df95674dbf3579e7fccd954e51e706b4734c1"

_SCOPE = "RGB/inception_i3d/"
_BRANCHES = {
    "b0": "Branch_0/Conv3d_0a_1x1",
    "b1a": "Branch_1/Conv3d_0a_1x1",
    "b1b": "Branch_1/Conv3d_0b_3x3",
    "b2a": "Branch_2/Conv3d_0a_1x1",
    "b2b": "Branch_2/Conv3d_0b_3x3",
    "b3b": "Branch_3/Conv3d_0b_1x1",
}
_PARTS = {
    "conv3d.weight": "conv_3d/w",
    "conv3d.bias": "conv_3d/b",
    "bn.bias": "batch_norm/beta",
    "bn.running_mean": "batch_norm/moving_mean",
    "bn.running_var": "batch_norm/moving_variance",
}


def tensor_name(key: str) -> str | None:
    """Returns the name in DeepMind's checkpoint of one of the network's tensors.

    Args:
        key: A key in the state dict of `InceptionI3D`.

    Returns:
        The name; None for what the checkpoint does not have: scale (1) and counter of batch normalisation.

    Example:
        >>> tensor_name("Mixed_3b.b1a.bn.running_var")
        'RGB/inception_i3d/Mixed_3b/Branch_1/Conv3d_0a_1x1/batch_norm/moving_variance'
    """
    match = re.fullmatch(r"(\w+?)(?:\.(b\w+?))?\.((?:conv3d|bn)\.\w+)", key)
    if match is None or match[3] not in _PARTS:
        return None
    layer, branch, part = match.groups()
    if layer == "logits":
        layer = "Logits/Conv3d_0c_1x1"
    if branch:
        # DeepMind's code names this one convolution otherwise
        unit = "Branch_2/Conv3d_0a_3x3" if (layer, branch) == ("Mixed_5b", "b2b") else _BRANCHES[branch]
        layer = f"{layer}/{unit}"
    return f"{_SCOPE}{layer}/{_PARTS[part]}"


def i3d_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the network's state dict, from the tensors of DeepMind's checkpoint.

    Args:
        tensors: All 230 of them, by name; kernels (T, H, W, in, out).

    Returns:
        The state dict of `InceptionI3D`; kernels (out, in, T, H, W), scales 1, counters 0.

    Raises:
        ValueError: If a tensor is missing, unknown or of another shape; the message names some.
    """
    weights = InceptionI3D().state_dict()
    names = {name: key for key in weights if (name := tensor_name(key)) is not None}
    missing, unknown = sorted(names.keys() - tensors.keys()), sorted(tensors.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"checkpoint must hold the {len(names)} tensors of Inception-I3D on RGB frames, got {len(tensors)} with "
            f"{len(missing)} missing {missing[:3]} and {len(unknown)} unknown {unknown[:3]}; give rgb_scratch"
        )
    for name, key in names.items():
        given, wanted = tensors[name], weights[key]
        value = given.permute(4, 3, 0, 1, 2) if given.ndim == 5 and wanted.ndim == 5 else given.squeeze()
        if value.shape != wanted.shape:
            shape = tuple(wanted.permute(2, 3, 4, 1, 0).shape) if wanted.ndim == 5 else tuple(wanted.shape)
            raise ValueError(
                f"checkpoint must hold {name} of shape {shape}, got {tuple(given.shape)}; give rgb_scratch"
            )
        weights[key] = value.contiguous()
    return weights


def convert_i3d(checkpoint: str, output: str, *, allow_unknown: bool = False) -> None:
    """Turns DeepMind's I3D checkpoint rgb_scratch into the weights file of the Fréchet video distance.

    Args:
        checkpoint: Folder or prefix of the TensorFlow checkpoint: `model.ckpt.index` and
            `model.ckpt.data-00000-of-00001`.
        output: File to write; a file of that name is replaced.
        allow_unknown: Also convert a checkpoint whose content is not DeepMind's rgb_scratch. Distances by it are no
            numbers of the literature.

    Raises:
        ValueError: If the checkpoint is not there, not whole, or not rgb_scratch.
    """
    check_path(checkpoint=checkpoint, output=output)
    check_flag(allow_unknown=allow_unknown)
    index, data = bundle_files(checkpoint)
    blob = git_blob_id(data)
    if blob != RGB_SCRATCH and not allow_unknown:
        raise ValueError(
            f"checkpoint must be DeepMind's rgb_scratch, whose data file has the git id {RGB_SCRATCH}, got {data} with "
            f"{blob} ({KNOWN_FILES.get(blob, 'unknown')}), which would give other distances; download it again, or "
            "convert it all the same with --allow_unknown"
        )
    tensors = {name: read_tensor(data, entry) for name, entry in read_index(index).items()}
    weights = i3d_weights(tensors)
    source = f"git {blob[:12]} ({KNOWN_FILES.get(blob, 'unknown')})"
    with atomic_write(output) as part, open(part, "wb") as file:  # given a name, torch would store it in the file
        torch.save({"weights": weights, "source": source}, file)
    print(f"Wrote {len(tensors)} tensors of {source} to {output}")
