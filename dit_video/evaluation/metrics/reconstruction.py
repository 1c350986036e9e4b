"""Distortion of a reconstruction: PSNR and SSIM, one value per clip, and their means as metrics."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.ssim_terms import PEAK, WINDOW, check_same_shape, compute_ssim_terms

MAX_PSNR = 100.0
"""Largest PSNR that the metrics count, in dB: that of equal clips is infinite."""


def psnr(original: UInt8[np.ndarray, "*pixels 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the peak signal-to-noise ratio in dB: `10 log10(255^2 / MSE)`, MSE over all pixels; inf if equal.

    Raises:
      UserError: the shapes differ.
    """
    check_same_shape(original, other)
    error = np.mean(np.square(original.astype(np.float64) - other.astype(np.float64)), axis=None)
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def compute_limited_psnr(original: UInt8[np.ndarray, "*pixels 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the PSNR in dB, at most `MAX_PSNR`, which has a mean where some pixels are equal.

    Raises:
      UserError: the shapes differ.
    """
    return min(psnr(original, other), MAX_PSNR)


def ssim(original: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the structural similarity (Wang et al. 2004, eq. 13), at most 1, with an 11x11 Gaussian window, sigma 1.5.

    The mean is over all positions at which the window lies inside the frame, the R, G and B planes, and the frames.

    Raises:
      UserError: the shapes differ, or the frames are smaller than the window.
    """
    check_same_shape(original, other)
    height, width = original.shape[1:3]
    if min(height, width) < WINDOW:
        raise UserError(
            f"SSIM needs frames of at least {WINDOW}x{WINDOW} pixels, these have {height}x{width}; use PSNR"
        )
    frames = [compute_ssim_terms(a, b).similarity for a, b in zip(original, other, strict=True)]
    return float(np.mean(frames))


@dataclass(frozen=True, kw_only=True)
class Psnr(MeanMetric):
    """Mean PSNR of the autoencoder's reconstructions."""

    needs, name = ("pairs",), "psnr"
    description = MetricDescription(
        label="PSNR", unit="dB", decimals=1, is_higher_better=True, explanation="of held-out clips, each at most 100 dB"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the PSNR of every reconstruction."""
        return [compute_limited_psnr(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]


@dataclass(frozen=True, kw_only=True)
class Ssim(MeanMetric):
    """Mean SSIM of the autoencoder's reconstructions."""

    needs, name = ("pairs",), "ssim"
    description = MetricDescription(label="SSIM", is_higher_better=True, explanation="of held-out clips, at most 1")

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the SSIM of every reconstruction."""
        return [ssim(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]


@dataclass(frozen=True, kw_only=True)
class LinearPsnr(MeanMetric):
    """Mean PSNR of the best linear autoencoder with as many latent values, which a trained one must exceed."""

    needs, name = ("pairs", "baselines"), "linear_psnr"
    description = MetricDescription(
        label="PSNR of the best linear autoencoder", unit="dB", decimals=1, explanation="with as many latent values"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the PSNR of every linear reconstruction."""
        pairs = zip(batch.pairs, batch.baselines, strict=False)  # there may be no baselines
        return [compute_limited_psnr(pair.original.frames, baseline.frames) for pair, baseline in pairs]
