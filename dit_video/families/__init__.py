"""Open model families: their files, read and written, and the pipelines that they make."""

from dit_video.families.autoencoders import load_autoencoder, save_autoencoder
from dit_video.families.denoiser_format import DenoiserFormat
from dit_video.families.denoisers import (
    find_format,
    get_lora_modules,
    get_prompt_instructions,
    load_denoiser,
    read_denoiser_config,
    save_denoiser,
)
from dit_video.families.family import Family, PipelineParts
from dit_video.families.registry import find_family, register_family
