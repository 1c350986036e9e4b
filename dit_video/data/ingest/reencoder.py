"""Re-encoding of files on request: large originals are stored at the size and rate that training needs."""

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
from dit_video.core.grid import Grid
from dit_video.data.ingest.measures import Borders
from dit_video.data.ingest.quality_filter import Shot
from dit_video.video import TOLERANCE, VideoInfo, compute_average_fps, decode, probe
from dit_video.video.encode import MAX_CRF, encode_frames, encode_jpeg
from dit_video.video.reader import IMAGE_CODECS
from dit_video.video.transcode import transcode

FPS_TOLERANCE = 1.001
"""Factor above the requested rate from which a file is resampled; smaller excesses are rounding of the container."""
_VERSION = 1
"""Version of everything that the bytes depend on besides the options and PyAV."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReencodeConfig:
    """Limits above which files are re-encoded, and the quality; by default no file is re-encoded.

    A file within the limits keeps its bytes. Others become H.264 in mp4 without sound, upright, in square pixels, of
    even height and width, 4:2:0 in BT.709; images become JPEG if they were, else PNG. Times are kept unless `fps` is
    set. The screening measures the original; the facts in the data set are those of the stored file.

    Raises:
      UserError: a limit is out of range.
    """

    max_pixels: int | None = None
    """Maximum number of pixels of a frame, as shown (height × width); larger ones are shrunk at their aspect ratio."""
    fps: float | int | None = None
    """Maximum frames per second: files with a higher average rate are resampled to the frames shown at the times
    k / fps."""
    crf: int = 18
    """Quality of H.264, from 0 (best) to 51."""

    def __post_init__(self) -> None:
        if self.max_pixels is not None and self.max_pixels < 4:
            raise UserError(f"max_pixels={self.max_pixels} is invalid: use 4 or more, or omit it for no limit")
        if self.fps is not None and not 0 < self.fps < float("inf"):
            raise UserError(f"fps={self.fps} is invalid: use a positive number, or omit it for no limit")
        if not 0 <= self.crf <= MAX_CRF["mp4"]:
            raise UserError(f"crf={self.crf} is outside the range of H.264; use 0 (best) to {MAX_CRF['mp4']}")

    @property
    def is_enabled(self) -> bool:
        """Return whether any file may be re-encoded."""
        return self.max_pixels is not None or self.fps is not None


class StoredFile(NamedTuple):
    """A re-encoded file."""

    name: str
    """Name of the file in the folder of re-encoded files."""
    size: int
    """Size of the file in bytes."""
    sha256: str
    """SHA-256 of the file's bytes, in hexadecimal."""

    def is_in(self, folder: Path) -> bool:
        """Return whether the folder holds the complete file."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


class ReencodedFile(NamedTuple):
    """A re-encoded file and its shots."""

    stored: StoredFile
    """File that was written."""
    shots: tuple[Shot, ...]
    """Shots with the facts that they have in the new file."""
    dropped: tuple[tuple[str, str], ...]
    """Name and reason of each shot without a frame in the new file."""


def reencode(
    encoded: bytes, facts: VideoInfo, shots: Sequence[Shot], config: ReencodeConfig, folder: Path
) -> ReencodedFile | None:
    """Re-encode a file into a folder if it exceeds a limit; the same input gives the same bytes.

    Args:
      encoded: bytes of the file.
      facts: facts of the file.
      shots: shots of the file, at least one.
      config: limits and quality.
      folder: folder of the new file, whose name is a hash of the input and the limits; created if it does not exist.

    Returns:
      The new file; None if the file is within the limits.

    Raises:
      DecodeError: the file cannot be shrunk at its aspect ratio, or its frames change their size.
      UserError: the folder cannot be written.
    """
    is_image = facts.frames == 1 and facts.codec in IMAGE_CODECS
    pixels = [facts.height * facts.width, *(shot.height * shot.width for shot in shots)]
    is_large = config.max_pixels is not None and max(pixels) > config.max_pixels
    is_fast = config.fps is not None and facts.frames > 1 and facts.fps > config.fps * FPS_TOLERANCE
    if not is_large and not is_fast:
        return None
    height, width = _fit_size(facts.height, facts.width, config.max_pixels if is_large else None, 1 if is_image else 2)
    if is_image:
        suffix = "jpg" if facts.codec == "mjpeg" else "png"
        frames = decode(encoded, size=Grid(1, height, width)).frames
        content = encode_jpeg(frames[0]) if suffix == "jpg" else encode_frames(frames, 1.0, "png")
    else:
        suffix, rate = "mp4", config.fps if is_fast else None
        content = transcode(encoded, height=height, width=width, average_fps=facts.fps, fps=rate, crf=config.crf)
    times: list[float] = []
    new_facts = probe(content, on_frame=lambda time, _: times.append(time))
    kept, dropped = _map_shots(shots, facts, new_facts, times)
    identity = json.dumps([_VERSION, av.__version__, config_json.to_json(config), hashlib.sha256(encoded).hexdigest()])
    name = f"{hashlib.sha256(identity.encode()).hexdigest()}.{suffix}"
    try:
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)
    except OSError as error:
        fix = "free disk space or make it writable, and run the command again"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}); {fix}") from error
    return ReencodedFile(StoredFile(name, len(content), hashlib.sha256(content).hexdigest()), kept, dropped)


def _fit_size(height: int, width: int, max_pixels: int | None, step: int) -> tuple[int, int]:
    """Return the largest size of this aspect ratio with at most `max_pixels` pixels, in multiples of `step`."""
    short, long = sorted((height, width))
    scale = 1.0 if max_pixels is None else min(1.0, math.sqrt(max_pixels / (short * long)))
    short_side = int(short * scale) // step * step
    if short_side < step:
        raise DecodeError(f"frames of {height}x{width} cannot be shrunk to {max_pixels} pixels at their aspect ratio")
    long_side = min(round(long * short_side / short / step), long // step) * step
    while max_pixels is not None and short_side * long_side > max_pixels:
        long_side -= step
    return (short_side, long_side) if height <= width else (long_side, short_side)


def _map_shots(
    shots: Sequence[Shot], before: VideoInfo, after: VideoInfo, times: Sequence[float]
) -> tuple[tuple[Shot, ...], tuple[tuple[str, str], ...]]:
    """Return the shots with their facts in a new file, whose frames have these times, and the dropped shots."""
    kept: list[Shot] = []
    dropped: list[tuple[str, str]] = []
    for shot in shots:
        shot_times = list(times) if shot.frames == before.frames else _select_times(shot, times)
        if not shot_times:
            dropped.append((shot.name, f"shot of {shot.duration:.4g} s lies between two frames at {after.fps:g} fps"))
            continue
        frames, seconds = len(shot_times), shot_times[-1] - shot_times[0]
        fps = after.fps if frames == after.frames else compute_average_fps(frames, seconds, after.fps)
        letterbox = None if shot.letterbox is None else _scale_borders(shot.letterbox, before, after)
        facts = dataclasses.asdict(after) | {"frames": frames, "seconds": seconds, "fps": fps}
        facts["transfer"] = shot.transfer  # that of the original
        kept.append(dataclasses.replace(shot, **facts, start=shot_times[0], letterbox=letterbox))
    return tuple(kept), tuple(dropped)


def _select_times(shot: Shot, times: Sequence[float]) -> list[float]:
    """Return the times at which the shot is certainly shown; after its last frame the next shot may have begun."""
    first, last = shot.start - TOLERANCE, shot.start + shot.seconds + TOLERANCE
    return [time for time in times if first <= time <= last]


def _scale_borders(borders: Borders, before: VideoInfo, after: VideoInfo) -> Borders:
    rows, columns = after.height / before.height, after.width / before.width
    scales = (rows, rows, columns, columns)
    return Borders(*(round(width * scale) for width, scale in zip(borders, scales, strict=True)))
