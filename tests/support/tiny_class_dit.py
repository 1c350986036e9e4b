"""Configs of the smallest class-conditional image transformers, and random folders of their pipelines."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from dit_video.families import save_autoencoder, save_denoiser
from dit_video.models.autoencoders import ImageLevels, ImageVaeConfig
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import ImageSineCosine
from dit_video.models.backbones.transformer import TimeEmbedding
from support.random_params import make_random_params

DIT = DiTConfig(
    channels=3,
    context_width=0,
    classes=5,
    width=16,
    layers=2,
    heads=2,
    qk_norm="none",
    rotary="none",
    absolute_position=ImageSineCosine(side=4),
    modulation="own",
    variance="predicted",
)
SIT = dataclasses.replace(DIT, time_embedding=TimeEmbedding(scale=1.0, reversed=True), variance="dropped")
VAE = ImageVaeConfig(channels=3, levels=ImageLevels(widths=(4, 8), blocks=1, groups=2))
SIDE = 16
"""Side of the images: 4 tokens of a patch of 2, at a stride of 2."""
NAMES = {"0": "tench, Tinca tinca", "1": "crane", "2": "goldfinch", "3": "crane"}
DDIM = {"_class_name": "DDIMScheduler", "clip_sample": False}


def write_class_dit(
    folder: Path,
    backbone: DiTConfig = DIT,
    *,
    scheduler: dict[str, Any] | None = DDIM,
    names: dict[str, str] = NAMES,
) -> Path:
    """Write a pipeline of diffusers; one of the authors, which has no names of classes, without a scheduler."""
    save_denoiser(folder / "transformer", backbone, make_random_params(backbone.make), layout="authors")
    save_autoencoder(folder / "vae", VAE, make_random_params(VAE.make))
    if scheduler is not None:
        (folder / "scheduler").mkdir()
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "id2label": names}))
    return folder
