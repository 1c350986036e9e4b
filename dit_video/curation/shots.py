"""Shot boundaries in the frames that PyAV decodes: by our detector of transitions, or by PySceneDetect's of cuts.

Detectors receive frames one by one and return frame numbers, so that times are PyAV's, whatever the file's frame rate.

PySceneDetect's own minimum length is disabled: it would join a short shot to its neighbour, and the clip would contain
a cut.

Our detector finds cuts, dissolves and fades in a stream of tiny pictures. A dissolve mixes two pictures, so that the
one in its middle is the mean of those on both sides, which are unrelated. Motion does not pass through the mean. So
the detector compares, in windows of several lengths around every frame (as twin comparison does: Zhang, Kankanhalli
and Smoliar, "Automatic partitioning of full-motion video", 1993),

    ρ = ‖m − (a + b) / 2‖ / ‖b − a‖   the middle m with the ends a and b: 0 in a dissolve, √(3/4) for unrelated pictures
    ε = ‖minₛ |a(x + s) − b(x)|‖      what neither motion by s nor a change of light explains, in levels of 255

A fade is a dissolve to black and one from it. At a cut ε is far above that of the frames before and after, and the
picture before does not return, as it does after a flash.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from dit_video.core.errors import UserError

HEIGHT, WIDTH = 9, 16
"""Size of the tiny pictures, whatever the aspect ratio of the video."""
HALF_WINDOWS = (2, 3, 4, 6, 8, 12, 16, 24, 36)
"""Frames between the middle of a window and its ends: for dissolves of 0.3 s at 8 frames per second to 1.5 s at 48."""
MIN_CHANGE = 10.0
"""Minimum root mean square of b − a, in levels."""
MAX_DEVIATION = 0.35
"""Maximum of ρ in a dissolve."""
MIN_UNEXPLAINED = 6.0
"""Minimum of ε in levels: above those of cameras and objects that move, below those of different pictures."""
MIN_RECOLOURED = 0.25
"""Minimum share of pixels that differ between the histograms of 512 colours."""
MIN_NOVELTY = 0.2
"""Minimum share of the change that motion does not explain, times the share of pixels that differ in the histograms."""
MIN_CUT_RATIO = 2.0
"""Minimum ratio of ε at a cut to that of the two frames before and after."""
MIN_CHANGE_RATIO = 1.5
"""Minimum ratio of the change at a cut to that of the two frames before and after, as pans begin and end slower."""
MAX_FLASH_FRAMES = 7
"""Maximum duration of a flash, in frames: the picture of before returns."""
_MAX_RETURN = 0.4
"""Maximum difference of a picture that returns, relative to that of the flash."""
_MAX_SHIFT = 2
"""Maximum motion between the ends of a window, in pixels: an eighth of the width."""
_GAINS = (0.4, 2.5)
"""Minimum and maximum change of contrast that is due to light."""
_BLACK = 32.0
"""Average of a black picture's brightest colours, below which a change of light explains nothing."""
_MIXED = 0.05
"""Minimum share of each picture in a frame that belongs to a dissolve."""
_MAX_STEP = 0.6
"""Maximum change of that share from one frame to the next; greater ones are cuts."""
_FULL_CHANGE = 0.85
"""Share of the greatest change, from which on a window's ends count as the shots themselves."""
_CHUNK, _MARGIN = 1024, 256
"""Frames that are processed at once, and those on both sides of them."""

TinyPictures = Float32[np.ndarray, f"T {HEIGHT} {WIDTH} 3"]
TinyPicture = Float32[np.ndarray, f"{HEIGHT} {WIDTH} 3"]


class Span(NamedTuple):
    """Consecutive frames of a file, from `first` up to but not including `stop`."""

    first: int
    stop: int


class _Mixture(NamedTuple):
    """A window in whose middle two pictures are mixed."""

    first: int
    stop: int
    change: float
    half_window: int


def detect_transitions(pictures: UInt8[np.ndarray, "T h w 3"], threshold: float = 1.0) -> tuple[Span, ...]:
    """Return the transitions in order: the frames that belong to no shot, and an empty span for a cut.

    Args:
      pictures: Pictures of `HEIGHT` by `WIDTH` pixels, RGB.
      threshold: Factor of the minimum changes; a greater one detects fewer transitions.
    """
    spans: list[Span] = []
    for start in range(0, len(pictures), _CHUNK):
        begin = max(0, start - _MARGIN)
        part = pictures[begin : start + _CHUNK + _MARGIN].astype(np.float32)
        for first, stop in _detect_in_part(part, threshold):
            if start <= begin + first < start + _CHUNK and (not spans or begin + first >= spans[-1].stop):
                spans.append(Span(begin + first, begin + stop))
    return tuple(spans)


def _detect_in_part(frames: TinyPictures, threshold: float) -> list[Span]:
    colours = _count_colours(frames)
    gradual = _join_fades(_measure_extents(sorted(_find_mixtures(frames, colours, threshold)), len(frames)), frames)
    cuts = [
        Span(cut, cut)
        for cut in _find_cuts(frames, colours, threshold)
        if not any(span.first - 2 <= cut <= span.stop + 2 for span in gradual)
    ]
    return sorted([*gradual, *cuts])


def _find_mixtures(frames: TinyPictures, colours: Float32[np.ndarray, "T 512"], threshold: float) -> Iterator[_Mixture]:
    for half in HALF_WINDOWS:
        before, middle, after = frames[: -2 * half], frames[half:-half], frames[2 * half :]
        change = _rms(after - before)
        deviation = _rms(middle - (before + after) / 2) / np.maximum(change, 1e-3)
        recoloured = _compare_colours(colours[: -2 * half], colours[2 * half :])
        is_candidate = (change > MIN_CHANGE * threshold) & (deviation < MAX_DEVIATION) & (recoloured > MIN_RECOLOURED)
        for place in np.flatnonzero(is_candidate).tolist():
            if deviation[place] > deviation[max(0, place - half // 2) : place + half // 2 + 1].min():
                continue
            a, b = before[place], after[place]
            novelty = _compute_unexplained(a, b) / change[place] * recoloured[place]
            if novelty < MIN_NOVELTY or _compute_unexplained(a, b, allow_light=True) < MIN_UNEXPLAINED * threshold:
                continue
            window = frames[place : place + 2 * half + 1]
            shares = np.tensordot(window - a, b - a, 3) / ((b - a) ** 2).sum()
            mixed = np.flatnonzero((shares > _MIXED) & (shares < 1 - _MIXED)).tolist()
            if len(mixed) > 1 and np.diff(shares).max() < _MAX_STEP:
                yield _Mixture(place + mixed[0], place + mixed[-1] + 1, float(change[place]), half)


def _measure_extents(mixtures: list[_Mixture], frames: int) -> list[Span]:
    """Return one span for all windows in a dissolve: of the shortest ones whose ends are (nearly) the shots."""
    groups: list[list[_Mixture]] = []
    for mixture in mixtures:
        if groups and mixture.first <= max(other.stop for other in groups[-1]) + 1:
            groups[-1].append(mixture)
        else:
            groups.append([mixture])
    spans = []
    for group in groups:
        change = max(mixture.change for mixture in group)
        half = min(mixture.half_window for mixture in group if mixture.change > _FULL_CHANGE * change)
        parts = [mixture for mixture in group if mixture.half_window <= half]
        first, stop = min(part.first for part in parts), max(part.stop for part in parts)
        spans.append(Span(max(0, first - 1), min(frames, stop + 1)))
    return spans


def _join_fades(spans: list[Span], frames: TinyPictures) -> list[Span]:
    """Return the spans, with those joined between which the picture is black."""
    is_black = _compute_brightness(frames) < _BLACK
    joined: list[Span] = []
    for span in spans:
        if joined and (span.first - joined[-1].stop <= 2 or is_black[joined[-1].stop : span.first].all()):
            joined[-1] = Span(joined[-1].first, span.stop)
        else:
            joined.append(span)
    return joined


def _find_cuts(frames: TinyPictures, colours: Float32[np.ndarray, "T 512"], threshold: float) -> Iterator[int]:
    change = np.concatenate([[0.0], _rms(frames[1:] - frames[:-1])])
    recoloured = np.concatenate([[0.0], _compare_colours(colours[:-1], colours[1:])])
    for cut in np.flatnonzero((change > MIN_UNEXPLAINED * threshold) & (recoloured > MIN_RECOLOURED)).tolist():
        nearby = range(max(1, cut - 2), min(len(frames), cut + 3))
        if change[cut] < MIN_CHANGE_RATIO * max((change[number] for number in nearby if number != cut), default=0.0):
            continue
        unexplained = _compute_unexplained(frames[cut - 1], frames[cut], allow_light=True)
        if unexplained < MIN_UNEXPLAINED * threshold:
            continue
        others = [
            _compute_unexplained(frames[number - 1], frames[number], allow_light=True)
            for number in nearby
            if number != cut and change[number] * MIN_CUT_RATIO > unexplained
        ]
        if unexplained < MIN_CUT_RATIO * max(others, default=0.0):
            continue
        following = _rms(frames[cut + 1 : cut + 1 + MAX_FLASH_FRAMES] - frames[cut - 1])
        preceding = _rms(frames[max(0, cut - 1 - MAX_FLASH_FRAMES) : cut - 1] - frames[cut])
        if min([*following, *preceding], default=np.inf) > _MAX_RETURN * change[cut]:
            yield cut


def _compute_unexplained(a: TinyPicture, b: TinyPicture, *, allow_light: bool = False) -> float:
    """Return ε: the root mean square, in levels, of what differs at every place whatever the motion (and the light)."""
    candidates = [b]
    if allow_light and _compute_brightness(np.stack([a, b])).min() >= _BLACK:
        candidates.append((b - b.mean()) * np.clip(a.std() / max(b.std(), 1), *_GAINS) + a.mean())
        candidates.append(b * np.clip(a.mean() / b.mean(), *_GAINS))
        candidates.append(b - np.median(b - a))
    return min(_match(*pair) for other in candidates for pair in ((a, other), (other, a)))


def _match(a: TinyPicture, b: TinyPicture) -> float:
    padded = np.pad(a, ((_MAX_SHIFT, _MAX_SHIFT), (_MAX_SHIFT, _MAX_SHIFT), (0, 0)), mode="edge")
    shifted = np.lib.stride_tricks.sliding_window_view(padded, (HEIGHT, WIDTH), (0, 1))
    differences = shifted - b.transpose(2, 0, 1)
    squares = np.einsum("yxchw,yxchw->yxhw", differences, differences) / 3
    return float(np.sqrt(squares.min(axis=(0, 1)).mean()))


def _rms(difference: TinyPictures) -> Float32[np.ndarray, " T"]:
    return np.sqrt((difference**2).mean(axis=(1, 2, 3)))


def _compute_brightness(frames: TinyPictures) -> Float32[np.ndarray, " T"]:
    """Return the average over colours of the brightest pixels."""
    return frames.max(axis=(1, 2)).mean(axis=1)


def _count_colours(frames: TinyPictures) -> Float32[np.ndarray, "T 512"]:
    """Return histograms of eight levels of red, green and blue."""
    numbers = (frames / 32).astype(np.int64) @ np.array([64, 8, 1]) + 512 * np.arange(len(frames))[:, None, None]
    counts = np.bincount(numbers.ravel(), minlength=512 * len(frames)).reshape(-1, 512)
    return (counts / (HEIGHT * WIDTH)).astype(np.float32)


def _compare_colours(
    first: Float32[np.ndarray, "T 512"], second: Float32[np.ndarray, "T 512"]
) -> Float32[np.ndarray, " T"]:
    """Return the share of pixels by which two histograms differ."""
    return np.abs(first - second).sum(axis=1) / 2


DetectorName = Literal["gradual", "content", "adaptive"]
DEFAULT_THRESHOLDS: dict[DetectorName, float] = {"content": 27.0, "adaptive": 3.0, "gradual": 1.0}
"""Default thresholds: those of PySceneDetect, and for "gradual" a factor of the changes that count."""


class CutDetector:
    """A detector of cuts in a stream of frames.

    Args:
      detector: "gradual" detects cuts, dissolves and fades (`dit_video.curation.shots`). "content" compares
        neighbouring frames: a cut is where hue, saturation and lightness (0..255) change by `threshold` or more on
        average. "adaptive" requires a change of 15 or more that is `threshold` times as large as in the two frames on
        each side, so that fast motion is not a cut.
      threshold: Threshold of the detector; by default PySceneDetect's, 27 and 3, and for "gradual" 1, a factor of the
        minimum change.

    Raises:
      UserError: If PySceneDetect, or the OpenCV that it brings, is not installed.
    """

    def __init__(self, detector: DetectorName, threshold: float | int | None = None):
        try:
            import cv2
            from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
        except ModuleNotFoundError as error:
            raise UserError(f"shot boundaries need PySceneDetect ({error}); run pip install -e '.[ingest]'") from error
        self._threshold = DEFAULT_THRESHOLDS[detector] if threshold is None else float(threshold)
        self._detector: Any = None
        if detector == "content":
            self._detector = ContentDetector(threshold=self._threshold, min_scene_len=0)
        elif detector == "adaptive":
            self._detector = AdaptiveDetector(adaptive_threshold=self._threshold, min_scene_len=0)
        self._timecode, self._opencv = FrameTimecode, cv2
        self._count = 0
        self._cuts: list[int] = []
        self._pictures: list[UInt8[np.ndarray, f"{HEIGHT} {WIDTH} 3"]] = []

    def add_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add the next frame, RGB; 432 bytes of it are kept at most.

        "gradual" shrinks it to `HEIGHT` by `WIDTH` pixels; `ThumbnailMaker` makes such pictures faster than others.
        """
        if self._detector is None:
            if frame.shape[:2] != (HEIGHT, WIDTH):
                frame = self._opencv.resize(frame, (WIDTH, HEIGHT), interpolation=self._opencv.INTER_AREA)
            self._pictures.append(frame)
            return
        # PySceneDetect requires a frame rate to compute times; only frame numbers are used here, so any rate will do.
        timecode = self._timecode(self._count, 25.0)
        cuts = self._detector.process_frame(timecode, np.ascontiguousarray(frame[..., ::-1]))
        self._cuts.extend(cut.frame_num for cut in cuts if cut.frame_num > 0)
        self._count += 1

    def find_transitions(self) -> tuple[Span, ...]:
        """Return the transitions in order: the frames that belong to no shot, and an empty span for a cut."""
        if self._detector is None and self._pictures:
            return detect_transitions(np.stack(self._pictures), self._threshold)
        return tuple(Span(cut, cut) for cut in self._cuts)


def split_at_transitions(transitions: Sequence[Span], frames: int) -> tuple[Span, ...]:
    """Return the shots of a file with this many frames: what is between its transitions."""
    starts = [0, *(stop for _, stop in sorted(transitions))]
    stops = [*(first for first, _ in sorted(transitions)), frames]
    spans = (Span(first, stop) for first, stop in zip(starts, stops, strict=True))
    return tuple(span for span in spans if span.first < span.stop)
