"""Known pixels of a clip: what an autoencoder encodes of them, and their mask on the grid of its latents."""

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8

from dit_video.core.grid import Grid

GREY = 127.5
"""Value in 0..255 of unknown pixels, zero in the models' [-1, 1]."""


def blank_unknown(
    frames: UInt8[np.ndarray, "T H W 3"], is_known: Bool[np.ndarray, "T H W"]
) -> Float32[np.ndarray, "T H W 3"]:
    """Return frames in 0..255 that are grey where they are unknown."""
    return np.where(is_known[..., None], frames, np.float32(GREY)).astype(np.float32)


def split_cells(values: Shaped[np.ndarray, "T H W"], stride: Grid) -> Shaped[np.ndarray, "t h w s y x"]:
    """Return the pixels of every latent: those of `s` frames, `y` rows and `x` columns.

    The first latent frame has a single frame, which is repeated `s` times (Wan, arXiv 2503.20314, section 5.1.1).
    """
    frames = np.concatenate([np.repeat(values[:1], stride.t - 1, axis=0), values])
    t, h, w = (length // step for length, step in zip(frames.shape, stride, strict=True))
    return frames.reshape(t, stride.t, h, stride.h, w, stride.w).transpose(0, 2, 4, 1, 3, 5)


def fold_mask(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Float32[np.ndarray, "t h w s"]:
    """Return the mask on the latents' grid: for each of a latent's `s` frames the share of its pixels that is known."""
    return split_cells(is_known, stride).mean(axis=(4, 5), dtype=np.float32)


def find_any_known(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents at least one of whose pixels is known."""
    return np.any(split_cells(is_known, stride), axis=(3, 4, 5))


def find_known_latents(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents all of whose pixels are known."""
    return np.all(split_cells(is_known, stride), axis=(3, 4, 5))


def find_partly_known_latents(is_known: Bool[np.ndarray, "T H W"], stride: Grid) -> Bool[np.ndarray, "t h w"]:
    """Return True for the latents with known pixels and with unknown ones."""
    return find_any_known(is_known, stride) & ~find_known_latents(is_known, stride)
