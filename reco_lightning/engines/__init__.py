# SPDX-License-Identifier: Apache-2.0
"""How a network is run on one window: the engines, and what finds and proves them on somebody else's module."""
