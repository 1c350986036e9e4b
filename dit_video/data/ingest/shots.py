"""Shot boundaries, found by PySceneDetect's detectors in frames that PyAV decodes.

The detectors receive frames one by one and return frame numbers, so that times are PyAV's, whatever the file's frame
rate. Their own minimum length is disabled: it would join a short shot to its neighbour, and the clip would contain a
cut.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dit_video.core.errors import UserError

DetectorName = Literal["content", "adaptive"]
DEFAULT_THRESHOLDS: dict[DetectorName, float] = {"content": 27.0, "adaptive": 3.0}
"""Default thresholds of PySceneDetect."""


class CutDetector:
    """A detector of cuts in a stream of frames.

    Args:
      detector: "content" compares neighbouring frames: a cut is where hue, saturation and lightness (0..255) change by
        `threshold` or more on average. "adaptive" requires a change of 15 or more that is `threshold` times as large as
        in the two frames on each side, so that fast motion is not a cut.
      threshold: threshold of the detector; by default PySceneDetect's, 27 and 3.

    Raises:
      UserError: PySceneDetect is not installed.
    """

    def __init__(self, detector: DetectorName, threshold: float | int | None = None):
        try:
            from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
        except ModuleNotFoundError as error:
            raise UserError(f"shot boundaries need PySceneDetect ({error}); run pip install -e '.[ingest]'") from error
        level = DEFAULT_THRESHOLDS[detector] if threshold is None else float(threshold)
        self._detector: Any = (
            ContentDetector(threshold=level, min_scene_len=0)
            if detector == "content"
            else AdaptiveDetector(adaptive_threshold=level, min_scene_len=0)
        )
        self._timecode, self._count = FrameTimecode, 0
        self.frame_numbers: list[int] = []
        """Numbers of the frames that begin a new shot."""

    def add_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add the next frame, RGB; all frames have the same size."""
        # PySceneDetect requires a frame rate to compute times; only frame numbers are used here, so any rate will do.
        timecode = self._timecode(self._count, 25.0)
        cuts = self._detector.process_frame(timecode, np.ascontiguousarray(frame[..., ::-1]))
        self.frame_numbers.extend(cut.frame_num for cut in cuts if cut.frame_num > 0)
        self._count += 1


class Span(NamedTuple):
    """Consecutive frames of a file, from `first` up to but not including `stop`."""

    first: int
    stop: int


def split_at_cuts(cuts: Sequence[int], frames: int) -> tuple[Span, ...]:
    """Return the shots of a file with this many frames: each begins at frame 0 or at a cut."""
    starts = sorted({0, *cuts})
    return tuple(Span(first, stop) for first, stop in zip(starts, [*starts[1:], frames], strict=True))
