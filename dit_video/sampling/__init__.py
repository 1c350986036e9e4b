"""Sampling: plans, packing of requests, and the sampler.

Requests of clips, tasks and pipelines are in modules of their own, as they import the decoding of video.
"""

from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import SamplingRequest
from dit_video.sampling.plan import SamplingPlan, StepInputs, StepTransform
from dit_video.sampling.sampler import (
    LatentTrace,
    Monitor,
    SamplingProgress,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)
from dit_video.sampling.sampling_config import Sampling
