"""Open model families: their files, read and written, and the pipelines that they make."""

from dit_video.families.autoencoders import autoencoder_config, load_autoencoder, save_autoencoder
from dit_video.families.denoisers import denoiser_config, load_denoiser, save_denoiser

__all__ = [
    "autoencoder_config",
    "denoiser_config",
    "load_autoencoder",
    "load_denoiser",
    "save_autoencoder",
    "save_denoiser",
]
