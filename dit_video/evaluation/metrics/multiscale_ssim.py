"""Structural similarity over several scales, of reconstructions (Wang et al. 2003)."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from dit_video.core.errors import UserError
from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    estimate_mean,
)
from dit_video.evaluation.metrics.ssim_terms import WINDOW, check_same_shape, compute_ssim_terms

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, from the finest (Wang et al. 2003, section 3.2), as published: their sum is 1.0001."""


class MultiscaleValue(NamedTuple):
    """The multi-scale similarity of a clip."""

    value: float
    scales: int
    """Number of scales; values of different numbers are not comparable."""


def count_scales(height: int, width: int) -> int:
    """Return the largest number of scales, at most 5, whose coarsest one is no smaller than the window.

    Five need 176 pixels of the shorter side, four 88, three 44, two 22.

    Raises:
      UserError: not even the frame is as large as the window.
    """
    side = min(height, width)
    if side < WINDOW:
        raise UserError(f"MS-SSIM needs frames of at least {WINDOW}x{WINDOW} pixels, not {height}x{width}; use PSNR")
    return sum(side >= WINDOW * 2**level for level in range(len(SCALE_WEIGHTS)))


def compute_multiscale_ssim(
    original: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "..."], *, scales: int | None = None
) -> MultiscaleValue:
    """Return the multi-scale structural similarity, at most 1, with an 11×11 Gaussian window, sigma 1.5.

    It is the product of the structure at every scale and of the luminance at the coarsest one, each to the power of the
    scale's weight (eq. 7), of each of the R, G and B planes, averaged over planes and frames. Scales are halved by the
    mean of 2×2 pixels; the last row or column of an odd size is repeated. A negative mean, of which there is no power,
    counts as 0. With fewer than five scales their weights are divided by their sum.

    Args:
      original: frames of a clip.
      other: frames of the other.
      scales: number of scales, by default as many as fit.

    Raises:
      UserError: the shapes differ, or the frames are too small for the scales.
    """
    check_same_shape(original, other)
    height, width = original.shape[1:3]
    largest = count_scales(height, width)
    scales = scales or largest
    if not 1 <= scales <= largest:
        raise UserError(f"scales={scales} is invalid for {height}x{width} pixels: 1 to {largest} fit. Use {largest}.")
    weights = np.array(SCALE_WEIGHTS[:scales])
    if scales < len(SCALE_WEIGHTS):
        weights /= weights.sum(axis=0)
    frames = [_compare_frames(*pair, weights) for pair in zip(original, other, strict=True)]
    return MultiscaleValue(float(np.mean(frames)), scales)


def _compare_frames(
    a: UInt8[np.ndarray, "H W 3"], b: UInt8[np.ndarray, "H W 3"], weights: Float[np.ndarray, " scales"]
) -> float:
    pyramid = [(a.astype(np.float64), b.astype(np.float64))]
    while len(pyramid) < len(weights):
        pyramid.append((_halve(pyramid[-1][0]), _halve(pyramid[-1][1])))
    terms = [compute_ssim_terms(*pair) for pair in pyramid]
    factors = np.stack([*(each.structure for each in terms[:-1]), terms[-1].similarity])
    return float(np.prod(np.maximum(factors, 0) ** weights[:, None], axis=0).mean(axis=0))


def _halve(plane: Float[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
    height, width = plane.shape[:2]
    plane = np.pad(plane, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    return plane.reshape(-(-height // 2), 2, -(-width // 2), 2, 3).mean(axis=(1, 3))


@dataclass(frozen=True, kw_only=True)
class MultiscaleSsim(ExampleMetric[MultiscaleValue]):
    """Mean multi-scale SSIM of the autoencoder's reconstructions, with the numbers of scales in the note."""

    needs = ("pairs",)

    def describe(self) -> Mapping[str, MetricDescription]:
        """Return the description of the mean."""
        explanation = "of held-out clips, at most 1 (Wang et al. 2003); comparable for equal numbers of scales"
        return {"multiscale_ssim": MetricDescription(label="MS-SSIM", is_higher_better=True, explanation=explanation)}

    def measure(self, batch: MetricBatch) -> Sequence[MultiscaleValue]:
        """Return the similarity of every reconstruction."""
        return [compute_multiscale_ssim(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]

    def compute(self, state: tuple[MultiscaleValue, ...]) -> Mapping[str, MetricValue]:
        """Return the mean."""
        values = [each.value for each in state]
        counts = sorted(Counter(each.scales for each in state).items())
        note = f"{counts[0][0]} scales" if counts else ""
        if len(counts) > 1:
            parts = ", ".join(f"{scales} for {count} clips" for scales, count in counts)
            note = f"mixed numbers of scales, whose values are not comparable: {parts}"
        return {"multiscale_ssim": estimate_mean(values, note=note)}

    def list_examples(self, state: tuple[MultiscaleValue, ...]) -> Sequence[Mapping[str, float | bool]]:
        """Return the similarity of every reconstruction."""
        return [{"multiscale_ssim": each.value} for each in state]
