# SPDX-License-Identifier: Apache-2.0
"""Runs the command line as `python -m reco_lightning`."""

from __future__ import annotations

from reco_lightning.cli.entry_point import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
