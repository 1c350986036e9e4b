"""Optional screening steps of ingest: split a file into shots, measure them, and drop those outside the limits."""

import bisect
import dataclasses
import functools
from array import array
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import av

from dit_video.core.errors import UserError
from dit_video.data.ingest import samples
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.samples import FrameSample, FrameSampler
from dit_video.data.ingest.shots import CutDetector, DetectorName, Span, split_at_cuts
from dit_video.data.ingest.thumbnails import ThumbnailMaker
from dit_video.video import TOLERANCE, VideoInfo, compute_average_fps, probe
from dit_video.video.reader import IMAGE_CODECS

Threshold = float | int

MIN_SHOT_SECONDS = 0.2
"""Minimum length of a shot in seconds; every shot of this length is shown at one of the times that are sampled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """Steps of the screening and their limits; None disables a step, and a value at a limit is kept.

    A limit that nothing exceeds (`min_motion=0`, `max_letterbox=1`) measures without dropping. Images, which have no
    length, are exempt from the limits on duration, motion and frozen time. `dit_video.data.ingest.samples` and
    `measures` define the measures.

    Raises:
      UserError: a limit is out of range, or a minimum is above its maximum.
    """

    shots: DetectorName | None = None
    """PySceneDetect detector by which files are split at shot boundaries (needs the extra `ingest`)."""
    shot_threshold: Threshold | None = None
    """Threshold of the detector; by default PySceneDetect's: 27 levels of 255 for "content", a ratio of 3 for
    "adaptive"."""
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
    drop_hdr: bool = False
    """True to drop HDR (PQ, HLG), which is mapped to standard dynamic range whenever it is decoded."""
    duplicates: int | None = None
    """Maximum number of bits of 64 in which the hashes of near-duplicates differ. `screen` computes the hashes, and
    `drop_duplicates` compares them. Start with 4: re-encoded, shrunk and brightened copies of eight clips differed
    by 0 to 6, mostly by 2, and so did two takes of one person in front of the same wall."""

    def __post_init__(self):
        for name in ("max_black", "max_frozen", "max_letterbox"):
            self._check(name, 0, 1, "a share")
        for name in ("min_seconds", "max_seconds", "min_size", "max_size", "min_motion", "max_motion", "min_sharpness"):
            self._check(name, 0, float("inf"), "a number")
        self._check("duplicates", 0, 64, "a number of bits")
        self._check("min_shot", MIN_SHOT_SECONDS, float("inf"), "a number of seconds")
        self._check("shot_threshold", 0, float("inf"), "a number")
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
    def measures_motion(self) -> bool:
        """Return whether motion is measured."""
        return self.min_motion is not None or self.max_motion is not None

    @property
    def needs_frames(self) -> bool:
        """Return whether frames must be decoded, as the file's facts are not enough."""
        others = (self.shots, self.max_black, self.max_frozen, self.max_letterbox, self.min_sharpness, self.duplicates)
        return self.measures_motion or any(value is not None for value in others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """A file, or a part of it without a cut; measures that were not requested are None."""

    name: str
    """Name of the file, followed by `#0`, `#1`, … if it has several shots."""
    start: float
    """Time of the first frame in seconds after the file's first frame."""
    frames: int
    """Number of frames."""
    fps: float
    """Average frame rate."""
    seconds: float
    """Time between the first and the last frame."""
    height: int
    """Height in pixels, as shown."""
    width: int
    """Width in pixels, as shown."""
    codec: str
    """Name of the video codec."""
    transfer: str = "sdr"
    """Transfer function: "sdr", or "pq" or "hlg" for HDR."""
    motion: float | None = None
    """Average change of luma in levels of 255 per second."""
    black: float | None = None
    """Share of time in which the frame is black."""
    frozen: float | None = None
    """Share of time in which the frame stands still."""
    sharpness: float | None = None
    """Variance of the Laplacian in levels²."""
    letterbox: Borders | None = None
    """Black bars in pixels, as shown."""
    hash: tuple[int, ...] | None = None
    """Four hashes of 64 bits for `drop_duplicates`; None also if no frame has texture."""

    @property
    def duration(self) -> float:
        """Return the seconds for which the shot is shown, including its last frame."""
        return self.seconds + 1 / self.fps


class ScreeningResult(NamedTuple):
    """Shots of a file that are kept, (name, reason) of those that are dropped, and the facts of the file."""

    shots: tuple[Shot, ...]
    dropped: tuple[tuple[str, str], ...]
    facts: VideoInfo


def screen(encoded: bytes, name: str, config: ScreeningConfig) -> ScreeningResult:
    """Apply the steps of `config` to one file, decoding it once; every shot is either kept or dropped.

    Memory grows with the file's length only by its timestamps and eight rows of numbers per second.

    Args:
      encoded: bytes of the file.
      name: name of the file, from which the names of its shots are made.
      config: steps and their limits.

    Raises:
      DecodeError: the file is damaged, or is not a readable video or image.
      UserError: `config.shots` is set, and PySceneDetect is not installed.
    """
    if config.needs_frames:
        analyzer = _FileAnalyzer(encoded, config)
        facts, judged_shots = analyzer.facts, list(_judge_shots(name, analyzer, config))
    else:
        facts = probe(encoded)
        shot = _make_whole_shot(name, facts)
        judged_shots = [(shot, _find_exclusion(shot, config))]
    return ScreeningResult(
        shots=tuple(shot for shot, reason in judged_shots if reason is None),
        dropped=tuple((shot.name, reason) for shot, reason in judged_shots if reason is not None),
        facts=facts,
    )


class _FileAnalyzer:
    """Frame times, cuts and samples of a file, collected in one pass over its frames."""

    def __init__(self, encoded: bytes, config: ScreeningConfig):
        self.times = array("d")
        """Time of every frame in seconds; a frame with a time before its predecessor's gets the predecessor's time."""
        self._thumbnail_maker = ThumbnailMaker(f"video of {len(encoded)} bytes")
        self._cut_detector = None if config.shots is None else CutDetector(config.shots, config.shot_threshold)
        self._sampler = FrameSampler(self._thumbnail_maker, letterbox=config.max_letterbox is not None)
        self._sizes: dict[int, tuple[int, int]] = {}
        # A change of size is a cut, if files are split at cuts; else it is an error.
        on_resize = None if config.shots is None else self._sizes.__setitem__
        self.facts = probe(encoded, on_frame=self._add_frame, on_resize=on_resize)
        self._sampler.finish(self.get_frame_time(self.facts.frames))
        self.samples: Sequence[FrameSample] = self._sampler.samples

    def _add_frame(self, time: float, frame: av.VideoFrame) -> None:
        number = len(self.times)
        self.times.append(max(time, self.times[-1] if number else 0.0))
        thumbnail = None
        if self._cut_detector is not None:
            thumbnail = self._thumbnail_maker.make_thumbnail(frame)
            self._cut_detector.add_frame(thumbnail)
        self._sampler.add_frame(number, self.times[number], frame, thumbnail)

    def get_frame_time(self, number: int) -> float:
        """Return the time of a frame; for the number after the last frame, the end of the last frame."""
        return self.times[number] if number < self.facts.frames else self.times[-1] + 1 / self.facts.fps

    def get_size(self, number: int) -> tuple[int, int]:
        """Return the height and width at which a frame is shown."""
        changes = [change for change in self._sizes if change <= number]
        return self._sizes[max(changes)] if changes else (self.facts.height, self.facts.width)

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        cuts = [] if self._cut_detector is None else self._cut_detector.frame_numbers
        return split_at_cuts([*cuts, *self._sizes], self.facts.frames)


def _judge_shots(name: str, analyzer: _FileAnalyzer, config: ScreeningConfig) -> Iterator[tuple[Shot, str | None]]:
    """Yield the shots, each with the reason why it is dropped, or None."""
    if len(analyzer.spans) == 1:
        shot = _measure_shot(_make_whole_shot(name, analyzer.facts), analyzer.samples, config)
        yield shot, _find_exclusion(shot, config)
        return
    for number, span in enumerate(analyzer.spans):
        shot = _make_part_shot(f"{name}#{number}", analyzer, span)
        shown_seconds = analyzer.get_frame_time(span.stop) - analyzer.get_frame_time(span.first)
        if (length := min(shown_seconds, shot.duration)) < config.min_shot - TOLERANCE:
            yield shot, f"shot of {length:.4g} s is below {config.min_shot:g} s"
            continue
        first = bisect.bisect_left(analyzer.samples, span.first, key=lambda sample: sample.frame)
        stop = bisect.bisect_left(analyzer.samples, span.stop, key=lambda sample: sample.frame)
        shot = _measure_shot(shot, analyzer.samples[first:stop], config)
        yield shot, _find_exclusion(shot, config)


def _make_whole_shot(name: str, facts: VideoInfo) -> Shot:
    return Shot(name=name, start=0.0, **dataclasses.asdict(facts))


def _make_part_shot(name: str, analyzer: _FileAnalyzer, span: Span) -> Shot:
    """Return the shot of a part of the file's frames."""
    facts, start, frames = analyzer.facts, analyzer.times[span.first], span.stop - span.first
    seconds = analyzer.times[span.stop - 1] - start
    fps, (height, width) = compute_average_fps(frames, seconds, facts.fps), analyzer.get_size(span.first)
    whole = dataclasses.replace(_make_whole_shot(name, facts), height=height, width=width)
    return dataclasses.replace(whole, start=start, frames=frames, fps=fps, seconds=seconds)


def _measure_shot(shot: Shot, frame_samples: Sequence[FrameSample], config: ScreeningConfig) -> Shot:
    measures_letterbox = config.max_letterbox is not None
    return dataclasses.replace(
        shot,
        motion=samples.compute_motion(frame_samples) if config.measures_motion else None,
        black=None if config.max_black is None else samples.compute_black_share(frame_samples),
        frozen=None if config.max_frozen is None else samples.compute_frozen_share(frame_samples),
        sharpness=None if config.min_sharpness is None else samples.compute_median_sharpness(frame_samples),
        letterbox=samples.find_letterbox(frame_samples, shot.height, shot.width) if measures_letterbox else None,
        hash=None if config.duplicates is None else samples.select_hashes(frame_samples),
    )


def _find_exclusion(shot: Shot, config: ScreeningConfig) -> str | None:
    """Return the first rule that excludes a shot, with its value and its limit; None if the shot is kept."""
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
    return None
