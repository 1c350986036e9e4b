"""The optional steps of ingest: split a file into shots, measure them, drop what a limit excludes and say why."""

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
"""Seconds: what is this long is shown at one of the times at which measures are taken."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScreeningConfig:
    """Which steps are taken, and their limits; None is a step not taken. A value at a limit is kept.

    A limit that nothing exceeds (`min_motion=0`, `max_letterbox=1`) measures without dropping. Images, which have no
    length, are exempt from the limits on duration, motion and frozen time. How values are measured is said in
    `dit_video.data.ingest.samples` and `measures`.

    Raises:
      UserError: a limit out of its range, or above its opposite.
    """

    shots: Detector | None = None
    """Split files where a shot begins, by PySceneDetect's detector of this name (needs the extra `ingest`)."""
    shot_threshold: Number | None = None
    """of that detector; by default PySceneDetect's: 27 levels of 255 for "content", a ratio of 3 for "adaptive"."""
    min_shot: Number = 0.5
    """seconds: shorter shots are dropped, fades and flashes among them; 0.2 at least"""
    min_seconds: Number | None = None
    """a clip's duration: the time of the last frame after the first, and one frame more at the clip's rate; to the
    millisecond, as containers round"""
    max_seconds: Number | None = None
    min_size: int | None = None
    """pixels of the shorter side, as shown"""
    max_size: int | None = None
    min_motion: Number | None = None
    """levels of 255 by which luma changes in a second, on average: 14 to 36 where one person signs, 60 to 105 where the
    camera moves"""
    max_motion: Number | None = None
    max_black: Number | None = None
    """share of time, 0 to 1, in which the picture is black"""
    max_frozen: Number | None = None
    """share of time, 0 to 1, in which the picture stands still for a second or longer, or throughout"""
    max_letterbox: Number | None = None
    """share of the area, 0 to 1, that black bars cover; nothing is cropped: a shot's `letterbox` says where"""
    min_sharpness: Number | None = None
    """variance of the Laplacian (levels²) of luma at 256 pixels of the longer side: 60 to 800 in 21 sharp clips, 4 to
    40 in copies of eight that had been shrunk to 96×64 pixels"""
    duplicates: int | None = None
    """bits of 64, 0 to 64, in which the hashes of near-duplicates differ at most. `screen` gives the hashes,
    `drop_duplicates` compares them. 4 is a start: re-encoded, shrunk and brightened copies of eight clips differed by 0
    to 6, by 2 mostly, and so did two takes of one person before the same wall."""

    def __post_init__(self):
        for name in ("max_black", "max_frozen", "max_letterbox"):
            self._check(name, 0, 1, "a share")
        for name in ("min_seconds", "max_seconds", "min_size", "max_size", "min_motion", "max_motion", "min_sharpness"):
            self._check(name, 0, float("inf"), "a number")
        self._check("duplicates", 0, 64, "a number of bits")
        self._check("min_shot", SHORTEST_SHOT, float("inf"), "a number of seconds")
        self._check("shot_threshold", 0, float("inf"), "a number")
        if self.shot_threshold is not None and self.shots is None:
            raise UserError(f"shot_threshold={self.shot_threshold} is of a shot detector; set shots to one")
        for name in ("seconds", "size", "motion"):
            least, most = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if least is not None and most is not None and least > most:
                raise UserError(f"min_{name}={least} is above max_{name}={most}, which leaves nothing; lower it")

    def _check(self, name: str, least: Number, most: Number, kind: str) -> None:
        value = getattr(self, name)
        if value is not None and not least <= value <= most:
            raise UserError(f"{name}={value} is {kind} from {least:g} to {most:g}; use None to leave the step out")

    @property
    def measures_motion(self) -> bool:
        return self.min_motion is not None or self.max_motion is not None

    @property
    def looks_at_frames(self) -> bool:
        """Whether a file's facts are not enough."""
        others = (self.shots, self.max_black, self.max_frozen, self.max_letterbox, self.min_sharpness, self.duplicates)
        return self.measures_motion or any(value is not None for value in others)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shot:
    """A file, or a part of it without a cut. What was not asked for is None."""

    name: str
    """The file's, followed by `#0`, `#1`, … where it has several shots."""
    start: float
    """seconds after the file's first frame"""
    frames: int
    fps: float
    """on average"""
    seconds: float
    """of the last frame after the first"""
    height: int
    """as shown"""
    width: int
    codec: str
    motion: float | None = None
    """levels of 255 a second"""
    black: float | None = None
    """share of time"""
    frozen: float | None = None
    """share of time"""
    sharpness: float | None = None
    """levels²"""
    letterbox: Borders | None = None
    """pixels, as shown"""
    hash: tuple[int, ...] | None = None
    """Four of 64 bits, for `drop_duplicates`; None also where no picture has texture."""

    @property
    def duration(self) -> float:
        """Seconds, with the time that the last frame is shown."""
        return self.seconds + 1 / self.fps


class Screened(NamedTuple):
    """What became of a file: its shots that are kept, (name, reason) of those that are not, and the facts of it all."""

    shots: tuple[Shot, ...]
    dropped: tuple[tuple[str, str], ...]
    facts: Facts


def screen(encoded: bytes, name: str, config: ScreeningConfig) -> Screened:
    """Take the steps of `config` with one file, decoding it once. Every shot of it is either kept or dropped.

    Memory doesn't grow with the file's length but for its timestamps and eight rows of numbers a second.

    Args:
      encoded: the file's bytes.
      name: what its clips are called.
      config: the steps.

    Raises:
      DecodeError: not a readable video or image, or damaged.
      UserError: shots are asked for, and PySceneDetect isn't installed.
    """
    if config.looks_at_frames:
        watcher = _Watcher(encoded, config)
        facts, judged = watcher.facts, list(_judged_shots(name, watcher, config))
    else:
        facts = probe(encoded)
        whole = _whole(name, facts)
        judged = [(whole, _reason(whole, config))]
    return Screened(
        shots=tuple(shot for shot, reason in judged if reason is None),
        dropped=tuple((shot.name, reason) for shot, reason in judged if reason is not None),
        facts=facts,
    )


class _Watcher:
    """All that is learnt of a file while its frames pass by."""

    def __init__(self, encoded: bytes, config: ScreeningConfig):
        self.times = array("d")
        """Of every frame; a frame that claims to be before its predecessor is taken to be shown with it."""
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
        """When a frame is shown; the one after the last where the last is shown for a frame's time."""
        return self.times[number] if number < self.facts.frames else self.times[-1] + 1 / self.facts.fps

    @functools.cached_property
    def spans(self) -> tuple[Span, ...]:
        return spans(() if self._cuts is None else self._cuts.numbers, self.facts.frames)


def _judged_shots(name: str, watcher: _Watcher, config: ScreeningConfig) -> Iterator[tuple[Shot, str | None]]:
    """Each with the reason why it is dropped, if it is."""
    if len(watcher.spans) == 1:
        whole = _measured(_whole(name, watcher.facts), watcher.samples, config)
        yield whole, _reason(whole, config)
        return
    for number, span in enumerate(watcher.spans):
        shot = _part(f"{name}#{number}", watcher, span)
        shown = watcher.time(span.stop) - watcher.time(span.first)
        if (length := min(shown, shot.duration)) < config.min_shot - TOLERANCE:
            yield shot, f"shot of {length:.4g} s is below {config.min_shot:g} s"
            continue
        first = bisect.bisect_left(watcher.samples, span.first, key=lambda sample: sample.frame)
        stop = bisect.bisect_left(watcher.samples, span.stop, key=lambda sample: sample.frame)
        shot = _measured(shot, watcher.samples[first:stop], config)
        yield shot, _reason(shot, config)


def _whole(name: str, facts: Facts) -> Shot:
    return Shot(name=name, start=0.0, **dataclasses.asdict(facts))


def _part(name: str, watcher: _Watcher, span: Span) -> Shot:
    """Some of a file's frames."""
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
    """The first rule that excludes a shot, with its value and its limit; None where it is kept."""
    still = shot.frames == 1 and shot.codec in IMAGE_CODECS
    area = None if shot.letterbox is None else shot.letterbox.share(shot.height, shot.width)
    rules: list[tuple[str, Number | None, str, Number | None, Number | None]] = [
        ("size", min(shot.height, shot.width), "px", config.min_size, config.max_size),
        ("duration", None if still else shot.duration, "s", config.min_seconds, config.max_seconds),
        ("black", shot.black, "of the time", None, config.max_black),
        ("frozen", None if still else shot.frozen, "of the time", None, config.max_frozen),
        ("motion", None if still else shot.motion, "levels/s", config.min_motion, config.max_motion),
        ("letterbox", area, "of the picture", None, config.max_letterbox),
        ("sharpness", shot.sharpness, "levels²", config.min_sharpness, None),
    ]
    for rule, value, unit, least, most in rules:
        slack = TOLERANCE if unit == "s" else 0
        if value is not None and least is not None and value < least - slack:
            return f"{rule} {value:.4g} {unit} is below {least:g}"
        if value is not None and most is not None and value > most + slack:
            return f"{rule} {value:.4g} {unit} is above {most:g}"
    return None
