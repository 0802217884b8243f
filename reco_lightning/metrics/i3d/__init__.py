# SPDX-License-Identifier: Apache-2.0
"""The I3D network of FVD and the conversion of its published weights."""
