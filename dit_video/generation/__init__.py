"""Generation tasks."""

from dit_video.generation.given import GivenClip
from dit_video.generation.text_to_video import Denoiser, LatentRequest, Sampling, initial_noise, sample_latents

__all__ = ["Denoiser", "GivenClip", "LatentRequest", "Sampling", "initial_noise", "sample_latents"]
