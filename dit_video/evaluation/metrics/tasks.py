"""Metrics of generation tasks: kept pixels, borders, jumps, zooms, interpolation."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from dit_video.core.resize import resize
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription
from dit_video.evaluation.metrics.reconstruction import compute_limited_psnr
from dit_video.models.features.clip import resize_bicubic
from dit_video.video import Clip


@dataclass(frozen=True, kw_only=True)
class KeptPixels(MeanMetric):
    """Mean loss of PSNR in kept pixels, relative to the autoencoder's own reconstruction."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "kept_psnr_loss"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="kept pixels below the reconstruction", unit="dB", decimals=2, is_higher_better=False, explanation="PSNR"
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the loss of every sample that keeps pixels, and None for the others."""
        losses: list[float | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.is_known is None:
                losses.append(None)
                continue
            kept = truth.reference.frames[truth.is_known]
            best, own = (
                compute_limited_psnr(kept, other.frames[truth.is_known]) for other in (truth.reconstruction, clip)
            )
            losses.append(best - own)
        return losses


_REACH = 4
"""Distance from the border, in pixels, within which gradients are compared."""


@dataclass(frozen=True, kw_only=True)
class RegionBorder(MeanMetric):
    """Mean gradient across the border of known pixels, relative to the one near it: above 1 if there is an edge."""

    needs = ("samples", "scenes")
    name: ClassVar[str] = "border_gradient"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="gradient at the border over that beside it", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the ratio of every sample with known pixels, and None for the others."""
        return [
            None if truth.is_known is None else measure_border(clip.frames, truth.is_known)
            for clip, truth in zip(batch.samples, batch.scenes, strict=True)
        ]


def measure_border(frames: np.ndarray, is_known: np.ndarray) -> float:
    """Return the mean gradient across a mask's border, divided by the gradient near it on either side."""
    across, nearby = [], []
    values = frames.astype(np.float32)
    for axis in (1, 2):
        gradient = np.abs(np.diff(values, axis=axis)).mean(axis=-1)
        is_border = np.diff(is_known.astype(np.int8), axis=axis) != 0
        near = np.zeros_like(is_border)
        for shift in (*range(-_REACH, 0), *range(1, _REACH + 1)):
            near |= np.roll(is_border, shift, axis=axis)
        across.append(gradient[is_border])
        nearby.append(gradient[near & ~is_border])
    return float(np.concatenate(across).mean(axis=0) / max(float(np.concatenate(nearby).mean(axis=0)), 1e-3))


@dataclass(frozen=True, kw_only=True)
class TransitionJump(MeanMetric):
    """Largest change between neighbouring frames over the median one, averaged over clips: high if there is a cut."""

    needs = ("samples",)
    name: ClassVar[str] = "transition_jump"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="largest change of frames over the median", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the ratio of every clip."""
        ratios = []
        for clip in batch.samples:
            changes = np.abs(np.diff(clip.frames.astype(np.float32), axis=0)).mean(axis=(1, 2, 3))
            ratios.append(float(changes.max(axis=0)) / max(float(np.median(changes)), 1e-3))
        return ratios


@dataclass(frozen=True, kw_only=True)
class ZoomSteps(MeanMetric):
    """Mean loss of PSNR in the centres of a zoom out, relative to the autoencoder's reconstruction of the first frame.

    The centre of a frame, the known pixels of `TaskTruth.is_known`, is compared with the former frame of that size.
    """

    needs = ("samples", "scenes")
    name: ClassVar[str] = "zoom_centre_loss"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="centre of a zoom below the reconstruction", unit="dB", decimals=2, is_higher_better=False
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the mean loss over the frames of every sample with known pixels, and None for the others."""
        losses: list[float | None] = []
        for clip, truth in zip(batch.samples, batch.scenes, strict=True):
            if truth.is_known is None:
                losses.append(None)
                continue
            best = compute_limited_psnr(truth.reference.frames, truth.reconstruction.frames)
            steps = zip(clip.frames, clip.frames[1:], truth.is_known[1:], strict=False)
            losses.append(best - float(np.mean([_measure_step(*step) for step in steps])))
        return losses


def _measure_step(former: np.ndarray, frame: np.ndarray, is_centre: np.ndarray) -> float:
    """Return the PSNR of the centre of a frame, in dB."""
    rows, columns = np.flatnonzero(is_centre.any(axis=1)), np.flatnonzero(is_centre.any(axis=0))
    centre = frame[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return compute_limited_psnr(resize(former[None], *centre.shape[:2])[0], centre)


class _PsnrGain(MeanMetric):
    """Base of the metrics of a gain in PSNR over a simpler way to the same pixels."""

    needs = ("samples", "scenes")

    @abc.abstractmethod
    def list_pixels(self, clip: Clip, truth: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the true pixels of a sample, the sample's, and those of the simpler way."""

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the gain of every sample."""
        pixels = (self.list_pixels(*pair) for pair in zip(batch.samples, batch.scenes, strict=True))
        return [compute_limited_psnr(true, own) - compute_limited_psnr(true, other) for true, own, other in pixels]


@dataclass(frozen=True, kw_only=True)
class InterpolationGain(_PsnrGain):
    """Mean gain in PSNR of new frames over linear blending of the autoencoder's reconstructions of known frames."""

    name: ClassVar[str] = "interpolation_gain"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="new frames above linear blending", unit="dB", decimals=2, is_higher_better=True, explanation="PSNR"
    )

    def list_pixels(self, clip: Clip, truth: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the new frames."""
        is_known = np.any(truth.is_known, axis=(1, 2))
        blended = blend_linearly(truth.reconstruction.frames, is_known)
        return truth.reference.frames[~is_known], clip.frames[~is_known], blended[~is_known]


@dataclass(frozen=True, kw_only=True)
class EnlargementGain(_PsnrGain):
    """Mean gain in PSNR of enlarged clips over bicubic enlargement of the same clips of low resolution."""

    name: ClassVar[str] = "enlargement_gain"
    description: ClassVar[MetricDescription] = MetricDescription(
        label="enlarged clips above bicubic", unit="dB", decimals=2, is_higher_better=True, explanation="PSNR"
    )

    def list_pixels(self, clip: Clip, truth: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return all frames."""
        bicubic = resize_bicubic(truth.second_clip.frames, clip.height, clip.width)
        return truth.reference.frames, clip.frames, bicubic


def blend_linearly(frames: np.ndarray, is_known: Any) -> np.ndarray:
    """Fill unknown frames by blending their known neighbours."""
    known = np.flatnonzero(is_known)
    blended = []
    for number in range(len(frames)):
        after = min(int(np.searchsorted(known, number)), len(known) - 1)
        before = after if known[after] <= number else max(after - 1, 0)
        first, last = known[before], known[after]
        weight = 0.0 if first == last else (number - first) / (last - first)
        blended.append((1 - weight) * frames[first].astype(np.float32) + weight * frames[last])
    return np.rint(np.stack(blended)).astype(np.uint8)
