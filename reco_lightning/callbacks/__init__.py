# SPDX-License-Identifier: Apache-2.0
"""Callbacks and plugins of the trainer.

A callback turns the trainer's hooks into calls; the method itself belongs to windowing.
"""
