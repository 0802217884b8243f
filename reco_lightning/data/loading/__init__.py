# SPDX-License-Identifier: Apache-2.0
"""The order of samples over epochs, and a loader that resumes in the middle of one."""
