# SPDX-License-Identifier: Apache-2.0
"""The table of bad input: every public callable with valid arguments, and for each argument values that are wrong."""

from __future__ import annotations

from tests.bad_input.strategies import Entry
from tests.bad_input.table_commands import COMMANDS
from tests.bad_input.table_data import DATA
from tests.bad_input.table_metrics import METRICS
from tests.bad_input.table_models import MODELS

__all__ = ["ENTRIES", "UNCHECKED"]

ENTRIES: tuple[Entry, ...] = (*MODELS, *DATA, *METRICS, *COMMANDS)
"""Every public callable that takes plain values, tensors or paths."""

UNCHECKED: dict[tuple[str, str], str] = {
    **{("Window", name): "made by the sampler, thousands a run" for name in ("start", "stop")},
    **{
        ("ResumableDataLoader", name): "handed on to torch's DataLoader, which says what is wrong"
        for name in ("collate_fn", "worker_init_fn", "multiprocessing_context")
    },
}
"""Arguments whose constructor lets some wrong value pass, or fail in Python's own words, with the reason."""
