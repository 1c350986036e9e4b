"""Diffusion transformers over packed rows, their configs, and their cost."""

from dit_video.models.backbones.dit.conditioning import (
    ClassLabels,
    CrossAttention,
    JointAttention,
    NoContext,
    PooledContext,
    TimeEmbedding,
)
from dit_video.models.backbones.dit.config import TemporalLayers
from dit_video.models.backbones.dit.model import Dit, DitConfig
from dit_video.models.backbones.dit.positions import (
    BoundaryEmbedding,
    FactorizedEmbedding,
    ImageSineCosine,
    PositionEmbedding,
    SineCosine,
)
