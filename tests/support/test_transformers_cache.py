# SPDX-License-Identifier: Apache-2.0
"""The argument for a key/value cache, by whatever name a layer takes it, against attention with the context cut off."""

from __future__ import annotations

import copy
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from reco_lightning import ReCoCallback, explain
from reco_lightning.support.transformers_cache import NEWEST_TESTED, find_cache_argument
from tests.helpers.foreign import trainer
from tests.helpers.networks import caching
from tests.helpers.networks.caching import CachingModule
from tests.helpers.networks.common import BATCH, draw_ids
from tests.helpers.networks.references import reference_gradients
from tests.helpers.settings import WINDOWS, Setting

pytestmark = pytest.mark.third_party

CALLS = {
    "cache": (partial(CachingModule, caching.CacheLayer, cache=None, use_cache=False), "cache"),
    "past_key_values": (partial(CachingModule, caching.PastKeyValuesLayer, past_key_values=None), "past_key_values"),
    "past_key_value": (partial(CachingModule, caching.PastKeyValueLayer, past_key_value=None), "past_key_value"),
    "layer_past": (partial(CachingModule, caching.LayerPastLayer, layer_past=None), "layer_past"),
    "not passed": (partial(CachingModule, caching.CacheLayer), "cache"),
    "positional": (partial(CachingModule, caching.PositionalLayer, (None, None)), "cache"),
    "two names": (partial(CachingModule, caching.TwoNamesLayer), "cache"),
    "two earlier names": (partial(CachingModule, caching.EarlierTwoNamesLayer), "past_key_values"),
    "renamed": (partial(CachingModule, caching.RenamedLayer, cache=None), "cache"),
    "hidden": (partial(CachingModule, caching.HiddenLayer, cache=None), "cache"),
    "hidden, not passed": (partial(CachingModule, caching.HiddenLayer), "cache"),
    "handed on": (partial(CachingModule, caching.ForwardingLayer, cache=None), "cache"),
}
LATER = str(int(NEWEST_TESTED.partition(".")[0]) + 1) + ".0.0"


def make(build):
    torch.manual_seed(3)
    return build()


def choose(module, **options):
    return ReCoCallback(WINDOWS, **options).settings.select(module, lambda: module.training_step(draw_ids(0), 0))


def step_gradients(module, **options):
    """Gradients of the first window's step, inside a fit."""
    before = copy.deepcopy(module.state_dict())
    batches = torch.utils.data.DataLoader([draw_ids(0)], batch_size=None)
    trainer(ReCoCallback(WINDOWS, **({"continuity_weight": 0.0} | options))).fit(module, batches)
    return {name: (before[name] - value) / 0.1 for name, value in module.state_dict().items()}


def assert_cut_off(build, engine):
    """A step's gradients are those of attention with the context cut off, by an engine."""
    setting = Setting("", "", build, blocks="layers", head="head", reference="cut")
    window = WINDOWS.sample(0)
    assert window.start > 0
    assert choose(make(build)).engine.name == engine
    own = step_gradients(make(build))
    expected = reference_gradients(setting, make(build), draw_ids(0), BATCH, window, 0.0, 100)
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name], gradient, atol=2e-6, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")
    assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3


@pytest.mark.parametrize(("build", "name"), CALLS.values(), ids=CALLS)
def test_a_cache_by_any_known_name_freezes_the_context(build, name):
    assert {find_cache_argument(layer) for layer in make(build).layers} == {name}
    assert_cut_off(build, "cache")


@pytest.mark.parametrize("layer", [caching.UnknownLayer, caching.DeafLayer, caching.ListLayer, caching.TupleLayer])
def test_a_layer_that_takes_no_such_cache_is_served_by_the_next_engine(layer):
    selection = choose(make(partial(CachingModule, layer)))
    assert selection.engine.name == "prefix"
    assert f"not 'cache', since the blocks 'layers' ({layer.__name__})" in selection.report or (
        "not 'cache', since the engine 'cache' failed" in selection.report
    )


def test_a_cache_that_is_left_alone_is_an_error_without_a_proof():
    with pytest.raises(RuntimeError, match="kept no keys and values"):
        step_gradients(make(partial(CachingModule, caching.DeafLayer)), verify=False, engine="cache")


def test_attention_that_is_checkpointed_inside_a_layer_is_an_error_and_no_early_end_of_the_epoch():
    module = make(partial(CachingModule, caching.CacheLayer))
    for layer in module.layers:
        layer.attention = checkpoint_wrapper(layer.attention)
    with pytest.raises(RuntimeError, match=r"once more over its window; .* checkpoint whole blocks"):
        step_gradients(module)


@pytest.fixture
def later_layer():
    """An unknown layer as a later transformers might have it."""
    with patch.object(caching.UnknownLayer, "__module__", "transformers.models.later.modeling_later"):
        yield partial(CachingModule, caching.UnknownLayer)


def test_a_layer_of_a_later_transformers_is_named_with_the_version(later_layer, caplog):
    module = make(later_layer)
    with patch("transformers.__version__", LATER), caplog.at_level("INFO"):
        found = explain(module, draw_ids(0), ReCoCallback(WINDOWS))
        trainer(ReCoCallback(WINDOWS)).fit(module, torch.utils.data.DataLoader([draw_ids(0)], batch_size=None))
    named = (
        f"the blocks 'layers' (UnknownLayer of transformers {LATER}, newer than {NEWEST_TESTED}, the newest tested) "
        "do not all take a key/value cache by one of the names cache, past_key_values, past_key_value, layer_past"
    )
    assert found.engine == "prefix"
    assert named in found.report
    assert named in str(found)
    assert named in caplog.text


def test_a_layer_of_a_tested_transformers_is_named_with_the_version(later_layer):
    with patch("transformers.__version__", NEWEST_TESTED):
        report = choose(make(later_layer)).report
    assert (
        f"(UnknownLayer of transformers {NEWEST_TESTED}) do not all take a key/value cache by one of the names"
        in report
    )


def test_an_engine_asked_for_by_name_is_refused_with_the_version(later_layer):
    refused = pytest.raises(Exception, match=rf"of transformers {LATER}, newer than {NEWEST_TESTED}, the newest tested")
    with patch("transformers.__version__", LATER), refused:
        choose(make(later_layer), engine="cache")
