# SPDX-License-Identifier: Apache-2.0
"""Small tools that know nothing of video or windows: argument checks, files, plots.

Nothing here imports another part of the package.
"""
