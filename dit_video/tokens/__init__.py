"""Spacetime patches as token sequences: patchify, positions, packing, rotary embedding."""

from dit_video.core.grid import Grid
from dit_video.tokens.noise import sample_packed_noise
from dit_video.tokens.packing import (
    PackedBatch,
    PackedExample,
    PackedShape,
    compute_segment_offsets,
    expand_to_tokens,
    make_empty_row,
    pack,
    segment_max,
    segment_mean,
    unpack,
)
from dit_video.tokens.patchify import compute_token_grid, patchify, unpatchify
from dit_video.tokens.positions import compute_positions
from dit_video.tokens.rotary import Rotary3d, compute_rotary_angles, rotate, split_evenly

__all__ = [
    "Grid",
    "PackedBatch",
    "PackedExample",
    "PackedShape",
    "Rotary3d",
    "compute_positions",
    "compute_rotary_angles",
    "compute_segment_offsets",
    "compute_token_grid",
    "expand_to_tokens",
    "make_empty_row",
    "pack",
    "patchify",
    "rotate",
    "sample_packed_noise",
    "segment_max",
    "segment_mean",
    "split_evenly",
    "unpack",
    "unpatchify",
]
