# SPDX-License-Identifier: Apache-2.0
"""Builds a language model in shards over processes (FSDP2), never whole on a device."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from reco_lightning.models.text_video.network import TextVideoNetwork
from reco_lightning.support.block_stacks import block_stacks

__all__ = ["build_sharded", "shard"]


def shard(network: TextVideoNetwork, mesh: DeviceMesh) -> None:
    """Splits every layer's parameters over the processes, then what is left of the language model.

    Args:
        network: Built; changed in place. May be on the meta device.
        mesh: One dimension, the processes that share the weights.
    """
    for layers in block_stacks(network.language_model).values():
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(network.language_model, mesh=mesh)


def build_sharded(network: TextVideoNetwork, mesh: DeviceMesh) -> None:
    """Builds a network in shards: process 0 has all of it in memory of the CPU, a device has its share.

    All processes end with shards of what process 0 built, so that fresh weights are those of a single process.

    Args:
        network: Not built yet; changed in place.
        mesh: As in `shard`.
    """
    whole = copy.deepcopy(network) if dist.get_rank() == 0 else None
    if whole is not None:
        whole.build()
    with torch.device("meta"):
        network.build()
        network.language_model.tie_weights()  # transformers 5.0 does not on the meta device
    shard(network, mesh)
    network.to_empty(device=mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(network, {} if whole is None else whole.state_dict(), options=options)
    _share_buffers(network, whole)


def _share_buffers(network: nn.Module, whole: nn.Module | None) -> None:
    """Buffers that no state dict holds, as tables of positions."""
    built = {} if whole is None else dict(whole.named_buffers())
    for name, buffer in network.named_buffers():
        if whole is not None:
            buffer.copy_(built[name])
        dist.broadcast(buffer, src=0)
