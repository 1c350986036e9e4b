"""Camera labels and motion from the codec's motion vectors: no network, about the cost of decoding."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from dit_video.curation.annotator import Annotator, ClipFile, Column
from dit_video.curation.block_motion import read_block_vectors
from dit_video.curation.camera_motion import TOLERANCE, compute_shake, label_camera, track_camera

_SPEED = "widths/s"
_MOTIONS = ("camera_zoom", "camera_roll", "camera_pan", "camera_tilt")


@dataclass(frozen=True, kw_only=True)
class MotionVectors(Annotator):
    """Motion of the camera and of objects."""

    tolerance: float = TOLERANCE
    """Speed in widths per second by which a vector may differ from the camera's motion and count for it."""

    @property
    def name(self) -> str:
        return "motion_vectors"

    @property
    def columns(self) -> Mapping[str, Column]:
        number = pa.float32()
        labels = "static, handheld, other, or pan left, tilt up, zoom in, roll clockwise and their opposites"
        return {
            "camera": Column(type=pa.string(), description=f"Label of the camera's motion: {labels}."),
            "camera_pan": Column(type=number, unit=_SPEED, description="Mean pan, to the right."),
            "camera_tilt": Column(type=number, unit=_SPEED, description="Mean tilt, upwards."),
            "camera_zoom": Column(type=number, unit="1/s", description="Mean growth of the picture."),
            "camera_roll": Column(type=number, unit="rad/s", description="Mean roll of the camera, clockwise."),
            "camera_shake": Column(type=number, unit=_SPEED, description="Root mean square of shaking."),
            "camera_share": Column(type=number, description="Share of the picture that follows the camera's motion."),
            "object_motion": Column(
                type=number, unit=_SPEED, description="Mean speed of the picture relative to the camera's motion."
            ),
        }

    @property
    def identity(self) -> str:
        return f"motion_vectors 1, tolerance {self.tolerance:g}"

    def annotate(self, clip: ClipFile) -> Mapping[str, Any]:
        track = track_camera(*read_block_vectors(clip.content), tolerance=self.tolerance)
        if not len(track.motions):
            return dict.fromkeys(self.columns)

        def average(values: np.ndarray) -> float:
            return float(np.average(values, weights=track.durations))

        means = {name: average(track.motions[:, index]) for index, name in enumerate(_MOTIONS)}
        return {
            "camera": label_camera(track),
            **means,
            "camera_shake": compute_shake(track),
            "camera_share": average(track.inliers),
            "object_motion": average(track.residuals),
        }
