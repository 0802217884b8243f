# SPDX-License-Identifier: Apache-2.0
"""Any wrong value of any argument is refused by our own words, which name the argument and what was received."""

from __future__ import annotations

import importlib
import inspect
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.bad_input.strategies import ENTRIES, UNCHECKED, received

ARGUMENTS = [(entry, name) for entry in ENTRIES for name in entry.wrong]
CHECKED = [pair for pair in ARGUMENTS if (pair[0].name, pair[1]) not in UNCHECKED]


def refusal(entry, name, value):
    """The fault of an answer to one wrong argument; None where it is as promised."""
    arguments = dict(entry.valid()) if entry.valid else {}
    try:
        entry.call(**arguments | {name: value})
    except (ValueError, MisconfigurationException) as error:
        text, last = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
        if "reco_lightning" not in Path(last).parts:
            return f"comes from {last}: {text}"
        file = value if isinstance(value, str) and Path(value).suffix else None
        if entry.said.get(name, name) not in text and name not in text and not (file and file in text):
            return f"does not name {name}: {text}"
        if not any(part in text for part in received(value)):
            return f"does not say what was received: {text}"
        return None
    except Exception as error:
        return f"raises {type(error).__name__}: {error}"
    return "passes"


@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.valid], ids=lambda entry: entry.name)
def test_the_valid_arguments_of_the_table_are_valid(entry):
    entry.call(**entry.valid())


@pytest.mark.parametrize(("entry", "name"), CHECKED, ids=[f"{entry.name}-{name}" for entry, name in CHECKED])
def test_a_wrong_value_is_refused_by_name(entry, name):
    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(entry.wrong[name])
    def refuses(value):
        fault = refusal(entry, name, value)
        assert fault is None, f"{entry.name}({name}={value!r}) {fault}"

    refuses()


@pytest.mark.parametrize("key", UNCHECKED, ids="-".join)
def test_what_is_said_to_be_unchecked_is(key):
    """Fails once an argument is checked: then its line in the list goes."""
    entry, name = next(pair for pair in ARGUMENTS if (pair[0].name, pair[1]) == key)
    faults = []

    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(entry.wrong[name])
    def collect(value):
        faults.append(refusal(entry, name, value))

    collect()
    assert any(faults)


PUBLIC = (
    "reco_lightning",
    "reco_lightning.data.token_module",
    "reco_lightning.data.token_writer",
    "reco_lightning.data.video",
    "reco_lightning.data.video_folder",
    "reco_lightning.data.video_module",
    "reco_lightning.media",
    "reco_lightning.metrics",
    "reco_lightning.models.larp",
    "reco_lightning.models.video_model",
    "reco_lightning.prediction",
    "reco_lightning.tokenize",
    "reco_lightning.tokenizers",
    "reco_lightning.tokenizers.base",
)

WITHOUT_ENTRY = {
    "Method": "record of load_method",
    "load_method": "its files are in test_strangers.py",
    "split_shards": "takes the shards that TokenDataModule reads",
    **dict.fromkeys(("TextVideoModel", "TextVideoNetwork", "generate_from_text"), "in the tests beside it"),
    "Explanation": "result",
    "WindowStep": "result",
    "VideoInfo": "result",
    "VideoError": "error",
    "ClipSource": "record; a writer checks what it holds",
    "Clip": "record of VideoFolder",
    "VideoItem": "type",
    "VideoTokenizer": "protocol",
    "FeatureExtractor": "protocol",
    "PROTOCOLS": "constant",
    "Guided": "protocol",
    "MotionManifest": "made by measure_motion and MotionManifest.load, which are in the table",
    "Split": "type",
    "Resize": "type",
    "OnError": "type",
    "check_ids": "a check itself",
    "check_fps": "a check itself",
    "check_names": "a check itself",
    "fit_size": "checked through read_clip",
    "split_by_source": "takes a table that TokenDataModule reads",
    "split_by_time": "takes a table that TokenDataModule reads",
    "split_clips": "takes clips of a VideoFolder",
    "refuse_shards": "a check itself",
    "token_dtype": "checked through TokenShardWriter",
    "fingerprint": "takes anything",
    "adamw_with_warmup": "takes a module",
    "weight_decay_groups": "takes a module",
    "log_videos": "takes a trainer",
    "run_folder": "takes a trainer",
}


def test_every_public_callable_is_in_the_table_or_says_why_not():
    names = {name for module in PUBLIC for name in importlib.import_module(module).__all__}
    entries = {entry.name for entry in ENTRIES}
    assert names - entries - WITHOUT_ENTRY.keys() == set()
    assert entries & WITHOUT_ENTRY.keys() == set()
    assert WITHOUT_ENTRY.keys() - names == set()


def test_the_table_has_every_argument_of_a_constructor_that_takes_plain_values():
    for entry in (entry for entry in ENTRIES if inspect.isclass(entry.call) and entry.valid):
        parameters = inspect.signature(entry.call).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        assert named - entry.wrong.keys() <= {"weights"} or entry.name.endswith("Config")
