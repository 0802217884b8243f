# SPDX-License-Identifier: Apache-2.0
"""The injection: traces a training step, chooses an engine, verifies it and runs windowed steps."""
