"""Generation tasks."""

from dit_video.generation.conditioning import CLEAN_LATENTS
from dit_video.generation.rows import SamplingRequest
from dit_video.generation.text_to_video import (
    Denoiser,
    LatentTrace,
    Sampling,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)

__all__ = [
    "CLEAN_LATENTS",
    "Denoiser",
    "LatentTrace",
    "Sampling",
    "SamplingRequest",
    "draw_initial_noise",
    "sample_latents",
    "trace_latents",
]
