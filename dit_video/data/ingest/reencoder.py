"""Re-encoding of clips on request: large originals are stored at the size and rate that training needs."""

import dataclasses
import math

from dit_video.core.errors import DecodeError, UserError
from dit_video.core.grid import Grid
from dit_video.data.ingest.screening import Borders, Shot
from dit_video.video import VideoInfo, decode
from dit_video.video.encode import MAX_CRF, encode_frames, encode_jpeg

FPS_TOLERANCE = 1.001
"""Factor above the requested rate from which a file is resampled; smaller excesses are rounding of the container."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReencodeConfig:
    """Limits above which clips are re-encoded, and the quality; by default no clip is re-encoded.

    A clip within the limits keeps its pictures. Others become H.264 in mp4, upright, in square pixels, of even height
    and width, 4:2:0 in BT.709, with their sound; images become JPEG if they were, else PNG. Times are kept unless `fps`
    is set. The screening measures the original; the facts in the data set describe the stored clip.

    Raises:
      UserError: If a limit is out of range.
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

    def is_exceeded(self, facts: VideoInfo, shot: Shot) -> bool:
        """Return whether a clip of a file is above a limit."""
        is_large = self.max_pixels is not None and shot.height * shot.width > self.max_pixels
        return is_large or self.get_rate(facts) is not None

    def get_rate(self, facts: VideoInfo) -> float | None:
        """Return the frame rate to which a file is resampled; None if it is not above the limit."""
        is_fast = self.fps is not None and facts.frames > 1 and facts.fps > self.fps * FPS_TOLERANCE
        return None if self.fps is None or not is_fast else float(self.fps)

    def fit_size(self, height: int, width: int, step: int) -> tuple[int, int]:
        """Return the largest height and width of this aspect ratio within the limit, in multiples of `step`.

        Raises:
          DecodeError: If there is no such stream.
        """
        short, long = sorted((height, width))
        max_pixels = max(short * long, 4) if self.max_pixels is None else self.max_pixels
        scale = min(1.0, math.sqrt(max_pixels / (short * long)))
        short_side = int(short * scale) // step * step
        if short_side < step:
            raise DecodeError(
                f"frames of {height}x{width} cannot be shrunk to {max_pixels} pixels at their aspect ratio"
            )
        long_side = min(round(long * short_side / short / step), long // step) * step
        while short_side * long_side > max_pixels:
            long_side -= step
        return (short_side, long_side) if height <= width else (long_side, short_side)


def reencode_image(encoded: bytes, facts: VideoInfo, config: ReencodeConfig) -> bytes:
    """Return an image at the largest size within the limit: JPEG if it was, else PNG.

    Raises:
      DecodeError: If the image cannot be shrunk at its aspect ratio.
    """
    frames = decode(encoded, size=Grid(1, *config.fit_size(facts.height, facts.width, 1))).frames
    return encode_jpeg(frames[0]) if facts.codec == "mjpeg" else encode_frames(frames, 1.0, "png")


def update_facts(shot: Shot, facts: VideoInfo) -> Shot:
    """Return a shot as it is in a file of its own with these facts; its measures are the original's."""
    bars, rows, columns = shot.letterbox, facts.height / shot.height, facts.width / shot.width
    if bars is not None:
        scales = (rows, rows, columns, columns)
        bars = Borders(*(round(bar * scale) for bar, scale in zip(bars, scales, strict=True)))
    fields = dataclasses.asdict(facts) | {"transfer": shot.transfer}
    return dataclasses.replace(shot, **fields, start=0.0, letterbox=bars)
