# SPDX-License-Identifier: Apache-2.0
"""Video files and folders of frames: decoders, clips, and the data module over them."""
