"""Open model families: their files, read and written, and the pipelines that they make."""

from dit_video.families.autoencoders import load_autoencoder, read_autoencoder_config, save_autoencoder
from dit_video.families.denoisers import load_denoiser, read_denoiser_config, save_denoiser

__all__ = [
    "load_autoencoder",
    "load_denoiser",
    "read_autoencoder_config",
    "read_denoiser_config",
    "save_autoencoder",
    "save_denoiser",
]
