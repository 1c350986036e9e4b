"""Conditioning frames: the pixels for an autoencoder, and the mask on the grid of its latents."""

import numpy as np
from jaxtyping import Bool, Float32, UInt8

GREY = 127.5
"""Value in 0..255 of unknown pixels, zero in the models' [-1, 1]."""


def fill_unknown_frames(
    frames: dict[int, UInt8[np.ndarray, "H W 3"]], length: int
) -> tuple[Float32[np.ndarray, "T H W 3"], Bool[np.ndarray, " T"]]:
    """Return a clip of `length` frames in 0..255, grey except for `frames` (by number), and the mask of these."""
    is_known = np.isin(np.arange(length), list(frames))
    pixels = np.full((length, *next(iter(frames.values())).shape), GREY, np.float32)
    for number, frame in frames.items():
        pixels[number] = frame
    return pixels, is_known


def fold_frame_mask(is_known: Bool[np.ndarray, " T"], stride: int) -> Float32[np.ndarray, "t s"]:
    """Return a mask over frames on the latents' grid: the `stride` frames of each latent frame, as in Wan.

    The first latent frame has a single frame, which is repeated `stride` times (arXiv 2503.20314, section 5.1.1).
    """
    return np.concatenate([np.repeat(is_known[:1], stride), is_known[1:]]).reshape(-1, stride).astype(np.float32)
