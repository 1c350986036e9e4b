"""Configs of the smallest class-conditional image transformers."""

import dataclasses

from dit_video.models.backbones.dit import ClassLabels, DitConfig, ImageSineCosine, NoContext, TimeEmbedding

DIT = DitConfig(
    channels=3,
    context_width=0,
    context=NoContext(),
    labels=ClassLabels(classes=5),
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
