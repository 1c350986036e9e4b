"""Diffusion transformers over packed rows, their configs, and their cost."""

from dit_video.backbones.dit.attention_maps import attention_maps
from dit_video.backbones.dit.conditioning import (
    ClassLabels,
    CrossAttention,
    Given,
    JointAttention,
    NoContext,
    PooledContext,
    TimeEmbedding,
)
from dit_video.backbones.dit.config import DitConfig, Temporal
from dit_video.backbones.dit.conversion import image_to_video, with_given
from dit_video.backbones.dit.model import Dit
from dit_video.backbones.dit.positions import EndDistances, Factorised, ImageSineCosine, SineCosine

__all__ = [
    "ClassLabels",
    "CrossAttention",
    "Dit",
    "DitConfig",
    "EndDistances",
    "Factorised",
    "Given",
    "ImageSineCosine",
    "JointAttention",
    "NoContext",
    "PooledContext",
    "SineCosine",
    "Temporal",
    "TimeEmbedding",
    "attention_maps",
    "image_to_video",
    "with_given",
]
