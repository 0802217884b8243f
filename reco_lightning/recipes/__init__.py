# SPDX-License-Identifier: Apache-2.0
"""Recipes in YAML, and how their parts are found and merged.

Recipes state settings; code that reads more than YAML belongs to cli or experiments.
"""
