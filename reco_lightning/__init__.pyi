# SPDX-License-Identifier: Apache-2.0
# The public names and their homes, once: __init__.py imports them on first use, type checkers read this file.

from .callbacks.position_profile import PositionLossProfile as PositionLossProfile
from .callbacks.reco import ReCoCallback as ReCoCallback
from .callbacks.sample_videos import SampleVideos as SampleVideos
from .experiments.methods import Method as Method
from .experiments.methods import load_method as load_method
from .models.sampling.generate import generate as generate
from .models.text_video.generate import generate_from_text as generate_from_text
from .models.text_video.lightning_module import TextVideoModel as TextVideoModel
from .models.text_video.network import TextVideoNetwork as TextVideoNetwork
from .models.transformer import VideoTransformer as VideoTransformer
from .models.video_model import VideoModel as VideoModel
from .pipelines.evaluate.callback import EvaluateVideos as EvaluateVideos
from .windowing.explain import Explanation as Explanation
from .windowing.explain import explain as explain
from .windowing.losses.continuity import continuity_loss as continuity_loss
from .windowing.mixin import ReCoMixin as ReCoMixin
from .windowing.mixin import WindowStep as WindowStep
from .windowing.sampler import Window as Window
from .windowing.sampler import WindowSampler as WindowSampler

__version__: str
