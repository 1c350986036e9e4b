"""Metrics of single clips' frames: flicker, smoothness, motion, sharpness, colour, consistency."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float, Float32, UInt8
from scipy.ndimage import laplace

from dit_video.evaluation.feature_functions import FeatureFunction
from dit_video.evaluation.metrics.metric import MeanMetric, MetricBatch, MetricDescription, ShareMetric
from dit_video.evaluation.optical_flow import estimate_flow, import_opencv, interpolate_middle
from dit_video.video import Clip


class TemporalMetric(MeanMetric):
    """A metric with one number per clip of several frames: their mean, with Student's 95 % interval.

    Clips that are too short to have a number, such as images, have the measurement None and do not count; the value's
    note says how many there are.
    """

    min_frames: ClassVar[int] = 2
    """Number of frames of the shortest clip that counts."""

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return a sentence on the clips that are too short; empty if there are none."""
        return describe_short_clips(state)


def describe_short_clips(state: Sequence[float | bool | None]) -> str:
    """Return a sentence on the clips that are too short to have a measurement; empty if there are none."""
    count = sum(value is None for value in state)
    return f"without {count} clips that are too short" if count else ""


def compute_temporal_flickering(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return `(255 - E) / 255` with the mean absolute difference E of neighbouring frames; there are at least two.

    This is the definition of VBench's `temporal_flickering.py`. 1 is a clip at rest.
    """
    # A pair of frames at a time: memory does not grow with the clip.
    changes = [
        float(np.abs(after.astype(np.int16) - before.astype(np.int16)).mean(axis=(0, 1, 2)))
        for before, after in itertools.pairwise(frames)
    ]
    return (255 - float(np.mean(changes))) / 255


@dataclass(frozen=True, kw_only=True)
class TemporalFlickering(TemporalMetric):
    """Mean likeness of neighbouring frames, VBench's temporal flickering.

    Motion lowers it as flicker does: VBench computes it on prompts of scenes at rest, and leaves out samples with much
    motion (see `DynamicDegree`).
    """

    needs, name = ("samples",), "temporal_flickering"
    description = MetricDescription(
        label="temporal flickering",
        is_higher_better=True,
        explanation="likeness of neighbouring frames, at most 1 (VBench); meant for prompts of scenes at rest",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the likeness of neighbouring frames of every sample; None for images."""
        clips = [clip.frames for clip in batch.samples]
        return [compute_temporal_flickering(each) if len(each) >= self.min_frames else None for each in clips]


def compute_motion_smoothness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return `(255 - E) / 255` with the mean absolute error E of every second frame, interpolated from its neighbours.

    Frames 1, 3, 5 … that have two neighbours are compared, as in VBench's `motion_smoothness.py`; clips have at least
    three frames. 1 is a clip whose frames are where a steady motion puts them.

    Raises:
      UserError: If OpenCV is not installed.
    """
    errors = []
    for index in range(1, len(frames) - 1, 2):
        middle = interpolate_middle(frames[index - 1], frames[index + 1])
        difference = middle.astype(np.int16) - frames[index].astype(np.int16)
        errors.append(float(np.abs(difference).mean(axis=(0, 1, 2))))
    return (255 - float(np.mean(errors))) / 255


@dataclass(frozen=True, kw_only=True)
class MotionSmoothness(TemporalMetric):
    """Mean smoothness of motion: how well frames are predicted from their neighbours.

    Values are not comparable with VBench's: VBench interpolates by the network AMT-S, this variant by optical flow (see
    `interpolate_middle`).
    """

    needs, name, min_frames = ("samples",), "motion_smoothness", 3
    description = MetricDescription(
        label="motion smoothness",
        is_higher_better=True,
        explanation="frames predicted from their neighbours by optical flow, at most 1 (VBench's, without its network)",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Check that OpenCV is installed, and return its version."""
        return (f"OpenCV {import_opencv().__version__}",)

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the smoothness of every sample; None for samples of fewer than three frames."""
        clips = [clip.frames for clip in batch.samples]
        return [compute_motion_smoothness(each) if len(each) >= self.min_frames else None for each in clips]


FLOW_FPS = 8.0
"""Rate at which frames are compared, per second."""
TOP_SHARE = 0.05
"""Share of a frame's pixels whose mean flow counts: the ones that move most."""
FLOW_THRESHOLD = 6.0 / 256
"""Mean flow of a frame with large motion, in shorter sides of the frame."""
MOVING_SHARE = 4 / 16
"""Share of frames with large motion that makes a clip one with large motion."""


def compute_top_flow(flow: Float32[np.ndarray, "H W 2"]) -> float:
    """Return the mean flow length, in pixels, of the 5 % of pixels that move most."""
    lengths = np.hypot(flow[..., 0], flow[..., 1]).ravel()
    count = max(1, int(TOP_SHARE * lengths.size))
    return float(np.partition(lengths, -count)[-count:].mean(axis=0))


def select_frames(clip: Clip) -> UInt8[np.ndarray, "t H W 3"]:
    """Return the frames of a clip at about 8 per second, or at its own rate if that is lower."""
    return clip.frames[:: max(1, round(clip.fps / FLOW_FPS))]


def is_dynamic(frames: UInt8[np.ndarray, "t H W 3"]) -> bool:
    """Return True if at least two frames, at 8 per second, have large motion.

    A quarter of the frames must move by more than 6/256 of the shorter side until the next one; a frame moves as much
    as the 5 % of its pixels that move most. These are the rules of VBench's `dynamic_degree.py`, except that at least
    one frame must move; there, two frames always count as dynamic.

    Raises:
      UserError: If OpenCV is not installed.
    """
    threshold = FLOW_THRESHOLD * min(frames.shape[1:3])
    required, moving = max(1, round(MOVING_SHARE * len(frames))), 0
    for pair in itertools.pairwise(frames):
        moving += compute_top_flow(estimate_flow(*pair)) > threshold
        if moving >= required:
            return True
    return False


@dataclass(frozen=True, kw_only=True)
class DynamicDegree(ShareMetric):
    """Share of samples with large motion, with Wilson's 95 % interval.

    It uses VBench's rules with another flow: VBench computes flow by the network RAFT, this by dense inverse search.
    """

    needs, name = ("samples",), "dynamic_degree"
    description = MetricDescription(
        label="dynamic degree",
        unit="%",
        decimals=1,
        explanation="samples with large motion (VBench's rules, with the flow of dense inverse search)",
    )

    def open_weights(self) -> tuple[str, ...]:
        """Check that OpenCV is installed, and return its version."""
        return (f"OpenCV {import_opencv().__version__}",)

    def measure(self, batch: MetricBatch) -> Sequence[bool | None]:
        """Return True for every sample with large motion; None for images and for clips shorter than 1/8 s."""
        clips = [select_frames(clip) for clip in batch.samples]
        return [is_dynamic(each) if len(each) > 1 else None for each in clips]

    def make_note(self, state: tuple[bool | None, ...]) -> str:
        """Return a sentence on the clips that are too short; empty if there are none."""
        return describe_short_clips(state)


LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in the brightness (ITU-R BT.601)."""


def compute_sharpness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the variance over pixels of the Laplacian of the brightness, averaged over frames.

    This is the focus measure LAP4 of Pertuz et al. 2013, after Pech-Pacheco et al. 2000, with the Laplacian of four
    neighbours and frames mirrored about their outermost pixels. Its unit is the square of a level of 255.
    """
    variances = []
    for frame in frames:
        variances.append(float(laplace(frame @ np.array(LUMA), mode="mirror").var(axis=(0, 1))))
    return float(np.mean(variances))


@dataclass(frozen=True, kw_only=True)
class Sharpness(MeanMetric):
    """Mean sharpness of samples.

    Noise raises it as edges do, and it depends on the content and the size of frames, so it should be compared with the
    data's sharpness at the same size.
    """

    needs, name = ("samples",), "sharpness"
    description = MetricDescription(
        label="sharpness",
        decimals=0,
        explanation="variance of the Laplacian of the brightness in 0..255; noise raises it, too",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the sharpness of every sample."""
        return [compute_sharpness(clip.frames) for clip in batch.samples]


def compute_colourfulness(frames: UInt8[np.ndarray, "T H W 3"]) -> float:
    """Return the measure M3 of Hasler and Süsstrunk, "Measuring colourfulness in natural images", averaged over frames.

    It is `s + 0.3 m` with the root of the sum of squares of the standard deviations (s) and of the means (m) of the
    opponent colours `R - G` and `(R + G) / 2 - B`, in 0..255, over a frame's pixels. In the paper 15 is slightly
    colourful, 33 moderately, 45 averagely, 59 quite, 82 highly, 109 extremely.
    """
    values = []
    for frame in frames:
        red, green, blue = np.moveaxis(frame.astype(np.float64), -1, 0)
        opponents = np.stack([red - green, (red + green) / 2 - blue])
        deviation = np.hypot(*opponents.std(axis=(1, 2)))
        values.append(float(deviation + 0.3 * np.hypot(*opponents.mean(axis=(1, 2)))))
    return float(np.mean(values))


@dataclass(frozen=True, kw_only=True)
class Colourfulness(MeanMetric):
    """Mean colourfulness of samples, to be compared with the data's."""

    needs, name = ("samples",), "colourfulness"
    description = MetricDescription(
        label="colourfulness",
        decimals=1,
        explanation="measure M3 of Hasler and Süsstrunk 2003: 15 is slightly colourful, 59 quite, 109 extremely",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float]:
        """Return the colourfulness of every sample."""
        return [compute_colourfulness(clip.frames) for clip in batch.samples]


def compute_consistency(features: Float[np.ndarray, "T d"]) -> float:
    """Return the mean cosine similarity of each frame's features with the first and the previous frame's.

    Negative similarities count as 0, as in VBench's `subject_consistency.py`; there are at least two frames. Features
    that are all zero are similar to no others.
    """
    features = features.astype(np.float64)
    units = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    first, previous = units[1:] @ units[0], (units[1:] * units[:-1]).sum(axis=1)
    return float((np.clip(first, 0, 1) + np.clip(previous, 0, 1)).mean(axis=0) / 2)


@dataclass(frozen=True, kw_only=True)
class SubjectConsistency(TemporalMetric):
    """Mean likeness of a sample's frames by image features.

    VBench uses the features of DINO ViT-B/16; values with other features are not comparable with it. Every sample
    counts alike, unlike in VBench's mean over frames, if lengths differ.
    """

    features: FeatureFunction
    """Features of frames, or of clips, which are called with a frame each."""

    needs, name = ("samples",), "subject_consistency"
    description = MetricDescription(
        label="subject consistency",
        is_higher_better=True,
        explanation="cosine similarity of features of frames with the first and the previous one, at most 1 (VBench)",
    )

    def measure(self, batch: MetricBatch) -> Sequence[float | None]:
        """Return the consistency of every sample; None for images."""
        return [self._measure_clip(clip) if len(clip.frames) >= self.min_frames else None for clip in batch.samples]

    def make_note(self, state: tuple[float | None, ...]) -> str:
        """Return the identity of the features, and a sentence on images."""
        return "; ".join(filter(None, (super().make_note(state), self.features.open().identity if state else "")))

    def _measure_clip(self, clip: Clip) -> float:
        if (features := self.features.open()).is_of_frames:
            return compute_consistency(features.extract([clip]))
        images = [Clip(frames=clip.frames[index : index + 1], fps=clip.fps) for index in range(len(clip.frames))]
        return compute_consistency(features.extract(images))
