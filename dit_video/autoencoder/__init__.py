"""Clips to latents and back."""

from dit_video.autoencoder.causal import (
    PatchVae,
    PatchVaeConfig,
    Posterior,
    from_patches,
    start_from_linear,
    to_patches,
)
from dit_video.autoencoder.interface import Autoencoder, AutoencoderConfig, clip_grid, latent_grid
from dit_video.autoencoder.linear import LinearAutoencoder, fit_linear

__all__ = [
    "Autoencoder",
    "AutoencoderConfig",
    "LinearAutoencoder",
    "PatchVae",
    "PatchVaeConfig",
    "Posterior",
    "clip_grid",
    "fit_linear",
    "from_patches",
    "latent_grid",
    "start_from_linear",
    "to_patches",
]
