"""Attention among the tokens of a segment.

One function type, `Attention`, is chosen when a model is built: a backend, and a pattern of who sees whom. Every
backend is held equal to `Dense`, whose mask is the pattern's definition.
"""

from dit_video.nn.attention.chunked import Chunked
from dit_video.nn.attention.dense import Dense
from dit_video.nn.attention.gpu import Cudnn, Tokamax
from dit_video.nn.attention.indices import Coordinates, grid_indices
from dit_video.nn.attention.interface import Attention
from dit_video.nn.attention.making import Auto, Backend, make_attention
from dit_video.nn.attention.patterns import (
    CausalFrames,
    Full,
    Pattern,
    SlidingWindow,
    SpaceOnly,
    SparseCausal,
    TimeOnly,
)
from dit_video.nn.attention.splash import Splash

__all__ = [
    "Attention",
    "Auto",
    "Backend",
    "CausalFrames",
    "Chunked",
    "Coordinates",
    "Cudnn",
    "Dense",
    "Full",
    "Pattern",
    "SlidingWindow",
    "SpaceOnly",
    "SparseCausal",
    "Splash",
    "TimeOnly",
    "Tokamax",
    "grid_indices",
    "make_attention",
]
