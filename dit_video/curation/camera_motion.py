"""The camera's motion in a clip, from motion vectors of blocks: a robust fit of a similarity, and its label.

Vectors are those that the codec stores, which cost no more than decoding: FFmpeg exports them of H.264, MPEG-1, -2 and
-4, H.263 and alike. HEVC, VP9 and AV1 are matched by blocks, on luma of 80 pixels.

In windows of about a second the vectors of all blocks vote for one similarity transform (RANSAC, refined by
reweighted least squares), which is that of the largest part of the picture, most often the background. Objects are what
does not follow it.
"""

import gc
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import av
import numpy as np
import pyarrow as pa
from av.codec.context import Flags2
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.frame import PictureType
from av.video.reformatter import Interpolation
from jaxtyping import Float, Shaped
from scipy.ndimage import gaussian_filter

from dit_video.core.rng import make_generator
from dit_video.curation.annotator import Annotator, ClipFile, Column
from dit_video.video.reader import Video
from dit_video.video.to_rgb import Orientation, compute_display_size, read_orientation

WINDOW_SECONDS = 1.0
TOLERANCE = 0.03
"""Speed in widths per second by which a vector may differ from the camera's and count for it: about the half pixel of a
codec's vectors, in frames of 128 pixels at 8 fps."""
MIN_SPEED = 0.01
"""Speed in widths per second below which a camera is static."""
EDGE = 0.4
"""Distance from the centre in widths at which zooms and rolls are compared with pans and tilts."""
DIRECTED_LABELS = (
    *("zoom out", "zoom in", "roll counterclockwise", "roll clockwise"),
    *("pan left", "pan right", "tilt down", "tilt up"),
)
_CANDIDATES, _ITERATIONS = 200, 10
SPANS = np.array([1.0, 0.5, 1.5, 2.0, 3.0])
"""Time that a vector spans, relative to the time from the last reference frame: also from a B frame between, and from
earlier ones."""
_PRIORS = np.array([1.0, 0.7, 0.6, 0.6, 0.4])
"""Weights of vectors of these spans."""
_MIN_DISTANCE = 0.15
"""Minimum distance in widths of the two blocks that a candidate is computed from."""
_MIN_BLOCKS, _MAX_BLOCKS = 8, 2000
"""Minimum and maximum number of vectors of a window."""
_SHIFTS, _MIN_SHARE, _MIN_GAIN = 64, 0.5, 1.5
"""Number of motions of a frame that are tried, the share of the picture that follows a camera, and the factor by which
more of it does so than follows the motion of the window."""
MIN_SHAKE = 0.04
"""Speed in widths per second to and fro, from frame to frame, from which on a camera is handheld."""


class BlockVectors(NamedTuple):
    """Motion of blocks of all frames of a clip, in widths of the frame, relative to its centre."""

    times: Float[np.ndarray, " n"]
    """Seconds at which the blocks are seen."""
    positions: Float[np.ndarray, "n 2"]
    """Positions (x, y); y grows downwards."""
    velocities: Float[np.ndarray, "n 2"]
    """Widths per second by which the content moves, (x, y), if its span is 1."""
    weights: Float[np.ndarray, " n"]
    """Area of each block."""
    spans: int = 1
    """Number of `SPANS` that a vector may have. Codecs refer to one of several frames, and FFmpeg does not say which: a
    velocity is then one of these factors too large, which are found together with the motion."""


class CameraTrack(NamedTuple):
    """A camera's motion, by windows of time; the picture moves the other way."""

    durations: Float[np.ndarray, " w"]
    """Seconds of each window."""
    motions: Float[np.ndarray, "w 4"]
    """Zoom (growth of the picture per second), roll (radians per second, clockwise), and pan and tilt (widths per
    second, to the right and up)."""
    inliers: Float[np.ndarray, " w"]
    """Share of the picture that follows the camera."""
    residuals: Float[np.ndarray, " w"]
    """Mean speed of the picture relative to the camera's motion, in widths per second: motion of objects."""
    shakes: Float[np.ndarray, " w"]
    """Root mean square over frames of the picture's speed relative to that of the window, in widths per second."""


def track_camera(
    vectors: BlockVectors, matches: BlockVectors | None = None, *, tolerance: float = TOLERANCE
) -> CameraTrack:
    """Return the camera's motion; windows without enough vectors are left out.

    Args:
      vectors: Motion of blocks.
      matches: Vectors of the same clip with a span of 1, which decide by which factor others are too large.
      tolerance: Difference in widths per second up to which a vector counts for the camera's motion.
    """
    start = vectors.times.min(initial=np.inf)
    windows = np.floor_divide(vectors.times - start, WINDOW_SECONDS).astype(int)
    if len(windows) and windows[-1] and np.ptp(vectors.times[windows == windows.max()]) < WINDOW_SECONDS / 2:
        windows[windows == windows.max()] -= 1  # the rest belongs to the window before it
    rows = []
    for window in np.unique(windows):
        part = _thin_out(_take(vectors, windows == window))
        if len(part.times) >= _MIN_BLOCKS:
            motion, *others = _fit(part, tolerance)
            if matches is not None:
                is_near = np.abs(matches.times - part.times.mean(axis=0)) < WINDOW_SECONDS
                motion = motion * _find_scale(motion, _take(matches, is_near), tolerance)
            rows.append((max(np.ptp(part.times), WINDOW_SECONDS / 8), motion, *others))
    if not rows:
        return CameraTrack(np.zeros(0), np.zeros((0, 4)), np.zeros(0), np.zeros(0), np.zeros(0))
    columns = [np.array(column) for column in zip(*rows, strict=True)]
    columns[1] = columns[1] * np.array([1, -1, -1, 1])
    return CameraTrack(*columns)


def label_camera(track: CameraTrack) -> str:
    """Return the label of a camera's motion: `static`, `handheld`, `other`, or one of `DIRECTED_LABELS`.

    The motion that is largest at the edge of the picture counts. It is `handheld` if shaking is larger, and `other` if
    the camera goes one way and then another. Empty if nothing was measured.
    """
    if not len(track.motions):
        return ""
    speeds = track.motions * np.array([EDGE, EDGE, 1.0, 1.0])
    mean = np.average(speeds, axis=0, weights=track.durations * np.maximum(track.inliers, 1e-3))
    largest = int(np.abs(mean).argmax())
    if compute_shake(track) > max(MIN_SHAKE, float(np.abs(mean[largest]))):
        return "handheld"
    if abs(mean[largest]) >= MIN_SPEED:
        return DIRECTED_LABELS[2 * largest + int(mean[largest] > 0)]
    return "static" if np.average(np.abs(speeds).max(axis=1), weights=track.durations) < 2 * MIN_SPEED else "other"


def compute_shake(track: CameraTrack) -> float:
    """Return the root mean square of the camera's shaking in all windows, in widths per second."""
    return float(np.sqrt(np.average(track.shakes**2, weights=track.durations))) if len(track.shakes) else 0.0


def _take(vectors: BlockVectors, chosen: np.ndarray) -> BlockVectors:
    times, positions, velocities, weights, spans = vectors
    return BlockVectors(times[chosen], positions[chosen], velocities[chosen], weights[chosen], spans)


def _thin_out(vectors: BlockVectors) -> BlockVectors:
    """Return at most `_MAX_BLOCKS` of the vectors, larger blocks more often."""
    if len(vectors.times) <= _MAX_BLOCKS:
        return vectors
    generator = make_generator(0, "blocks", len(vectors.times))
    shares = vectors.weights / vectors.weights.sum()
    kept = np.sort(generator.choice(len(shares), _MAX_BLOCKS, p=shares))
    return _take(vectors, kept)._replace(weights=np.ones(_MAX_BLOCKS))


def _fit(vectors: BlockVectors, tolerance: float) -> tuple[np.ndarray, float, float, float]:
    """Return the picture's motion `(zoom, roll, x, y)`, the share of inliers, the mean residual and the shake."""
    points, speeds = (values[:, 0] + 1j * values[:, 1] for values in (vectors.positions, vectors.velocities))
    weights = vectors.weights / vectors.weights.sum()
    generator = make_generator(0, "camera motion", len(points))
    first, second = generator.choice(len(points), (2, _CANDIDATES), p=weights)
    priors = _PRIORS[: vectors.spans] / _PRIORS[: vectors.spans].sum()
    spans = SPANS[generator.choice(vectors.spans, (2, _CANDIDATES), p=priors)]
    distance = points[first] - points[second]
    is_far = np.abs(distance) > _MIN_DISTANCE
    # In complex numbers a similarity is one product: speed = factor * point + shift.
    difference = speeds[first] / spans[0] - speeds[second] / spans[1]
    factors = np.where(is_far, difference / np.where(is_far, distance, 1.0), 0.0)
    shifts = speeds[first] / spans[0] - factors * points[first]
    motions = factors[:, None] * points + shifts[:, None]
    scores = _score(motions, speeds, vectors.spans, tolerance)[0] @ weights
    factor, shift = factors[scores.argmax()], shifts[scores.argmax()]
    for _ in range(_ITERATIONS):
        span = _score(factor * points + shift, speeds, vectors.spans, tolerance)[1]
        error = np.abs(speeds - span * (factor * points + shift))
        robust = weights * span**2 / (1 + (error / tolerance) ** 2) ** 2
        robust = robust / robust.sum()
        centre, speed = robust @ points, robust @ (speeds / span)
        spread = robust @ np.abs(points - centre) ** 2
        factor = (robust @ (np.conj(points - centre) * (speeds / span - speed))) / max(spread, 1e-9)
        shift = speed - factor * centre
    span = _score(factor * points + shift, speeds, vectors.spans, tolerance)[1]
    residuals = speeds / span - factor * points - shift
    frames = [vectors.times == time for time in np.unique(vectors.times)]
    shake = np.sqrt(np.mean([_find_shift(residuals[each], weights[each], tolerance) ** 2 for each in frames], axis=0))
    motion = np.array([factor.real, factor.imag, shift.real, shift.imag])
    inliers = weights @ (np.abs(residuals) * span < 2 * tolerance)
    return motion, float(inliers), float(weights @ np.abs(residuals)), float(shake)


def _score(motions: np.ndarray, speeds: np.ndarray, count: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Return how well each vector fits a motion, and the span that it then has."""
    scores, spans = np.zeros(motions.shape), np.ones(motions.shape)
    for span, prior in zip(SPANS[:count], _PRIORS[:count], strict=True):
        score = prior / (1 + (np.abs(speeds - span * motions) / tolerance) ** 2)
        is_better = score > scores
        scores, spans = np.where(is_better, score, scores), np.where(is_better, span, spans)
    return scores, spans


def _find_scale(motion: np.ndarray, matches: BlockVectors, tolerance: float) -> float:
    """Return the factor of a motion that fits most of the matches: 1 over one of the spans."""
    points, speeds = (values[:, 0] + 1j * values[:, 1] for values in (matches.positions, matches.velocities))
    expected = (motion[0] + 1j * motion[1]) * points + motion[2] + 1j * motion[3]
    errors = np.abs(expected / SPANS[:, None] - speeds)
    scores = (1 / (1 + (errors / tolerance) ** 2)).sum(axis=1)
    return float(1 / SPANS[scores.argmax()])


def _find_shift(residuals: np.ndarray, weights: np.ndarray, tolerance: float) -> float:
    """Return the speed at which most of a frame moves relative to its window; 0 if no such motion explains it better.

    A camera moves most of the picture; what moves less of it is an object.
    """
    step = max(1, len(residuals) // _SHIFTS)
    shifts = np.append(residuals[::step], 0.0)
    errors = np.abs(residuals - shifts[:, None])
    scores = (1 / (1 + (errors / tolerance) ** 2)) @ weights
    best = int(scores.argmax())
    is_camera = weights @ (errors[best] < tolerance) > _MIN_SHARE * weights.sum()
    return float(np.abs(shifts[best])) if is_camera and scores[best] > _MIN_GAIN * scores[-1] else 0.0


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
      DecodeError: If the file is not a readable video, or is damaged.
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


_SPEED = "widths/s"
_MOTIONS = ("camera_zoom", "camera_roll", "camera_pan", "camera_tilt")


@dataclass(frozen=True, kw_only=True)
class MotionVectors(Annotator):
    """Motion of the camera and of objects."""

    tolerance: float = TOLERANCE
    """Speed in widths per second by which a vector may differ from the camera's motion and count for it."""

    @property
    def name(self) -> str:
        return "motion_vectors"

    @property
    def columns(self) -> Mapping[str, Column]:
        number = pa.float32()
        labels = "static, handheld, other, or pan left, tilt up, zoom in, roll clockwise and their opposites"
        return {
            "camera": Column(type=pa.string(), description=f"Label of the camera's motion: {labels}."),
            "camera_pan": Column(type=number, unit=_SPEED, description="Mean pan, to the right."),
            "camera_tilt": Column(type=number, unit=_SPEED, description="Mean tilt, upwards."),
            "camera_zoom": Column(type=number, unit="1/s", description="Mean growth of the picture."),
            "camera_roll": Column(type=number, unit="rad/s", description="Mean roll of the camera, clockwise."),
            "camera_shake": Column(type=number, unit=_SPEED, description="Root mean square of shaking."),
            "camera_share": Column(type=number, description="Share of the picture that follows the camera's motion."),
            "object_motion": Column(
                type=number, unit=_SPEED, description="Mean speed of the picture relative to the camera's motion."
            ),
        }

    @property
    def identity(self) -> str:
        return f"motion_vectors 1, tolerance {self.tolerance:g}"

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        track = track_camera(*read_block_vectors(clip.content), tolerance=self.tolerance)
        if not len(track.motions):
            return dict.fromkeys(self.columns)

        def average(values: np.ndarray) -> float:
            return float(np.average(values, weights=track.durations))

        means = {name: average(track.motions[:, index]) for index, name in enumerate(_MOTIONS)}
        return {
            "camera": label_camera(track),
            **means,
            "camera_shake": compute_shake(track),
            "camera_share": average(track.inliers),
            "object_motion": average(track.residuals),
        }
