"""Terms of structural similarity, which the metrics of one and of several scales share (Wang et al. 2004)."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Real, UInt8
from scipy.ndimage import gaussian_filter

from dit_video.core.errors import UserError

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


class SsimTerms(NamedTuple):
    """Means of a frame's similarity over all positions at which the window lies inside the frame, for each plane."""

    similarity: Float[np.ndarray, " planes"]
    """Structural similarity: the product of luminance, contrast and structure (eq. 13)."""
    structure: Float[np.ndarray, " planes"]
    """Product of contrast and structure alone."""


def compute_ssim_terms(a: Real[np.ndarray, "H W planes"], b: Real[np.ndarray, "H W planes"]) -> SsimTerms:
    """Return the terms of two frames in 0..255, of at least 11×11 pixels, with a Gaussian window, sigma 1.5."""
    # scikit-image's structural_similarity gives the same similarity, but takes three times as long on frames of 32x32,
    # and does not return the structure.
    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = _compute_window_mean(a), _compute_window_mean(b)
    variance_a = _compute_window_mean(a * a) - mean_a**2
    variance_b = _compute_window_mean(b * b) - mean_b**2
    covariance = _compute_window_mean(a * b) - mean_a * mean_b
    c1, c2 = (K1 * PEAK) ** 2, (K2 * PEAK) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return SsimTerms((luminance * structure).mean(axis=(0, 1)), structure.mean(axis=(0, 1)))


def check_same_shape(original: UInt8[np.ndarray, "..."], other: UInt8[np.ndarray, "..."]) -> None:
    """Check that two clips can be compared.

    Raises:
      UserError: their shapes differ.
    """
    if original.shape != other.shape:
        raise UserError(
            f"clips of shapes {list(original.shape)} and {list(other.shape)} cannot be compared; "
            "resize or cut one of them to the other's shape"
        )


def _compute_window_mean(plane: Float[np.ndarray, "H W planes"]) -> Float[np.ndarray, "h w planes"]:
    """Return the Gaussian mean around every position at which the window fits."""
    reach = WINDOW // 2
    return gaussian_filter(plane, SIGMA, radius=reach, axes=(0, 1))[reach:-reach, reach:-reach]
