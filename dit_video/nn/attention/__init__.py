"""Attention within the segments of packed rows.

All backends implement one protocol, `Attention`; a model is built with a backend and a pattern, which decides which
tokens attend to each other. Every backend is tested against `DenseAttention`, whose mask defines the pattern.
"""

from dit_video.nn.attention.api import Attention
from dit_video.nn.attention.backends.chunked import Chunked
from dit_video.nn.attention.backends.dense import Dense
from dit_video.nn.attention.backends.gpu import Cudnn, Tokamax
from dit_video.nn.attention.backends.splash import Splash, default_block
from dit_video.nn.attention.bias import Bias, BiasTable, RelativeBias
from dit_video.nn.attention.dispatch import Auto, Backend, Chosen, check_attention, make_attention
from dit_video.nn.attention.masks import (
    CausalFrames,
    Full,
    Pattern,
    PatternChoice,
    SlidingWindow,
    SpaceOnly,
    SparseCausal,
    TimeOnly,
    WithPlaceless,
)
from dit_video.nn.attention.pairs import pair_count
from dit_video.nn.attention.tokens import NOWHERE, Coordinates, Tokens, grid_indices
from dit_video.nn.attention.weights import Recorded, attention_weights

__all__ = [
    "NOWHERE",
    "Attention",
    "Auto",
    "Backend",
    "Bias",
    "BiasTable",
    "CausalFrames",
    "Chosen",
    "Chunked",
    "Coordinates",
    "Cudnn",
    "Dense",
    "Full",
    "Pattern",
    "PatternChoice",
    "Recorded",
    "RelativeBias",
    "SlidingWindow",
    "SpaceOnly",
    "SparseCausal",
    "Splash",
    "TimeOnly",
    "Tokamax",
    "Tokens",
    "WithPlaceless",
    "attention_weights",
    "check_attention",
    "default_block",
    "grid_indices",
    "make_attention",
    "pair_count",
]
