"""The negative prompt of a pipeline, which requests have unless they name another."""

from dataclasses import replace

import numpy as np

from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request

PROMPT, OTHER, SIZE = "a red circle moving left", "a blue square", (5, 16, 16)
OPTIONS = {"steps": 2, "guidance": 3.0}


def test_a_pipeline_has_a_negative_prompt_of_its_own(tiny_pipeline):
    def sample(pipeline, **request):
        return pipeline.generate_latents([Request(PROMPT, SIZE, **request)], **OPTIONS)[0]

    config = replace(tiny_pipeline.config, negative=OTHER)
    own = Pipeline(config, autoencoder=tiny_pipeline.codec.params, denoiser=tiny_pipeline.denoiser_params)
    named, plain = sample(tiny_pipeline, negative=OTHER), sample(tiny_pipeline)
    assert np.abs(named - plain).max() > 1e-3
    np.testing.assert_array_equal(sample(own), named)
    np.testing.assert_array_equal(own.generate(PROMPT, size=SIZE, output="latents", **OPTIONS), named)
    np.testing.assert_array_equal(sample(own, negative=""), plain)
    np.testing.assert_array_equal(own.generate(PROMPT, size=SIZE, negative="", output="latents", **OPTIONS), plain)
