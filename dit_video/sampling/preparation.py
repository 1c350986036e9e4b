"""Requests of clips as requests of latents: their noise, the plan of their task, and values of conditioning."""

import numpy as np

from dit_video.core.errors import UserError
from dit_video.sampling.conditioning import make_request_fields
from dit_video.sampling.packing import SamplingRequest
from dit_video.sampling.request import Request, TaskModel
from dit_video.sampling.sampler import draw_initial_noise
from dit_video.sampling.tasks.completion import Completion
from dit_video.tokens import Grid


def make_sampling_request(request: Request, latents: Grid, model: TaskModel) -> SamplingRequest:
    """Return the request for latents of a size.

    Args:
      request: request of a clip, with its size. Its noise is also that of the plan's `leading_frames`.
      latents: size of its latents.
      model: the model that samples it.

    Raises:
      UserError: a seed that is not a whole number below 2**32, noise that does not fit, or a request that does not fit
        its task or the model.
    """
    if not 0 <= request.seed < 2**32:
        raise UserError(f"seed={request.seed} is invalid: a seed is a whole number from 0 to {2**32 - 1}")
    task = request.task or model.task or Completion()
    plan = task(request, model)
    latents = latents._replace(t=latents.t + plan.leading_frames)
    shape = (*latents, model.codec.config.channels)
    noise = request.noise
    initial = draw_initial_noise(request.seed, latents, shape[-1]) if noise is None else np.asarray(noise)
    if initial.shape != shape:
        raise UserError(f"noise for latents of {latents!r} has shape {shape}, not {initial.shape}")
    if not np.isfinite(initial).all():
        raise UserError("the initial noise holds NaN or infinity; draw standard normal noise")
    values = make_request_fields(model.backbone.conditioning, request.conditioning, request.strengths, latents)
    plan = plan._replace(fields={**values, **plan.fields})
    return SamplingRequest(request.prompt, request.negative or "", initial.astype(np.float32), plan, request.seed)
