"""Spacetime patches as token sequences: patchify, positions, packing, rotary embedding."""

from dit_video.core.grid import Grid
from dit_video.tokens.fields import Alignment, Field
from dit_video.tokens.layouts import PackedRows
from dit_video.tokens.packing import PackedBatch, PackedExample, PackedShape, make_empty_row, pack, stack_rows, unpack
from dit_video.tokens.patchify import compute_token_grid, patchify, unpatchify
from dit_video.tokens.positions import compute_positions
from dit_video.tokens.rotary import Rotary3d, compute_rotary_angles, rotate, split_evenly
from dit_video.tokens.segments import compute_segment_offsets, expand_to_tokens, segment_max, segment_mean

__all__ = [
    "Alignment",
    "Field",
    "Grid",
    "PackedBatch",
    "PackedExample",
    "PackedRows",
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
    "segment_max",
    "segment_mean",
    "split_evenly",
    "stack_rows",
    "unpack",
    "unpatchify",
]
