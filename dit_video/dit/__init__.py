"""Denoisers."""

from dit_video.dit.attention_maps import attention_maps
from dit_video.dit.conditioning import (
    ClassLabels,
    CrossAttention,
    Given,
    JointAttention,
    NoContext,
    PooledContext,
    TimeEmbedding,
)
from dit_video.dit.config import DitConfig, Temporal
from dit_video.dit.denoise import packed_denoise
from dit_video.dit.growing import image_to_video, with_given
from dit_video.dit.model import Dit
from dit_video.dit.positions import EndDistances, Factorised, ImageSineCosine, SineCosine
from dit_video.dit.wan import WanDit, WanDitConfig

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
    "WanDit",
    "WanDitConfig",
    "attention_maps",
    "image_to_video",
    "packed_denoise",
    "with_given",
]
