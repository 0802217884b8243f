# SPDX-License-Identifier: Apache-2.0
"""`reco benchmark`: time and memory of training steps and of sampling, method against method."""
