"""Files stored anew, smaller, on request: huge originals at the size and rate that a training will have of them."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import av

from dit_video.core import config_json
from dit_video.core.errors import DecodeError, UserError
from dit_video.core.files import atomic_path
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.quality_filter import Shot
from dit_video.tokens import Grid
from dit_video.video import TOLERANCE, Facts, average_rate, decode, probe
from dit_video.video.encode import WORST_CRF, encode_frames, encode_jpeg
from dit_video.video.reader import IMAGE_CODECS
from dit_video.video.transcode import transcode

FASTER = 1.001
"""Times the asked rate: what is faster is sampled, what containers round is not."""
_VERSION = 1
"""Of what the bytes depend on, beside the options and PyAV."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reencode:
    """Which files are stored anew, and how; by default none.

    A file within the limits keeps its bytes. Others become H.264 in mp4 without sound, upright, in square pixels, of
    even height and width, 4:2:0 in BT.709; images become JPEG where they were, else PNG. Times stay as they are, where
    no rate is asked for. The screening looks at the original; the facts of the data set are of what is stored.

    Raises:
      UserError: a limit out of its range.
    """

    max_pixels: int | None = None
    """of a picture, as shown (height × width): larger ones are shrunk, at their aspect ratio"""
    fps: float | int | None = None
    """frames a second: files that have more on average are sampled at this rate, of every time k / fps the frame that
    is shown then"""
    crf: int = 18
    """quality of H.264: 0 (best) to 51"""

    def __post_init__(self) -> None:
        if self.max_pixels is not None and self.max_pixels < 4:
            raise UserError(f"max_pixels={self.max_pixels} is a number of pixels from 4 on; leave it out for no limit")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"fps={self.fps} is a positive number of frames a second; leave it out for no limit")
        if not 0 <= self.crf <= WORST_CRF["mp4"]:
            raise UserError(
                f"crf={self.crf} is outside the range of H.264; use 0 to {WORST_CRF['mp4']}, less being better"
            )

    @property
    def asked(self) -> bool:
        """Whether any file may be stored anew."""
        return self.max_pixels is not None or self.fps is not None


class Stored(NamedTuple):
    """A file that was written anew."""

    name: str
    """in the folder of such files"""
    size: int
    """bytes"""
    sha256: str

    def lies_in(self, folder: Path) -> bool:
        """Whether the folder holds it, whole."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


class Reencoded(NamedTuple):
    """What became of a file."""

    stored: Stored
    shots: tuple[Shot, ...]
    """its shots as they are in the new file"""
    dropped: tuple[tuple[str, str], ...]
    """(name, reason) of shots that have no frame there"""


def reencode(encoded: bytes, facts: Facts, shots: Sequence[Shot], how: Reencode, folder: Path) -> Reencoded | None:
    """Write a file anew into a folder, if it is over a limit; the same input gives the same bytes.

    Args:
      encoded: the file's bytes.
      facts: of it.
      shots: of it; at least one.
      how: the limits.
      folder: where it is written, by a name that the file and the limits make; made where it isn't there.

    Raises:
      DecodeError: it cannot be shrunk at its aspect ratio.
      UserError: the folder cannot be written.
    """
    image = facts.frames == 1 and facts.codec in IMAGE_CODECS
    large = how.max_pixels is not None and facts.height * facts.width > how.max_pixels
    fast = how.fps is not None and facts.frames > 1 and facts.fps > how.fps * FASTER
    if not large and not fast:
        return None
    height, width = _fitted(facts.height, facts.width, how.max_pixels if large else None, 1 if image else 2)
    if image:
        suffix = "jpg" if facts.codec == "mjpeg" else "png"
        frames = decode(encoded, size=Grid(1, height, width)).frames
        content = encode_jpeg(frames[0]) if suffix == "jpg" else encode_frames(frames, 1.0, "png")
    else:
        suffix, rate = "mp4", how.fps if fast else None
        content = transcode(encoded, height=height, width=width, average=facts.fps, fps=rate, crf=how.crf)
    times: list[float] = []
    found = probe(content, see=lambda time, _: times.append(time))
    kept, dropped = _moved(shots, facts, found, times)
    known = json.dumps([_VERSION, av.__version__, config_json.to_json(how), hashlib.sha256(encoded).hexdigest()])
    name = f"{hashlib.sha256(known.encode()).hexdigest()}.{suffix}"
    try:
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror or error}); make room, or make it writable, and start the "
            "command again"
        ) from error
    return Reencoded(Stored(name, len(content), hashlib.sha256(content).hexdigest()), kept, dropped)


def _fitted(height: int, width: int, most: int | None, step: int) -> tuple[int, int]:
    """The largest height and width of this aspect ratio with at most so many pixels, both multiples of `step`."""
    short, long = sorted((height, width))
    scale = 1.0 if most is None else min(1.0, math.sqrt(most / (short * long)))
    less = int(short * scale) // step * step
    if less < step:
        raise DecodeError(f"pictures of {height}x{width} cannot be shrunk to {most} pixels at their aspect ratio")
    more = min(round(long * less / short / step), long // step) * step
    while most is not None and less * more > most:
        more -= step
    return (less, more) if height <= width else (more, less)


def _moved(
    shots: Sequence[Shot], before: Facts, after: Facts, times: Sequence[float]
) -> tuple[tuple[Shot, ...], tuple[tuple[str, str], ...]]:
    """The shots as they are in a new file, whose frames have these times."""
    kept: list[Shot] = []
    dropped: list[tuple[str, str]] = []
    for shot in shots:
        here = list(times) if shot.frames == before.frames else _within(shot, times)
        if not here:
            dropped.append((shot.name, f"shot of {shot.duration:.4g} s lies between two frames at {after.fps:g} fps"))
            continue
        seconds = here[-1] - here[0]
        kept.append(
            dataclasses.replace(
                shot,
                start=here[0],
                frames=len(here),
                seconds=seconds,
                fps=after.fps if len(here) == after.frames else average_rate(len(here), seconds, after.fps),
                height=after.height,
                width=after.width,
                codec=after.codec,
                letterbox=None if shot.letterbox is None else _scaled(shot.letterbox, before, after),
            )
        )
    return tuple(kept), tuple(dropped)


def _within(shot: Shot, times: Sequence[float]) -> list[float]:
    """The times at which the shot is shown for sure: after its last frame the next shot may have begun."""
    first, last = shot.start - TOLERANCE, shot.start + shot.seconds + TOLERANCE
    return [time for time in times if first <= time <= last]


def _scaled(bars: Borders, before: Facts, after: Facts) -> Borders:
    rows, columns = after.height / before.height, after.width / before.width
    return Borders(
        round(bars.top * rows), round(bars.bottom * rows), round(bars.left * columns), round(bars.right * columns)
    )
