"""Configs of the smallest class-conditional image transformers."""

import dataclasses

from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.backbones.positions import ImageSineCosine
from dit_video.models.backbones.transformer import TimeEmbedding

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
