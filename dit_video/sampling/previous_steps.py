"""Sampling of a pipeline's previous steps, whose samples condition it."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from dit_video.sampling.pipeline_config import PipelineConfig, PreviousStep, to_grid
from dit_video.sampling.request import Request


@runtime_checkable
class StepPipeline(Protocol):
    """The part of a pipeline that samples a step."""

    config: PipelineConfig

    def generate_many(self, requests: Sequence[Request]) -> list[Any]:
        """Return clips of requests."""

    def generate_latents(self, requests: Sequence[Request]) -> list[Any]:
        """Return latents of requests."""


def sample_previous_steps(
    steps: Sequence[PreviousStep], pipelines: Mapping[str, StepPipeline], requests: Sequence[Request]
) -> list[Request]:
    """Return the requests with the values of conditioning that previous steps sample, where they lack them.

    Args:
      steps: steps of the pipeline that the requests are for.
      pipelines: pipeline of each step, by its name.
      requests: requests with their sizes.
    """
    requests = list(requests)
    for step in steps:
        pipeline = pipelines[step.name]
        own = [index for index, request in enumerate(requests) if step.name not in request.conditioning]
        parts = []
        for index in own:
            prompt, size, seed, negative, *_ = requests[index]
            parts.append(Request(prompt, step.get_size(to_grid(size), pipeline.config.size), seed, negative))
        sample = pipeline.generate_many if step.output == "clip" else pipeline.generate_latents
        for index, value in zip(own, sample(parts) if parts else [], strict=True):
            conditioning = {**requests[index].conditioning, step.name: value}
            requests[index] = requests[index]._replace(conditioning=conditioning)
    return requests
