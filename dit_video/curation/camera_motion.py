"""The camera's motion in a clip, from motion vectors of blocks: a robust fit of a similarity, and its label.

In windows of about a second the vectors of all blocks vote for one similarity transform (RANSAC, refined by
reweighted least squares), which is that of the largest part of the picture, most often the background. Objects are what
does not follow it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from dit_video.core.rng import make_generator

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
    """Positions (x, y), of which y grows downwards."""
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
      vectors: motion of blocks.
      matches: vectors of the same clip with a span of 1, which decide by which factor others are too large.
      tolerance: difference in widths per second up to which a vector counts for the camera's motion.
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
