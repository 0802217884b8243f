# SPDX-License-Identifier: Apache-2.0
"""Any wrong value of any argument is refused by our own words, which name the argument and what was received."""

from __future__ import annotations

import inspect
import traceback
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from tests.bad_input.strategies import received
from tests.bad_input.table import ENTRIES, UNCHECKED

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


@pytest.mark.slow
@pytest.mark.parametrize("entry", [entry for entry in ENTRIES if entry.valid], ids=lambda entry: entry.name)
def test_the_valid_arguments_of_the_table_are_valid(entry):
    entry.call(**entry.valid())


@pytest.mark.slow
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


def test_the_table_has_every_argument_of_a_constructor_that_takes_plain_values():
    for entry in (entry for entry in ENTRIES if inspect.isclass(entry.call) and entry.valid):
        parameters = inspect.signature(entry.call).parameters.values()
        named = {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        assert named - entry.wrong.keys() <= {"weights"} or entry.name.endswith("Config")
