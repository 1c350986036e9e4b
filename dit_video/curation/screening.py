"""Screening of an ingest by steps: split a file into shots, measure them, drop those outside limits, and duplicates."""

import bisect
import dataclasses
import functools
import itertools
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence

import av

from dit_video.core.errors import UserError
from dit_video.curation import measures
from dit_video.curation.duplicates import drop_duplicates
from dit_video.curation.measures import FrameSample, FrameSampler, ThumbnailMaker
from dit_video.curation.shots import HEIGHT, WIDTH, CutDetector, DetectorName, Span, split_at_transitions
from dit_video.data.ingest.screening import JudgedShot, Screening, ScreeningResult, Shot
from dit_video.video import TOLERANCE, compute_average_fps, probe
from dit_video.video.cut import split_span
from dit_video.video.reader import IMAGE_CODECS

Threshold = float | int

MIN_SHOT_SECONDS = 0.2
"""Minimum length of a shot in seconds; every shot of this length is shown at one of the times that are sampled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreeningConfig(Screening):
    """Steps of the screening and their limits; None disables a step, and a value at a limit is kept.

    If a step needs one measure, all are taken, except black bars, which need `max_letterbox` or `measure`. Images,
    which have no length, are exempt from the limits on duration, motion and frozen time. The module `measures`
    defines the measures.

    Raises:
      UserError: If a limit is out of range, or a minimum is above its maximum.
    """

    shots: DetectorName | None = None
    """Detector by which files are split at shot boundaries (needs the extra `ingest`): "gradual" detects cuts,
    dissolves and fades, PySceneDetect's "content" and "adaptive" cuts alone."""
    shot_threshold: Threshold | None = None
    """Threshold of the detector; by default PySceneDetect's: 27 levels of 255 for "content", a ratio of 3 for
    "adaptive"; for "gradual" a factor of the changes that count, 1."""
    max_clip_seconds: Threshold | None = None
    """Maximum duration of a clip in seconds; longer shots are cut into parts of nearly equal duration."""
    min_shot: Threshold = 0.5
    """Minimum length of a shot in seconds, at least 0.2; shorter shots are dropped, fades and flashes among them."""
    min_seconds: Threshold | None = None
    """Minimum duration of a clip: the time between its first and last frame plus one frame at the clip's rate, to the
    millisecond, as containers round."""
    max_seconds: Threshold | None = None
    """Maximum duration of a clip in seconds."""
    min_size: int | None = None
    """Minimum length of the shorter side in pixels, as shown."""
    max_size: int | None = None
    """Maximum length of the shorter side in pixels, as shown."""
    min_motion: Threshold | None = None
    """Minimum average change of luma, in levels of 255 per second: 14 to 36 for one person signing, 60 to 105 for a
    moving camera."""
    max_motion: Threshold | None = None
    """Maximum average change of luma, in levels of 255 per second."""
    max_black: Threshold | None = None
    """Maximum share of time, 0 to 1, in which the frame is black."""
    max_frozen: Threshold | None = None
    """Maximum share of time, 0 to 1, in which the frame stands still for a second or longer, or throughout."""
    max_letterbox: Threshold | None = None
    """Maximum share of the area, 0 to 1, that black bars cover. Nothing is cropped; a shot's `letterbox` holds
    the bars."""
    min_sharpness: Threshold | None = None
    """Minimum variance of the Laplacian (levels²) of luma at 256 pixels of the longer side: 60 to 800 in 21 sharp
    clips, 4 to 40 in copies of eight clips that had been shrunk to 96×64 pixels."""
    measure: bool = False
    """True to take all measures of every clip, whether they have a limit or not. The values are columns of the data
    set, from whose histograms limits can be chosen later."""
    drop_hdr: bool = False
    """True to drop HDR (PQ, HLG), which is mapped to standard dynamic range whenever it is decoded."""
    duplicates: int | None = None
    """Maximum number of bits of 64 in which the hashes of near-duplicates differ. Start with 4: re-encoded, shrunk and
    brightened copies of eight clips differed by 0 to 6, mostly by 2, and so did two takes of one person in
    front of the same wall."""

    def __post_init__(self):
        for name in ("max_black", "max_frozen", "max_letterbox"):
            self._check(name, 0, 1, "a share")
        for name in ("min_seconds", "max_seconds", "min_size", "max_size", "min_motion", "max_motion", "min_sharpness"):
            self._check(name, 0, float("inf"), "a number")
        self._check("duplicates", 0, 64, "a number of bits")
        self._check("min_shot", MIN_SHOT_SECONDS, float("inf"), "a number of seconds")
        self._check("shot_threshold", 0, float("inf"), "a number")
        self._check("max_clip_seconds", MIN_SHOT_SECONDS, float("inf"), "a number of seconds")
        if self.shot_threshold is not None and self.shots is None:
            raise UserError(f"shot_threshold={self.shot_threshold} needs a shot detector; set shots to one")
        for name in ("seconds", "size", "motion"):
            minimum, maximum = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if minimum is not None and maximum is not None and minimum > maximum:
                raise UserError(f"min_{name}={minimum} is above max_{name}={maximum}, which keeps no clip; lower it")

    def _check(self, name: str, minimum: Threshold, maximum: Threshold, kind: str) -> None:
        value = getattr(self, name)
        if value is not None and not minimum <= value <= maximum:
            limits = f"{kind} from {minimum:g} to {maximum:g}"
            raise UserError(f"{name}={value} is invalid: it must be {limits}. Use None to disable the step")

    @property
    def measures_letterbox(self) -> bool:
        """Return whether black bars are measured."""
        return self.measure or self.max_letterbox is not None

    @property
    def needs_samples(self) -> bool:
        """Return whether measures are taken."""
        limits = (self.min_motion, self.max_motion, self.max_black, self.max_frozen, self.min_sharpness)
        return self.measures_letterbox or any(limit is not None for limit in (*limits, self.duplicates))

    def screen(self, encoded: bytes, name: str) -> ScreeningResult:
        """Apply the steps to one file, decoding it once; see `Screening.screen`.

        Memory grows with the file's length only by its timestamps and eight rows of numbers per second.
        """
        analyzer = _FileAnalyzer(encoded, self)
        return ScreeningResult(tuple(_judge_shots(name, analyzer, self)), analyzer.facts)

    def find_duplicates(self, hashes: Iterable[Sequence[int] | None], files: Iterable[int]) -> Mapping[int, int]:
        """Return the near-duplicates among clips of different files, each with the kept clip that it duplicates."""
        if self.duplicates is None:
            return {}
        bits = [None if each is None else tuple(each) for each in hashes]
        originals = drop_duplicates(bits, distance=self.duplicates, groups=[*files])
        return {clip: original for clip, original in enumerate(originals) if original is not None}


class _FileAnalyzer:
    """Frame times, cuts and samples of a file, collected in one pass over its frames."""

    def __init__(self, encoded: bytes, config: ScreeningConfig):
        self.times = array("d")
        """Time of every frame in seconds; a frame with a time before its predecessor's gets the predecessor's time."""
        self._cut_detector = None if config.shots is None else CutDetector(config.shots, config.shot_threshold)
        self._sampler: FrameSampler | None = None
        if config.needs_samples or config.shots is not None:
            self._thumbnail_maker = ThumbnailMaker(f"video of {len(encoded)} bytes")
        if config.needs_samples:
            self._sampler = FrameSampler(self._thumbnail_maker, letterbox=config.measures_letterbox)
        self._max_seconds, self._has_tiny_pictures = config.max_clip_seconds, config.shots == "gradual"
        self._sizes: dict[int, tuple[int, int]] = {}
        # A change of size is a cut, if files are split at cuts; else it is an error.
        on_resize = None if config.shots is None else self._sizes.__setitem__
        # Shots are the same in pictures whose blocks are not smoothed, unlike measures.
        is_exact = config.needs_samples
        self.facts = probe(encoded, on_frame=self._add_frame, on_resize=on_resize, is_exact=is_exact)
        self.samples: Sequence[FrameSample] = ()
        if self._sampler is not None:
            self._sampler.finish(self.get_frame_time(self.facts.frames))
            self.samples = self._sampler.samples

    def _add_frame(self, time: float, frame: av.VideoFrame) -> None:
        number = len(self.times)
        self.times.append(max(time, self.times[-1] if number else 0.0))
        thumbnail = None
        if self._cut_detector is not None:
            if self._has_tiny_pictures:
                picture = self._thumbnail_maker.make_tiny_picture(frame, HEIGHT, WIDTH)
            else:
                picture = thumbnail = self._thumbnail_maker.make_thumbnail(frame)
            self._cut_detector.add_frame(picture)
        if self._sampler is not None:
            self._sampler.add_frame(number, self.times[number], frame, thumbnail)

    def get_frame_time(self, number: int) -> float:
        """Return the time of a frame; for the number after the last frame, the end of the last frame."""
        if number < self.facts.frames:
            return self.times[number]
        return self.times[-1] + (1 / self.facts.fps if self.facts.frames > 1 else 0.0)

    def get_size(self, number: int) -> tuple[int, int]:
        """Return the height and width at which a frame is shown."""
        changes = [change for change in self._sizes if change <= number]
        return self._sizes[max(changes)] if changes else (self.facts.height, self.facts.width)

    @functools.cached_property
    def transitions(self) -> frozenset[Span]:
        """Return the transitions between shots, and an empty span at each cut and change of size."""
        detected = () if self._cut_detector is None else self._cut_detector.find_transitions()
        is_inside = {size: any(first <= size <= stop for first, stop in detected) for size in self._sizes}
        return frozenset([*detected, *(Span(size, size) for size, is_known in is_inside.items() if not is_known)])

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        """Return the shots, or parts of long ones, and the transitions that have frames, in their order."""
        shots = split_at_transitions(sorted(self.transitions), self.facts.frames)
        parts = shots if self._max_seconds is None else itertools.chain(*map(self._split_shot, shots))
        return tuple(sorted([*parts, *(span for span in self.transitions if span.first < span.stop)]))

    def _split_shot(self, shot: Span) -> list[Span]:
        assert self._max_seconds is not None
        windows = split_span(self.times[shot.first : shot.stop], self._max_seconds)
        return [Span(shot.first + first, shot.first + stop) for first, stop in windows]


def _judge_shots(name: str, analyzer: _FileAnalyzer, config: ScreeningConfig) -> Iterator[JudgedShot]:
    """Yield the shots in their order."""
    if len(analyzer.spans) == 1:
        shot = _measure_shot(Shot.of_file(name, analyzer.facts), analyzer.samples, config)
        yield JudgedShot(shot, _find_exclusion(shot, config), analyzer.get_frame_time(analyzer.facts.frames))
        return
    for number, span in enumerate(analyzer.spans):
        shot, stop = _make_part_shot(f"{name}#{number}", analyzer, span), analyzer.get_frame_time(span.stop)
        first = bisect.bisect_left(analyzer.samples, span.first, key=lambda sample: sample.frame)
        last = bisect.bisect_left(analyzer.samples, span.stop, key=lambda sample: sample.frame)
        shot = _measure_shot(shot, analyzer.samples[first:last], config)
        length = min(stop - shot.start, shot.duration)
        if span in analyzer.transitions:
            yield JudgedShot(shot, "transition between shots", stop, is_cut=True)
        elif length < config.min_shot - TOLERANCE:
            yield JudgedShot(shot, f"shot of {length:.4g} s is below {config.min_shot:g} s", stop, is_cut=True)
        else:
            yield JudgedShot(shot, _find_exclusion(shot, config), stop)


def _make_part_shot(name: str, analyzer: _FileAnalyzer, span: Span) -> Shot:
    """Return the shot of a part of the file's frames."""
    facts, start, frames = analyzer.facts, analyzer.times[span.first], span.stop - span.first
    seconds = analyzer.times[span.stop - 1] - start
    fps, (height, width) = compute_average_fps(frames, seconds, facts.fps), analyzer.get_size(span.first)
    whole = dataclasses.replace(Shot.of_file(name, facts), height=height, width=width)
    return dataclasses.replace(whole, start=start, frames=frames, fps=fps, seconds=seconds)


def _measure_shot(shot: Shot, frame_samples: Sequence[FrameSample], config: ScreeningConfig) -> Shot:
    if not frame_samples:  # nothing is measured, or the shot is too short
        return shot
    bars = measures.find_letterbox(frame_samples, shot.height, shot.width) if config.measures_letterbox else None
    return dataclasses.replace(
        shot,
        motion=measures.compute_motion(frame_samples),
        black=measures.compute_black_share(frame_samples),
        frozen=measures.compute_frozen_share(frame_samples),
        sharpness=measures.compute_median_sharpness(frame_samples),
        letterbox=bars,
        hash=measures.select_hashes(frame_samples),
    )


def _find_exclusion(shot: Shot, config: ScreeningConfig) -> str:
    """Return the first rule that excludes a shot, with its value and its limit; empty if the shot is kept."""
    if config.drop_hdr and shot.transfer != "sdr":
        return f"transfer function {shot.transfer!r} is HDR"
    is_image = shot.frames == 1 and shot.codec in IMAGE_CODECS
    letterbox_area = None if shot.letterbox is None else shot.letterbox.compute_area_share(shot.height, shot.width)
    rules: list[tuple[str, Threshold | None, str, Threshold | None, Threshold | None]] = [
        ("size", min(shot.height, shot.width), "px", config.min_size, config.max_size),
        ("duration", None if is_image else shot.duration, "s", config.min_seconds, config.max_seconds),
        ("black", shot.black, "of the time", None, config.max_black),
        ("frozen", None if is_image else shot.frozen, "of the time", None, config.max_frozen),
        ("motion", None if is_image else shot.motion, "levels/s", config.min_motion, config.max_motion),
        ("letterbox", letterbox_area, "of the picture", None, config.max_letterbox),
        ("sharpness", shot.sharpness, "levels²", config.min_sharpness, None),
    ]
    for rule, value, unit, minimum, maximum in rules:
        tolerance = TOLERANCE if unit == "s" else 0
        if value is not None and minimum is not None and value < minimum - tolerance:
            return f"{rule} {value:.4g} {unit} is below {minimum:g}"
        if value is not None and maximum is not None and value > maximum + tolerance:
            return f"{rule} {value:.4g} {unit} is above {maximum:g}"
    return ""
