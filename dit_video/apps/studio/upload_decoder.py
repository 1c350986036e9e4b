"""Decoding of an uploaded file in a process of its own, which a damaged or hostile file may crash or fill.

    python -m dit_video.apps.studio.upload_decoder FILE OUT KIND FIT

writes the frames as a NumPy file and prints a JSON object: the clip's properties, or `{"error": ...}`.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dit_video.apps.studio.uploads import ClipFit, limit_side
from dit_video.core.errors import UserError
from dit_video.core.resize import compute_covering_size, resize_and_crop
from dit_video.video.comments import read_caption
from dit_video.video.decode import deinterlace, sample_frames
from dit_video.video.reader import Video
from dit_video.video.to_rgb import RgbConverter, compute_display_size

MAX_MEMORY = 6 << 30
"""Bytes of address space that the process may take."""
MAX_PIXELS = 1 << 26
"""Maximum pixels of a frame: 8192×8192."""

_SIGNATURES: tuple[tuple[int, bytes], ...] = (
    *((4, name) for name in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),  # mp4, mov, avif
    (0, b"\x1a\x45\xdf\xa3"),  # webm, mkv
    *((8, name) for name in (b"AVI ", b"WEBP")),
    *((0, name) for name in (b"GIF8", b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")),
    *((0, name) for name in (b"OggS", b"FLV", b"\0\0\1\xba", b"\0\0\1\xb3")),
)
"""Positions and bytes with which files of videos and images begin. ffmpeg draws texts, too, and playlists would have it
open other files."""


def main() -> None:
    """Decode the file of the command line."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    path, out, kind, fit = sys.argv[1:]
    try:
        answer = decode_upload(Path(path), Path(out), kind, ClipFit.from_json(json.loads(fit)))
    except UserError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": "the file takes too much memory to be decoded. Use a smaller one."}
    print(json.dumps(answer))


def decode_upload(path: Path, out: Path, kind: str, fit: ClipFit) -> dict[str, Any]:
    """Decode a file, write the frames that are used of it, and return its properties.

    Args:
      path: The uploaded file.
      out: NumPy file that is written.
      kind: `clip`, or `image` for the first frame alone.
      fit: What the model can sample.

    Raises:
      UserError: If the file cannot be read, or its frames are too large.
    """
    _check_signature(path)
    _check_picture_size(path)
    with Video(path) as video:
        first = next(video.read_frames(), None)
        if first is None:
            raise UserError("the file has no complete frame. Use another one.")
        height, width = compute_display_size(first.frame, video.sample_aspect, video.name)
        _check_pixels(height, width)
        native_fps = video.get_rate(2)
    plane = limit_side(height, width) if kind == "image" else fit.choose_plane(height, width)
    covering = compute_covering_size(height, width, *plane)
    limit, fps = (1, None) if kind == "image" else (fit.max_frames, fit.fps)
    with Video(path) as video:
        convert = RgbConverter(video.name, video.sample_aspect, covering, profile=video.profile)
        timed = sample_frames(deinterlace(video.read_frames(), video.name), 0.0, fps, limit)
        frames, caption = np.stack([convert(each.frame, each.time) for each in timed]), read_caption(video)
    is_image = len(frames) == 1
    frames = resize_and_crop(frames[: fit.round_length(len(frames))], *plane)
    np.save(out, frames)
    fps = None if is_image else native_fps
    return {"height": height, "width": width, "fps": fps, "frames": len(frames), "caption": caption}


def _check_signature(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(16)
    if not any(start[position:].startswith(signature) for position, signature in _SIGNATURES):
        kinds = "mp4, mov, webm, mkv, avi, gif, png, jpeg or webp"
        raise UserError(f"{path} is not a readable video or image. Use {kinds}.")


def _check_picture_size(path: Path) -> None:
    """Check the size in the header of an image: ffmpeg would allocate its pixels before it says it."""
    Image.MAX_IMAGE_PIXELS = None  # only headers are read here
    try:
        with Image.open(path) as image:
            width, height = image.size
    except (OSError, ValueError, SyntaxError, OverflowError):
        return  # a video, or a mistake about which the decoder says more
    _check_pixels(height, width)


def _check_pixels(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise UserError(f"frames of {width}×{height} are too large: use at most {MAX_PIXELS >> 20} megapixels.")


if __name__ == "__main__":
    main()
