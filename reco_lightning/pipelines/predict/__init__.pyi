# SPDX-License-Identifier: Apache-2.0
from .requests import GenerationRequests as GenerationRequests
from .video_writer import VideoWriter as VideoWriter
