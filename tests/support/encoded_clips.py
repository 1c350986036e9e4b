"""A smooth clip, and digests of it in every format."""

import hashlib

import numpy as np

from dit_video.video import Clip, encode


def make_pattern(frames: int = 5, height: int = 32, width: int = 48) -> Clip:
    """Return a clip smooth enough for 4:2:0 that differs in every frame."""
    t, y, x = np.meshgrid(np.arange(frames), np.arange(height), np.arange(width), indexing="ij")
    values = np.stack([128 + 100 * np.sin(y / 6 + t), 4 * x + 10 * t, 200 - 3 * y + 5 * t], axis=-1)
    return Clip(np.clip(values, 0, 255).astype(np.uint8), fps=8)


def compute_digests() -> list[str]:
    """Return digests of the encoded clip."""
    return [hashlib.sha256(encode(make_pattern(), format)).hexdigest() for format in ("mp4", "webm", "gif", "apng")]
