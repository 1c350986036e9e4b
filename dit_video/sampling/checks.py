"""Checks of requests and of sampling by a pipeline's config, which need no weights."""

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from dit_video.diffusion import ClipSize
from dit_video.models.encoders import FrozenTextConfig
from dit_video.sampling import Sampling
from dit_video.sampling.batches import plan_steps
from dit_video.sampling.denoiser import list_experts
from dit_video.sampling.empty_parts import make_empty_task_model
from dit_video.sampling.options import SamplingOverrides, override_sampling
from dit_video.sampling.packing import SamplingRequest
from dit_video.sampling.pipeline_config import PipelineConfig, to_grid
from dit_video.sampling.preparation import make_sampling_request
from dit_video.sampling.request import Request, TaskModel


def check_requests(config: PipelineConfig, requests: Sequence[Request], **overrides: Unpack[SamplingOverrides]) -> None:
    """Check that a pipeline of a config can sample requests, before its weights are read.

    Args:
      config: config of the pipeline.
      requests: requests, of which each is planned with latents of zeros in the place of encoded pictures.
      overrides: values that replace those of the pipeline's own sampling, as for `Pipeline.generate_many`.

    Raises:
      UserError: what `Pipeline.generate_many` would refuse.
    """
    sampling, model = resolve_sampling(config, **overrides), make_empty_task_model(config)
    tokenizer = None if isinstance(config.text, FrozenTextConfig) else config.text.make_tokenizer()
    for request in requests:
        sized = request._replace(size=config.resolve_size(request))
        # Values of conditioning that previous steps sample are zero here.
        prepared = prepare_request(config, sized, model)
        grid = prepared.get_token_grid(config.backbone.patch)
        size = ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w)
        process = config.process.specialize(size)
        times = sampling.make_times(process)
        plan_steps(prepared, process, sampling)
        for expert in range(len(sampling.full_guidance.scales)):
            sampling.full_guidance.get_params(expert, times=np.asarray(times.times, np.float32))
        if tokenizer is not None:  # A frozen encoder takes any text.
            for prompt in (prepared.prompt, prepared.negative):
                tokenizer(prompt)


def resolve_sampling(config: PipelineConfig, **overrides: Unpack[SamplingOverrides]) -> Sampling:
    """Return a pipeline's own sampling with the given values replaced, after checking that its model can do it.

    Raises:
      UserError: what `override_sampling` refuses, layers to skip that the model lacks, or guidance of two experts for a
        model with one.
    """
    sampling = override_sampling(config.sampling, config.process, **overrides)
    if (skip := sampling.full_guidance.skip_layers) is not None:
        skip.check(config.backbone.layers)
    sampling.check_experts(len(list_experts(config.boundary)))
    return sampling


def prepare_request(config: PipelineConfig, request: Request, model: TaskModel) -> SamplingRequest:
    """Return a request of latents, with the pipeline's negative prompt where the request has none.

    Args:
      config: config of the pipeline.
      request: request with its size.
      model: the pipeline's model, or one without weights.

    Raises:
      UserError: a size that the model cannot sample, or what `make_sampling_request` refuses.
    """
    own = request if request.negative is not None else request._replace(negative=config.negative)
    return make_sampling_request(own, config.latent_grid(to_grid(request.size)), model)
