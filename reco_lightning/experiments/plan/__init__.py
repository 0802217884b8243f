# SPDX-License-Identifier: Apache-2.0
"""`reco plan`: memory of a training step, found without allocating it."""
