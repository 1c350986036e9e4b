"""Denoisers."""

from dit_video.dit.conditioning import (
    ClassLabels,
    CrossAttention,
    Given,
    JointAttention,
    NoContext,
    PooledContext,
    TimeEmbedding,
)
from dit_video.dit.config import DitConfig
from dit_video.dit.denoise import packed_denoise
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
    "TimeEmbedding",
    "WanDit",
    "WanDitConfig",
    "packed_denoise",
]
