# SPDX-License-Identifier: Apache-2.0
"""Engines: how a network computes a window alone, over a context without gradients.

An engine patches a network and computes; which one serves a module is decided in injection.
"""
