# SPDX-License-Identifier: Apache-2.0
"""The losses of a window: cross-entropy on its rows and representation continuity."""
