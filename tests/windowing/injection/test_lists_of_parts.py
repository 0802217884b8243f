# SPDX-License-Identifier: Apache-2.0
"""Networks whose layers are lists of parts, beyond the rows of the settings table."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from reco_lightning import ReCoCallback, WindowSampler, explain
from reco_lightning.support.block_stacks import block_stacks, runs_parts
from tests.helpers.networks.attending import PairsModule, XTransformersModule
from tests.helpers.networks.common import BLOCKS, PER_BLOCK, draw_ids

WINDOWS = WindowSampler(BLOCKS, PER_BLOCK)


def build(cls, **options):
    torch.manual_seed(3)
    return cls(**options)


@pytest.mark.third_party
@pytest.mark.parametrize(
    "options",
    [
        {"attn_kv_heads": 2},
        {"attn_one_kv_head": True, "attn_flash": True, "rotary_pos_emb": True},
        {"use_rmsnorm": True, "ff_glu": True, "attn_qk_norm": True, "rotary_pos_emb": True},
        {"sandwich_norm": True, "attn_gate_values": True},
    ],
    ids=str,
)
def test_options_of_x_transformers_are_served_at_a_third_of_the_operations(options):
    found = explain(build(XTransformersModule, **options), draw_ids(0), ReCoCallback(WINDOWS))
    assert (found.engine, found.blocks) == ("frozen", "net.net.attn_layers")
    assert found.error < 1e-5
    assert found.operations < 0.5 * found.plain_operations


@pytest.mark.third_party
@pytest.mark.parametrize(
    "options",
    [
        {"alibi_pos_bias": True, "alibi_num_heads": 2},  # a table of the rows that it is given
        {"rotary_xpos": True, "rotary_pos_emb": True},  # scales that depend on the length
        {"shift_tokens": 1},  # a row reads the one before it outside attention
        {"attn_num_mem_kv": 2},  # keys that stand in front of the context's
    ],
    ids=str,
)
def test_what_the_context_keys_and_values_do_not_carry_is_refused(options):
    with pytest.raises(MisconfigurationException, match=r"(?s)- frozen: .*- prefix: .*call the parts of their layers"):
        explain(build(XTransformersModule, **options), draw_ids(0), ReCoCallback(WINDOWS))


def test_trained_keys_need_blocks_of_their_own():
    with pytest.raises(MisconfigurationException, match="they need the engine 'frozen' and context 'frozen'"):
        explain(build(PairsModule), draw_ids(0), ReCoCallback(WINDOWS, context="keys"))


def test_a_context_that_is_trained_through_is_served():
    found = explain(build(PairsModule), draw_ids(0), ReCoCallback(WINDOWS, context="attached"))
    assert found.blocks == "stack"
    assert found.error < 1e-5


def test_the_owner_of_a_list_of_parts_is_one_block():
    module = nn.ModuleDict({"decoder": build(PairsModule).stack})
    assert block_stacks(module) == {"decoder": [module["decoder"]]}
    assert runs_parts(module["decoder"])
    assert not runs_parts(nn.Sequential(nn.Linear(2, 2)))
