# SPDX-License-Identifier: Apache-2.0
"""The reference network and the LightningModule around it; neither knows of windows."""
