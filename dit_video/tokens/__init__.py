"""Spacetime patches as token sequences: patchify, positions, packing, rotary embedding."""

from dit_video.core.grid import Grid
from dit_video.tokens.fields import Alignment, Field
from dit_video.tokens.layouts import Canvas, DenseBatch, PackedRows, RowView
from dit_video.tokens.packing import PackedBatch, PackedExample, make_empty_row, pack, stack_rows, unpack
from dit_video.tokens.patchify import compute_token_grid, patchify, unpatchify
from dit_video.tokens.positions import (
    Rotary3d,
    compute_positions,
    compute_rotary_angles,
    infer_grid,
    rotate,
    split_evenly,
)
from dit_video.tokens.segments import (
    compute_segment_offsets,
    expand_to_tokens,
    segment_max,
    segment_mean,
    take_tokens,
)
from dit_video.tokens.shapes import CanvasFill, CanvasShape, DenseShape, LayoutShape, PackedShape, sort_grids
