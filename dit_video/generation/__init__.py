"""Generation tasks."""

from dit_video.generation.given import GivenClip
from dit_video.generation.rows import LatentRequest
from dit_video.generation.text_to_video import (
    Denoiser,
    LatentTrace,
    Sampling,
    draw_initial_noise,
    sample_latents,
    trace_latents,
)

__all__ = [
    "Denoiser",
    "GivenClip",
    "LatentRequest",
    "LatentTrace",
    "Sampling",
    "draw_initial_noise",
    "sample_latents",
    "trace_latents",
]
