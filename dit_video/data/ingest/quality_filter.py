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
from dit_video.data.ingest.samples import Sample, Sampler
from dit_video.data.ingest.shots import Cuts, Detector, Span, spans
from dit_video.data.ingest.thumbnails import Pictures
from dit_video.video import TOLERANCE, Facts, average_rate, probe
from dit_video.video.reader import IMAGE_CODECS

Number = float | int

SHORTEST_SHOT = 0.2
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

    shots: Detector | None = None
    """PySceneDetect detector by which files are split at shot boundaries (needs the extra `ingest`)."""
    shot_threshold: Number | None = None
    """Threshold of the detector; by default PySceneDetect's: 27 levels of 255 for "content", a ratio of 3 for
    "adaptive"."""
    min_shot: Number = 0.5
    """Minimum length of a shot in seconds, at least 0.2; shorter shots are dropped, fades and flashes among them."""
    min_seconds: Number | None = None
    """Minimum duration of a clip: the time between its first and last frame plus one frame at the clip's rate, to the
    millisecond, as containers round."""
    max_seconds: Number | None = None
    """Maximum duration of a clip in seconds."""
    min_size: int | None = None
    """Minimum length of the shorter side in pixels, as shown."""
    max_size: int | None = None
    """Maximum length of the shorter side in pixels, as shown."""
    min_motion: Number | None = None
    """Minimum average change of luma, in levels of 255 per second: 14 to 36 for one person signing, 60 to 105 for a
    moving camera."""
    max_motion: Number | None = None
    """Maximum average change of luma, in levels of 255 per second."""
    max_black: Number | None = None
    """Maximum share of time, 0 to 1, in which the frame is black."""
    max_frozen: Number | None = None
    """Maximum share of time, 0 to 1, in which the frame stands still for a second or longer, or throughout."""
    max_letterbox: Number | None = None
    """Maximum share of the area, 0 to 1, that black bars cover. Nothing is cropped; a shot's `letterbox` holds
    the bars."""
    min_sharpness: Number | None = None
    """Minimum variance of the Laplacian (levels²) of luma at 256 pixels of the longer side: 60 to 800 in 21 sharp
    clips, 4 to 40 in copies of eight clips that had been shrunk to 96×64 pixels."""
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
        self._check("min_shot", SHORTEST_SHOT, float("inf"), "a number of seconds")
        self._check("shot_threshold", 0, float("inf"), "a number")
        if self.shot_threshold is not None and self.shots is None:
            raise UserError(f"shot_threshold={self.shot_threshold} needs a shot detector; set shots to one")
        for name in ("seconds", "size", "motion"):
            minimum, maximum = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if minimum is not None and maximum is not None and minimum > maximum:
                raise UserError(
                    f"min_{name}={minimum} is above max_{name}={maximum}, so no clip would be kept; lower it"
                )

    def _check(self, name: str, least: Number, most: Number, kind: str) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise UserError(
                f"{name}={value} is invalid: it must be {kind} from {least:g} to {most:g}. Use None to disable the step"
            )

    @property
    def measures_motion(self) -> bool:
        """Return whether motion is measured."""
        return self.min_motion is not None or self.max_motion is not None

    @property
    def looks_at_frames(self) -> bool:
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


class Screened(NamedTuple):
    """Shots of a file that are kept, (name, reason) of those that are dropped, and the facts of the file."""

    shots: tuple[Shot, ...]
    dropped: tuple[tuple[str, str], ...]
    facts: Facts


def screen(encoded: bytes, name: str, config: ScreeningConfig) -> Screened:
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
    if config.looks_at_frames:
        analyzer = _Watcher(encoded, config)
        facts, judged_shots = analyzer.facts, list(_judged_shots(name, analyzer, config))
    else:
        facts = probe(encoded)
        shot = _whole(name, facts)
        judged_shots = [(shot, _reason(shot, config))]
    return Screened(
        shots=tuple(shot for shot, reason in judged_shots if reason is None),
        dropped=tuple((shot.name, reason) for shot, reason in judged_shots if reason is not None),
        facts=facts,
    )


class _Watcher:
    """Frame times, cuts and samples of a file, collected in one pass over its frames."""

    def __init__(self, encoded: bytes, config: ScreeningConfig):
        self.times = array("d")
        """Time of every frame in seconds; a frame with a time before its predecessor's gets the predecessor's time."""
        self._pictures = Pictures(f"video of {len(encoded)} bytes")
        self._cuts = None if config.shots is None else Cuts(config.shots, config.shot_threshold)
        self._sampler = Sampler(self._pictures, letterbox=config.max_letterbox is not None)
        self.facts = probe(encoded, see=self._see)
        self._sampler.finish(self.time(self.facts.frames))
        self.samples: Sequence[Sample] = self._sampler.samples

    def _see(self, time: float, frame: av.VideoFrame) -> None:
        number = len(self.times)
        self.times.append(max(time, self.times[-1] if number else 0.0))
        thumbnail = None
        if self._cuts is not None:
            thumbnail = self._pictures.thumbnail(frame)
            self._cuts.see(thumbnail)
        self._sampler.see(number, self.times[number], frame, thumbnail)

    def time(self, number: int) -> float:
        """Return the time of a frame; for the number after the last frame, the end of the last frame."""
        return self.times[number] if number < self.facts.frames else self.times[-1] + 1 / self.facts.fps

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        return spans(() if self._cuts is None else self._cuts.numbers, self.facts.frames)


def _judged_shots(name: str, watcher: _Watcher, config: ScreeningConfig) -> Iterator[tuple[Shot, str | None]]:
    """Yield the shots, each with the reason why it is dropped, or None."""
    if len(watcher.spans) == 1:
        shot = _measured(_whole(name, watcher.facts), watcher.samples, config)
        yield shot, _reason(shot, config)
        return
    for number, span in enumerate(watcher.spans):
        shot = _part(f"{name}#{number}", watcher, span)
        shown_seconds = watcher.time(span.stop) - watcher.time(span.first)
        if (length := min(shown_seconds, shot.duration)) < config.min_shot - TOLERANCE:
            yield shot, f"shot of {length:.4g} s is below {config.min_shot:g} s"
            continue
        first = bisect.bisect_left(watcher.samples, span.first, key=lambda sample: sample.frame)
        stop = bisect.bisect_left(watcher.samples, span.stop, key=lambda sample: sample.frame)
        shot = _measured(shot, watcher.samples[first:stop], config)
        yield shot, _reason(shot, config)


def _whole(name: str, facts: Facts) -> Shot:
    return Shot(name=name, start=0.0, **dataclasses.asdict(facts))


def _part(name: str, watcher: _Watcher, span: Span) -> Shot:
    """Return the shot of a part of the file's frames."""
    facts, start, frames = watcher.facts, watcher.times[span.first], span.stop - span.first
    seconds = watcher.times[span.stop - 1] - start
    fps = average_rate(frames, seconds, facts.fps)
    return dataclasses.replace(_whole(name, facts), start=start, frames=frames, fps=fps, seconds=seconds)


def _measured(shot: Shot, taken: Sequence[Sample], config: ScreeningConfig) -> Shot:
    return dataclasses.replace(
        shot,
        motion=samples.motion(taken) if config.measures_motion else None,
        black=None if config.max_black is None else samples.black(taken),
        frozen=None if config.max_frozen is None else samples.frozen(taken),
        sharpness=None if config.min_sharpness is None else samples.sharpness(taken),
        letterbox=None if config.max_letterbox is None else samples.letterbox(taken, shot.height, shot.width),
        hash=None if config.duplicates is None else samples.hashes(taken),
    )


def _reason(shot: Shot, config: ScreeningConfig) -> str | None:
    """Return the first rule that excludes a shot, with its value and its limit; None if the shot is kept."""
    is_image = shot.frames == 1 and shot.codec in IMAGE_CODECS
    letterbox_area = None if shot.letterbox is None else shot.letterbox.share(shot.height, shot.width)
    rules: list[tuple[str, Number | None, str, Number | None, Number | None]] = [
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
