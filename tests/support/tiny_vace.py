"""A small random folder of VACE in diffusers' layout, written by our own exporters."""

from pathlib import Path

from dit_video.models.backbones.vace import VaceControl, VaceDitConfig
from support.tiny_t5 import CONFIG as TEXT
from support.tiny_wan import VAE, write_wan

CONTROL = VaceControl(latent_channels=4, mask_channels=VAE.stride.h * VAE.stride.w, layers=2)
CONFIG = VaceDitConfig(
    channels=4,
    context_width=TEXT.width,
    width=16,
    mlp_dim=24,
    layers=4,
    heads=2,
    time_width=8,
    conditioning=(CONTROL,),
)


def write_vace(folder: Path) -> None:
    """Write a pipeline."""
    write_wan(
        folder, backbone=CONFIG, _class_name="WanVACEPipeline", transformer=["diffusers", "WanVACETransformer3DModel"]
    )
