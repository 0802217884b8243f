# SPDX-License-Identifier: Apache-2.0
from .clip import Resize as Resize
from .clip import VideoError as VideoError
from .clip import VideoInfo as VideoInfo
from .clip import fit_size as fit_size
from .clip import probe as probe
from .clip import read_clip as read_clip
