"""Attention within the segments of packed rows.

All backends implement one protocol, `Attention`; a model is built with a backend and a pattern, which decides which
tokens attend to each other. Every backend is tested against `DenseAttention`, whose mask defines the pattern.
"""

from dit_video.nn.attention.api import (
    GLOBAL,
    Attention,
    AttentionInputs,
    Bias,
    BiasTable,
    ContiguousSegments,
    RelativeBias,
    compute_grid_indices,
)
from dit_video.nn.attention.dense import RecordedAttention
from dit_video.nn.attention.dispatch import (
    ANY_PLATFORM,
    Backend,
    BackendName,
    check_attention,
    check_platform,
    choose_backend,
    get_backend_name,
    make_attention,
)
from dit_video.nn.attention.masks import (
    CausalFrames,
    Full,
    Pattern,
    PatternChoice,
    SlidingWindow,
    SpaceOnly,
    SparseCausal,
    TimeOnly,
    WithGlobalTokens,
    count_pairs,
)
from dit_video.nn.attention.splash import SplashBlocks, choose_block_size
