"""A clip: RGB frames, their rate and a caption."""

import base64
import html
import numbers
import operator
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, overload

import numpy as np
from jaxtyping import UInt8
from numpy.typing import DTypeLike

from dit_video.core.errors import UserError
from dit_video.core.files import atomic_path
from dit_video.video.comments import format_comment
from dit_video.video.encode import FORMATS, Format, encode_frames

MIN_DISPLAY_HEIGHT = 192
"""Pixels: a clip of less height is displayed enlarged by a whole number."""
_MAX_SHOWN_CAPTION = 60
"""Characters of a caption that `repr` shows."""


@dataclass(frozen=True, eq=False)
class Clip:
    """A video clip: frames in sRGB, 0..255, `[T H W 3]`; an image is a clip of one frame.

    A clip is a sequence of its frames: `len(clip)`, `clip[0]`, `for frame in clip` and `np.asarray(clip)` are those of
    `clip.frames`, and a slice is a clip. Clips are equal if their frames, rates and captions are. They have no hash, as
    frames can be written to.

    Raises:
      UserError: If `frames` is empty or not uint8 `[T H W 3]`, or `fps` is not positive.
    """

    frames: UInt8[np.ndarray, "T H W 3"]
    """Frames `[T H W 3]`, uint8 in sRGB."""
    fps: float | int
    """Frames per second, stored as a float; 1 for an image that was read from a file."""
    caption: str = ""
    """Text that describes the clip, which its files hold; of a sampled clip its prompt."""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    """Prompt, seed, size, steps, task and other JSON values that a sampled clip was made with; `read_recipe` of
    `dit_video.video` reads them from its file."""

    def __post_init__(self):
        frames, fps = self.frames, cast(Any, self.fps)
        if not hasattr(frames, "dtype"):
            kind = type(frames).__name__
            raise UserError(f"frames of a {kind} are invalid: they must be an array [T H W 3]. Use np.stack(frames)")
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
            raise UserError(
                f"frames {frames.dtype} {list(frames.shape)} are invalid: must be uint8 [T H W 3] with at least one "
                "pixel. Use np.rint(255 * frames).astype(np.uint8) for floats from 0 to 1"
            )
        if not isinstance(fps, numbers.Real) or not 0 < float(fps) < float("inf"):
            raise UserError(f"fps={fps!r} is invalid: use a positive number")
        object.__setattr__(self, "fps", float(fps))

    def __repr__(self) -> str:
        caption = textwrap.shorten(self.caption, _MAX_SHOWN_CAPTION, placeholder=" …")
        return f"Clip({len(self)}x{self.height}x{self.width}, {self.fps:g} fps, {caption!r})"

    def __len__(self) -> int:
        return len(self.frames)

    def __iter__(self) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
        return iter(self.frames)

    @overload
    def __getitem__(self, index: int) -> UInt8[np.ndarray, "H W 3"]: ...

    @overload
    def __getitem__(self, index: slice) -> "Clip": ...

    def __getitem__(self, index: int | slice) -> "UInt8[np.ndarray, 'H W 3'] | Clip":
        """Return a frame; or a clip of some frames, which has the caption, but not the recipe, of the whole.

        Every second frame has half the rate. Pixels are not copied.

        Raises:
          IndexError: If there is no such frame.
          UserError: If a slice has no frame.
        """
        if not isinstance(index, slice):
            return self.frames[operator.index(index)]
        frames = self.frames[index]
        if not len(frames):
            start, stop = index.start, index.stop
            raise UserError(f"[{start}:{stop}] is invalid: it has none of the {len(self)} frames. Use others.")
        return Clip(frames, fps=self.fps / abs(index.step or 1), caption=self.caption)

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.frames, dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Clip):
            return NotImplemented
        mine, theirs = (self.fps, self.caption), (other.fps, other.caption)
        return mine == theirs and np.array_equal(self.frames, other.frames)

    __hash__ = None  # type: ignore[assignment]

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
        return len(self) / self.fps

    def save(self, path: str | Path, *, crf: int | None = None, lossless: bool = False) -> None:
        """Write the clip to a file, atomically; the suffix chooses the format.

        Args:
          path: File to write, such as `clip.mp4`; its folder is created if necessary. `encode` describes the formats:
            mp4, mov, webm, gif, webp and apng, and for one frame png and jpg.
          crf: Quality of mp4, mov and webm, 0 (best) to 51; None uses the default of `dit_video.video.encode`.
          lossless: Whether webp keeps every pixel, in a larger file. apng and png always do.

        Raises:
          UserError: If the suffix is unknown, or the format does not support the frames or an option.
        """
        path = Path(path)
        suffix = path.suffix.lower().removeprefix(".")
        if suffix not in FORMATS:
            raise UserError(f"{path} has an unknown suffix; use one of .{', .'.join(FORMATS)}")
        content = encode(self, cast(Format, suffix), crf=crf, lossless=lossless)
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)

    def _repr_html_(self) -> str:
        """Return HTML with the looping clip, enlarged without smoothing to at least 192 pixels of height."""
        scale = max(1, -(-MIN_DISPLAY_HEIGHT // self.height))
        style = f"width:{self.width * scale}px;height:{self.height * scale}px;image-rendering:pixelated"
        title = html.escape(self.caption, quote=True)
        if len(self) == 1:
            url = _make_data_url(encode_frames(self.frames, self.fps, "png"), "image/png")
            return f'<img src="{url}" alt="{title}" title="{title}" style="{style}">'
        format = "webm" if self.height % 2 or self.width % 2 else "mp4"
        url = _make_data_url(encode_frames(self.frames, self.fps, format), f"video/{format}")
        return f'<video src="{url}" title="{title}" style="{style}" autoplay loop muted playsinline controls></video>'


def _make_data_url(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def encode(clip: Clip, format: Format, *, crf: int | None = None, lossless: bool = False) -> bytes:
    """Return the bytes of a file.

    mp4 and mov are H.264 and webm is VP9, all 4:2:0 in BT.709, limited range, which every browser plays; gif has one
    palette of 256 colours and shows frames for whole hundredths of a second, webp for whole thousandths; apng is
    lossless. png, which is lossless, and jpg, without visible loss, are for one frame.

    Args:
      clip: Clip to encode.
      format: Format of the file.
      crf: Quality of mp4, mov and webm, 0 (best) to 51 (mp4, mov) or 63 (webm).
      lossless: Whether webp keeps every pixel; by default it is 4:2:0, without visible loss.

    Raises:
      UserError: If the format does not support an option or the frames: an odd height or width as mp4, several frames
        as png.
    """
    comment = format_comment(clip.recipe, clip.caption)
    return encode_frames(clip.frames, clip.fps, format, crf=crf, lossless=lossless, comment=comment)
