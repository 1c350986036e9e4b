"""Motion vectors of blocks: those that the codec stores, or of block matching where FFmpeg does not export them.

FFmpeg exports the vectors of H.264, MPEG-1, -2 and -4, H.263 and alike. They cost no more than decoding, and no network
is needed. HEVC, VP9 and AV1 are matched on luma of 80 pixels.
"""

import gc
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import av
import numpy as np
from av.codec.context import Flags2
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.frame import PictureType
from av.video.reformatter import Interpolation
from jaxtyping import Float, Shaped
from scipy.ndimage import gaussian_filter

from dit_video.curation.camera_motion import SPANS, BlockVectors
from dit_video.video.reader import Video
from dit_video.video.to_rgb import Orientation, compute_display_size, read_orientation

_LUMA_SIDE = 80
"""Longer side in pixels of the luma that is matched."""
_BLOCK, _RADIUS = 8, 8
"""Sides of its blocks, and the longest motion along an axis that is searched, in pixels."""
_MATCH_SECONDS = 0.2
"""Minimum seconds between matched frames, so that slow motion exceeds the errors of matching."""
_MIN_CONTRAST = 0.7
"""Standard deviation of a block's luma in levels of 255, below which it has no texture to match."""
_COLLECTED_FRAMES = 32
"""Number of frames after which those whose side data were read, which refer to themselves, are freed."""


class _Luma(NamedTuple):
    time: float
    values: Float[np.ndarray, "h w"]


class _VectorVideo(Video):
    """A video whose frames have their motion vectors as side data."""

    def _read_header(self, container: av.container.InputContainer) -> None:
        super()._read_header(container)
        self._context.flags2 |= Flags2.export_mvs


def read_block_vectors(content: bytes) -> tuple[BlockVectors, BlockVectors]:
    """Return the motion of a clip's blocks by its codec, or else by matching, and that by matching; none for an image.

    Vectors are those of the clip as it is shown: upright, in square pixels.

    Raises:
      DecodeError: not a readable video, or damaged.
    """
    parts: list[BlockVectors] = []
    lumas: list[_Luma] = []
    reference_time = -math.inf  # of the last I or P frame in display order
    with _VectorVideo(content) as video:
        orientation, width = Orientation(False, False, False), 0
        for number, timed in enumerate(video.read_frames(), 1):
            frame = timed.frame
            if number == 1:
                orientation = read_orientation(frame)
                width = compute_display_size(frame, video.sample_aspect, video.name)[1]
            # B frames hold many vectors that were not measured but are those of their neighbours, or zero.
            seconds = timed.time - reference_time
            if frame.pict_type == PictureType.P and 0 < seconds < math.inf:
                records = _read_records(frame)
                if records is not None:
                    part = _convert_records(records, frame, float(video.sample_aspect), orientation, width)
                    times = np.full(len(records), timed.time)
                    parts.append(part._replace(times=times, velocities=part.velocities / seconds))
            if frame.pict_type in (PictureType.I, PictureType.P):
                reference_time = timed.time
            if not lumas or timed.time - lumas[-1].time >= _MATCH_SECONDS:
                lumas.append(_Luma(timed.time, _shrink(frame, orientation)))
            if number % _COLLECTED_FRAMES == 0:
                gc.collect(1)
    matches = _concatenate([_match(first, second) for first, second in itertools.pairwise(lumas)])
    return _concatenate(parts)._replace(spans=len(SPANS)) if parts else matches, matches


def _concatenate(parts: Sequence[BlockVectors]) -> BlockVectors:
    empty = BlockVectors(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))
    all_parts = (empty, *parts)
    return BlockVectors(
        np.concatenate([each.times for each in all_parts]),
        np.concatenate([each.positions for each in all_parts]),
        np.concatenate([each.velocities for each in all_parts]),
        np.concatenate([each.weights for each in all_parts]),
    )


def _read_records(frame: av.VideoFrame) -> Shaped[np.ndarray, " n"] | None:
    """Return the vectors that lead to earlier frames, as FFmpeg's records; None if the frame has none."""
    try:
        data = cast(SideDataContainer, frame.side_data).get(Type.MOTION_VECTORS)
    except ValueError:  # PyAV reads no side data of a frame with an unknown kind of it
        return None
    if data is None:
        return None
    records = data.to_ndarray()
    records = records[records["source"] < 0]
    return records if len(records) else None


def _convert_records(
    records: np.ndarray, frame: av.VideoFrame, aspect: float, orientation: Orientation, width: int
) -> BlockVectors:
    """Return the vectors as motion forwards in time, in widths of the frame as it is shown."""
    points = np.stack([records["dst_x"] - frame.width / 2, records["dst_y"] - frame.height / 2], axis=1)
    motions = -np.stack([records["motion_x"], records["motion_y"]], axis=1) / records["motion_scale"][:, None]
    scale = np.array([aspect, 1.0])
    signs = np.where([orientation.flip_columns, orientation.flip_rows], -1.0, 1.0)

    def turn(vectors: np.ndarray) -> np.ndarray:
        vectors = vectors * scale
        return (vectors[:, ::-1] if orientation.transposed else vectors) * signs / width

    weights = records["w"].astype(float) * records["h"]
    return BlockVectors(np.zeros(len(records)), turn(points), turn(motions), weights)


def _shrink(frame: av.VideoFrame, orientation: Orientation) -> Float[np.ndarray, "h w"]:
    """Return the small luma of a frame as it is shown, smoothed."""
    factor = min(1.0, _LUMA_SIDE / max(frame.width, frame.height))
    width, height = (max(2, round(side * factor)) for side in (frame.width, frame.height))
    small = frame.reformat(width=width, height=height, format="gray", interpolation=Interpolation.AREA)
    luma = gaussian_filter(small.to_ndarray().astype(np.float64), 1.0)
    luma = luma.T if orientation.transposed else luma
    return luma[:: -1 if orientation.flip_rows else 1, :: -1 if orientation.flip_columns else 1]


def _match(first: _Luma, second: _Luma) -> BlockVectors:
    """Return the motion of the first frame's blocks to the second one, by the least sum of squares.

    A parabola through the sums next to the least one gives fractions of a pixel.
    """
    a, b = first.values, second.values
    height, width = a.shape
    rows, columns = ((side - 2 * _RADIUS) // _BLOCK for side in a.shape)
    if rows < 1 or columns < 1 or a.shape != b.shape:
        return BlockVectors(np.zeros(0), np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))
    top, left = (height - rows * _BLOCK) // 2, (width - columns * _BLOCK) // 2
    blocks = (rows, _BLOCK, columns, _BLOCK)
    inside = a[top : top + rows * _BLOCK, left : left + columns * _BLOCK]
    size = 2 * _RADIUS + 1
    sums = np.empty((size, size, rows * columns))
    for row, column in np.ndindex(size, size):
        y, x = top + row - _RADIUS, left + column - _RADIUS
        difference = b[y : y + rows * _BLOCK, x : x + columns * _BLOCK] - inside
        sums[row, column] = (difference**2).reshape(blocks).sum(axis=(1, 3)).ravel()
    best_row, best_column = np.divmod(sums.reshape(-1, rows * columns).argmin(axis=0), size)
    block = np.arange(rows * columns)

    def refine(low: np.ndarray, high: np.ndarray) -> np.ndarray:
        curvature = low - 2 * sums[best_row, best_column, block] + high
        offset = 0.5 * (low - high) / np.where(curvature > 0, curvature, np.inf)
        return np.clip(offset, -0.5, 0.5)

    above, below = np.maximum(best_row - 1, 0), np.minimum(best_row + 1, size - 1)
    before, after = np.maximum(best_column - 1, 0), np.minimum(best_column + 1, size - 1)
    y = best_row - _RADIUS + refine(sums[above, best_column, block], sums[below, best_column, block])
    x = best_column - _RADIUS + refine(sums[best_row, before, block], sums[best_row, after, block])
    block_row, block_column = np.divmod(block, columns)
    points = np.stack([left + (block_column + 0.5) * _BLOCK, top + (block_row + 0.5) * _BLOCK], axis=1)
    is_textured = inside.reshape(blocks).std(axis=(1, 3)).ravel() > _MIN_CONTRAST
    return BlockVectors(
        np.full(is_textured.sum(), second.time),
        (points[is_textured] - np.array([width, height]) / 2) / width,
        np.stack([x, y], axis=1)[is_textured] / width / (second.time - first.time),
        np.ones(is_textured.sum()),
    )
