"""A smooth clip, and digests of it in every format; a file whose frames change their size."""

import hashlib
import io
from fractions import Fraction

import av
import numpy as np

from dit_video.video import Clip, encode
from dit_video.video.encode import Format


def make_pattern(frames: int = 5, height: int = 32, width: int = 48) -> Clip:
    """Return a clip smooth enough for 4:2:0 that differs in every frame."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    values = np.stack([128 + 100 * np.sin(y / 6 + t), 4 * x + 10 * t, 200 - 3 * y + 5 * t], axis=-1)
    return Clip(np.clip(values, 0, 255).astype(np.uint8), fps=8)


def encode_resized(frames: int = 8, *, fps: int = 8) -> bytes:
    """Return a file that shows a white square of 48x48, in so many frames of 96x160, then in as many of 160x96."""
    parts = []
    for number, (height, width) in enumerate(((96, 160), (160, 96))):
        picture = np.zeros((height, width, 3), np.uint8)
        picture[height // 2 - 24 : height // 2 + 24, width // 2 - 24 : width // 2 + 24] = 255
        buffer = io.BytesIO()
        with av.open(buffer, "w", format="mpegts") as output:  # whose files are joined by appending one to the other
            stream = output.add_stream("libx264", rate=fps, options={"crf": "5", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
            stream.codec_context.time_base = Fraction(1, fps)
            for index in range(frames):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = number * frames + index, Fraction(1, fps)
                output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        parts.append(buffer.getvalue())
    return b"".join(parts)


def compute_digests() -> list[str]:
    """Return digests of the encoded clip."""
    formats: tuple[Format, ...] = ("mp4", "mov", "webm", "gif", "webp", "apng")
    return [hashlib.sha256(encode(make_pattern(), format)).hexdigest() for format in formats]
