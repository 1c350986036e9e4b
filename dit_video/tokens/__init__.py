"""Spacetime patches as token sequences: patchify, coordinates, packing, rotary embedding."""

from dit_video.tokens.coordinates import coordinates
from dit_video.tokens.noise import packed_noise
from dit_video.tokens.packing import (
    Item,
    Rows,
    RowShape,
    empty_row,
    pack,
    positions,
    segment_max,
    segment_mean,
    to_tokens,
    unpack,
)
from dit_video.tokens.patchify import Grid, patchify, token_grid, unpatchify
from dit_video.tokens.rotary import Rotary3d, even_split, rotary_angles, rotate

__all__ = [
    "Grid",
    "Item",
    "Rotary3d",
    "RowShape",
    "Rows",
    "coordinates",
    "empty_row",
    "even_split",
    "pack",
    "packed_noise",
    "patchify",
    "positions",
    "rotary_angles",
    "rotate",
    "segment_max",
    "segment_mean",
    "to_tokens",
    "token_grid",
    "unpack",
    "unpatchify",
]
