"""A clip: RGB frames, their rate and a caption."""

import base64
import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.video.comments import format_recipe
from dit_video.video.encode import FORMATS, Format, encode_frames

MIN_DISPLAY_HEIGHT = 192
"""Pixels: a clip of less height is displayed enlarged by a whole number."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A video clip: frames in sRGB, 0..255, `[T H W 3]`; an image is a clip of one frame.

    Raises:
      UserError: If `frames` is empty or not uint8 `[T H W 3]`, or `fps` is not positive.
    """

    frames: UInt8[np.ndarray, "T H W 3"]
    """Frames `[T H W 3]`, uint8 in sRGB."""
    fps: float | int
    """Frames per second, stored as a float; 1 for an image that was read from a file."""
    caption: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Prompt, seed, size, steps, task and other JSON values that a sampled clip was made with; `read_recipe` of
    `dit_video.video` reads them from its file."""

    def __post_init__(self):
        frames = self.frames
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise UserError(
                f"frames {frames.dtype} {list(frames.shape)} are invalid: must be uint8 [T H W 3] with at least one "
                "pixel. Use dit_video.core.pixels.to_uint8"
            )
        if not 0 < self.fps < float("inf"):
            raise UserError(f"fps={self.fps} is invalid: use a positive number")
        object.__setattr__(self, "fps", float(self.fps))

    @property
    def height(self) -> int:
        """Return the height in pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """Return the width in pixels."""
        return self.frames.shape[2]

    @property
    def duration(self) -> float:
        """Return the duration in seconds."""
        return len(self.frames) / self.fps

    def save(self, path: str | Path, *, crf: int | None = None) -> None:
        """Write the clip to a file, atomically; the suffix chooses the format (mp4, webm, gif, png, apng).

        Args:
          path: File to write; its folder is created if necessary.
          crf: Quality of mp4 and webm, 0 (best) to 51; None uses the default of `dit_video.video.encode`.

        Raises:
          UserError: If the suffix is unknown, or the format does not support the frames.
        """
        path = Path(path)
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in FORMATS:
            raise UserError(f"{path} has an unknown suffix; use one of .{', .'.join(FORMATS)}")
        comment = format_recipe(self.recipe) if self.recipe else ""
        content = encode_frames(self.frames, self.fps, suffix, crf=crf, comment=comment)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def _repr_html_(self) -> str:
        """Return HTML with the looping clip, enlarged without smoothing to at least 192 pixels of height."""
        scale = max(1, -(-MIN_DISPLAY_HEIGHT // self.height))
        style = f"width:{self.width * scale}px;height:{self.height * scale}px;image-rendering:pixelated"
        title = html.escape(self.caption, quote=True)
        if len(self.frames) == 1:
            url = _make_data_url(encode_frames(self.frames, self.fps, "png"), "image/png")
            return f'<img src="{url}" alt="{title}" title="{title}" style="{style}">'
        format = "webm" if self.height % 2 or self.width % 2 else "mp4"
        url = _make_data_url(encode_frames(self.frames, self.fps, format), f"video/{format}")
        return f'<video src="{url}" title="{title}" style="{style}" autoplay loop muted playsinline controls></video>'


def _make_data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encode(clip: Clip, format: Format, *, crf: int | None = None) -> bytes:
    """Return the bytes of a file.

    mp4 is H.264 and webm is VP9, both 4:2:0 in BT.709, limited range, which every browser plays; gif has one palette of
    256 colours and shows frames for whole hundredths of a second; png (one frame) and apng are lossless.

    Args:
      clip: Clip to encode.
      format: Format of the file.
      crf: Quality of mp4 and webm, 0 (best) to 51 (mp4) or 63 (webm).

    Raises:
      UserError: If the format does not support the frames: an odd height or width as mp4, several frames as png.
    """
    comment = format_recipe(clip.recipe) if clip.recipe else ""
    return encode_frames(clip.frames, clip.fps, format, crf=crf, comment=comment)
