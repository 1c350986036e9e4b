"""Latents that `Pipeline.generate` decodes, of one prompt."""

import inspect
from typing import Any

import numpy as np

from dit_video.sampling.pipeline import Pipeline
from dit_video.sampling.request import Request

_SAMPLING = inspect.signature(Pipeline.make_sampling).parameters.keys()


def generate_latents(pipeline: Pipeline, prompt: str | int, *, callback: Any = None, **options: Any) -> np.ndarray:
    """Return the latents of the clip that `pipeline.generate(prompt, **options)` returns."""
    changes = {name: value for name, value in options.items() if name in _SAMPLING}
    request = Request(str(prompt), **{name: value for name, value in options.items() if name not in changes})
    sampling = pipeline.make_sampling(**changes)
    return pipeline.generate_latents([request], sampling=sampling, callback=callback)[0]
