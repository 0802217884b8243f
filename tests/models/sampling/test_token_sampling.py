# SPDX-License-Identifier: Apache-2.0
"""The options of sampling: who takes them, and how they are typed on a command line."""

from dataclasses import fields

import pytest
from jsonargparse import ArgumentParser

from reco_lightning.callbacks.sample_videos import SampleVideos
from reco_lightning.models.sampling.generate import generate as generate_tokens
from reco_lightning.models.sampling.token_sampling import SamplingOptions, VideoSamplingOptions
from reco_lightning.models.text_video.generate import generate_from_text
from reco_lightning.pipelines.evaluate.callback import EvaluateVideos
from reco_lightning.pipelines.generate import generate
from reco_lightning.pipelines.predict.caption_requests import CaptionRequests
from reco_lightning.pipelines.predict.requests import GenerationRequests


@pytest.mark.parametrize(
    ("taker", "options"),
    [
        (SampleVideos, VideoSamplingOptions),
        (EvaluateVideos, VideoSamplingOptions),
        (GenerationRequests, VideoSamplingOptions),
        (CaptionRequests, SamplingOptions),
        (generate, VideoSamplingOptions),
    ],
    ids=lambda value: value.__name__,
)
def test_a_command_line_offers_every_option_with_its_default_and_its_explanation(taker, options):
    parser = ArgumentParser()
    add = parser.add_class_arguments if isinstance(taker, type) else parser.add_function_arguments
    add(taker, "it")
    for field in fields(options):
        action = next(one for one in parser._actions if one.dest == f"it.{field.name}")
        assert action.default == field.default
        assert action.help


@pytest.mark.parametrize("taker", [generate_tokens, generate_from_text])
def test_an_option_that_does_not_exist_is_named(taker):
    with pytest.raises(TypeError, match="temprature"):
        taker(None, 1, temprature=1.0)
