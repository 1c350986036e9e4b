"""Generation tasks."""

from dit_video.generation.text_to_video import Denoiser, LatentRequest, Sampling, initial_noise, sample_latents

__all__ = ["Denoiser", "LatentRequest", "Sampling", "initial_noise", "sample_latents"]
