# SPDX-License-Identifier: Apache-2.0
"""Autoregressive video models and sampling from them.

Models know nothing of windows: what windowed training does to a network belongs to windowing.
"""
