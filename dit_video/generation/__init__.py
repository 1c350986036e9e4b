"""Sampling: plans, packing of requests, and the sampler.

Requests of clips and tasks are in `generation.request` and `generation.tasks`; they import the decoding of video.
"""

from dit_video.generation.blocks import Monitor, SamplingProgress
from dit_video.generation.config import Sampling
from dit_video.generation.denoiser import Denoiser
from dit_video.generation.packing import SamplingRequest
from dit_video.generation.plan import SamplingPlan, StepInputs, StepTransform
from dit_video.generation.sampler import (
    LatentTrace,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)
