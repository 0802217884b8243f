# SPDX-License-Identifier: Apache-2.0
"""The list of videos of a data set, with their classes and captions."""
