# SPDX-License-Identifier: Apache-2.0
"""The `reco` command: which command runs, LightningCLI, what a recipe and a checkpoint add to its arguments.

Code that a Python user calls belongs below: in pipelines, experiments or callbacks.
"""
