"""Frames that are given: the pixels that an autoencoder is shown, and the mask on its latents' grid."""

import numpy as np
from jaxtyping import Bool, Float32, UInt8

GREY = 127.5
"""Of 0..255: zero in the models' [-1, 1], for pixels that are not known."""


def blanked(
    frames: dict[int, UInt8[np.ndarray, "H W 3"]], length: int
) -> tuple[Float32[np.ndarray, "T H W 3"], Bool[np.ndarray, " T"]]:
    """A clip of `length` frames in 0..255, grey but for those that are given by their numbers, and which those are."""
    known = np.isin(np.arange(length), list(frames))
    pixels = np.full((length, *next(iter(frames.values())).shape), GREY, np.float32)
    for number, frame in frames.items():
        pixels[number] = frame
    return pixels, known


def folded(known: Bool[np.ndarray, " T"], stride: int) -> Float32[np.ndarray, "t s"]:
    """A mask over frames on the latents' grid: for each latent frame its `stride` frames, as Wan has them.

    The first latent frame is of one frame, which stands there `stride` times (arXiv 2503.20314, section 5.1.1).
    """
    return np.concatenate([np.repeat(known[:1], stride), known[1:]]).reshape(-1, stride).astype(np.float32)
