"""Metrics of reconstructions: PSNR, SSIM, MS-SSIM, LPIPS and flicker."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Real, UInt8
from scipy.ndimage import gaussian_filter

from dit_video.core.errors import UserError
from dit_video.core.pixels import to_float
from dit_video.evaluation.feature_functions import make_identity
from dit_video.evaluation.metrics.frames import TemporalMetric
from dit_video.evaluation.metrics.metric import (
    ExampleMetric,
    MeanMetric,
    MetricBatch,
    MetricDescription,
    MetricValue,
    estimate_mean,
)
from dit_video.models.features import Lpips
from dit_video.nn import get_graph_def
from dit_video.weights import load_lpips

PEAK = 255.0
WINDOW, SIGMA = 11, 1.5
K1, K2 = 0.01, 0.03


class SsimTerms(NamedTuple):
    """A frame's mean similarity in each plane, over all positions at which the window lies inside the frame."""

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
      UserError: If their shapes differ.
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


MAX_PSNR = 100.0
"""Largest PSNR that the metrics count, in dB, as equal clips have an infinite PSNR."""


def psnr(original: UInt8[np.ndarray, "*pixels 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the peak signal-to-noise ratio in dB: `10 log10(255^2 / MSE)`, MSE over all pixels; inf if equal.

    Raises:
      UserError: If the shapes differ.
    """
    check_same_shape(original, other)
    error = np.mean(np.square(original.astype(np.float64) - other.astype(np.float64)), axis=None)
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def compute_limited_psnr(original: UInt8[np.ndarray, "*pixels 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the PSNR in dB, at most `MAX_PSNR`, so that its mean exists even if some clips are equal.

    Raises:
      UserError: If the shapes differ.
    """
    return min(psnr(original, other), MAX_PSNR)


def ssim(original: UInt8[np.ndarray, "T H W 3"], other: UInt8[np.ndarray, "..."]) -> float:
    """Return the structural similarity (Wang et al. 2004, eq. 13), at most 1, with an 11x11 Gaussian window, sigma 1.5.

    The mean is over all positions at which the window lies inside the frame, the R, G and B planes, and the frames.

    Raises:
      UserError: If the shapes differ, or the frames are smaller than the window.
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
    """Mean PSNR of the best linear autoencoder with as many latent values; a trained autoencoder must exceed it."""

    needs, name = ("pairs", "baselines"), "linear_psnr"
    description = MetricDescription(
        label="PSNR of the best linear autoencoder", unit="dB", decimals=1, explanation="with as many latent values"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the PSNR of every linear reconstruction."""
        pairs = zip(batch.pairs, batch.baselines, strict=False)  # there may be no baselines
        return [compute_limited_psnr(pair.original.frames, baseline.frames) for pair, baseline in pairs]


SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of the scales, from the finest (Wang et al. 2003, section 3.2), as published: their sum is 1.0001."""


class MultiscaleValue(NamedTuple):
    """The multi-scale similarity of a clip."""

    value: float
    scales: int
    """Number of scales; values with different numbers are not comparable."""


def count_scales(height: int, width: int) -> int:
    """Return the largest number of scales, at most 5, whose coarsest one is no smaller than the window.

    Five scales need 176 pixels on the shorter side, four need 88, three 44, two 22.

    Raises:
      UserError: If the frame itself is smaller than the window.
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
    scale's weight (eq. 7), computed for each of the R, G and B planes, and averaged over planes and frames. Scales are
    halved by the mean of 2×2 pixels; an odd size repeats the last row or column. A negative mean, which has no power,
    counts as 0. Weights of fewer than five scales are divided by their sum.

    Args:
      original: Frames of a clip.
      other: Frames of the other.
      scales: Number of scales, by default as many as fit.

    Raises:
      UserError: If the shapes differ, or the frames are too small for the scales.
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


CHUNK_PIXELS = 4 * 256 * 256
"""Pixels of the frames that are compared at once."""


class _LpipsWeights(NamedTuple):
    params: dict[str, Any]
    identity: str
    """Name of the network, and hash of its weights."""


@functools.lru_cache(maxsize=1)
def _load_weights(path: str) -> _LpipsWeights:
    return _LpipsWeights(jax.device_put(load_lpips(path)), make_identity("LPIPS", path))


def _make_lpips(rngs: nnx.Rngs) -> Lpips:
    return Lpips(rngs=rngs)


@jax.jit
def _compare_chunk(
    params: dict[str, Any], frames: UInt8[Array, "n H W 3"], others: UInt8[Array, "n H W 3"]
) -> Float32[Array, " n"]:
    return nnx.merge(get_graph_def(_make_lpips), params)(to_float(frames)[:, None], to_float(others)[:, None])


def compute_perceptual_distance(
    original: UInt8[np.ndarray, "T H W 3"],
    other: UInt8[np.ndarray, "..."],
    *,
    weights: str,
    chunk_pixels: int = CHUNK_PIXELS,
) -> float:
    """Return the LPIPS of two clips, averaged over frames; 0 if they are equal.

    Frames are compared in chunks, so that memory does not grow with the clip.

    Args:
      original: Frames of a clip, of at least 16×16 pixels.
      other: Frames of the other.
      weights: File of the weights (see `load_lpips`), which is read once.
      chunk_pixels: Pixels of the frames that are compared at once; at least one frame.

    Raises:
      MissingError: If the file does not exist.
      UserError: If the file holds another network, the shapes differ, or the frames are too small.
    """
    check_same_shape(original, other)
    frames, height, width = original.shape[:3]
    # Chunks have equal lengths, the last one filled up with repeated frames, so one program serves all of a clip.
    chunks = -(-frames // max(1, chunk_pixels // (height * width)))
    size = -(-frames // chunks)
    params, distances = _load_weights(weights).params, []
    for start in range(0, frames, size):
        indices = np.minimum(np.arange(start, start + size), frames - 1)
        chunk = _compare_chunk(params, jnp.asarray(original[indices]), jnp.asarray(other[indices]))
        distances.append(np.asarray(chunk))
    return float(np.concatenate(distances)[:frames].mean(axis=0))


@dataclass(frozen=True, kw_only=True)
class PerceptualDistance(MeanMetric):
    """Mean LPIPS of the autoencoder's reconstructions, with features of VGG16."""

    weights: str
    """File of the `lpips` package's weights; `dit_video.weights.load_lpips` says how to make it."""

    needs, name = ("pairs",), "perceptual_distance"
    description = MetricDescription(
        label="LPIPS",
        is_higher_better=False,
        explanation="of held-out clips, with VGG16 (arXiv 1801.03924); 0 for equal clips",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Read the weights, and return their identity."""
        return (_load_weights(self.weights).identity,)

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the distance of every reconstruction."""
        pairs = [(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]
        return [compute_perceptual_distance(*pair, weights=self.weights) for pair in pairs]

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return the hash of the weights; empty without examples."""
        return _load_weights(self.weights).identity if state else ""


def compute_added_flicker(original: UInt8[np.ndarray, "T H W 3"], decoded: UInt8[np.ndarray, "..."]) -> float:
    """Return the mean absolute difference between the clips' changes from frame to frame, in 0..255.

    It is the mean of `|(y[t+1] - y[t]) - (x[t+1] - x[t])|` over time, pixels and colours, with the original x and its
    reconstruction y: dtSSD (Erofeev et al. 2015) with absolute values in place of squares, so that its unit is a level
    of brightness. An error that is the same in all frames, such as a blurred background at rest, adds nothing.

    Raises:
      UserError: If the shapes differ.
    """
    check_same_shape(original, decoded)
    errors = (y.astype(np.int16) - x.astype(np.int16) for x, y in zip(original, decoded, strict=True))
    # A pair of frames at a time: memory does not grow with the clip.
    before, changes = next(errors), []
    for error in errors:
        changes.append(float(np.abs(error - before).mean(axis=(0, 1, 2))))
        before = error
    return float(np.mean(changes))


@dataclass(frozen=True, kw_only=True)
class ReconstructionFlicker(TemporalMetric):
    """Mean change from frame to frame that is in reconstructions but not in their originals."""

    needs, name = ("pairs",), "reconstruction_flicker"
    description = MetricDescription(
        label="flicker of reconstructions",
        unit="levels",
        decimals=2,
        is_higher_better=False,
        explanation="mean absolute difference of changes from frame to frame, of 255 levels (after dtSSD, 2015)",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the flicker of every reconstruction; None for images."""
        pairs = [(pair.original.frames, pair.decoded.frames) for pair in batch.pairs]
        return [compute_added_flicker(*pair) if len(pair[0]) >= self.min_frames else None for pair in pairs]
