# SPDX-License-Identifier: Apache-2.0
"""Clips cut from the videos of an index, as a dataset and a data module."""
