"""Where a file's shots begin: PySceneDetect's detectors, shown frames that PyAV decoded.

The detectors are given frames one by one and asked for frame numbers, so that times stay PyAV's, whatever the file's
rate. Their own minimum length is off: it would join a short shot to its neighbour, and a clip would hold a cut.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from dit_video.core.errors import UserError

Detector = Literal["content", "adaptive"]
THRESHOLDS: dict[Detector, float] = {"content": 27.0, "adaptive": 3.0}
"""PySceneDetect's own."""


class Cuts:
    """Finds cuts while frames pass by.

    Args:
      detector: "content" compares neighbouring frames: a cut is where hue, saturation and lightness (0..255) change by
        `threshold` or more on average. "adaptive" asks for a change of 15 or more that is `threshold` times as large as
        around it (two frames on each side), so that fast motion is no cut.
      threshold: by default PySceneDetect's: 27 and 3.

    Raises:
      UserError: PySceneDetect isn't installed.
    """

    def __init__(self, detector: Detector, threshold: float | int | None = None):
        try:
            from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
        except ModuleNotFoundError as error:
            raise UserError(
                f"splitting at shot boundaries needs PySceneDetect ({error}); pip install -e '.[ingest]'"
            ) from error
        level = THRESHOLDS[detector] if threshold is None else float(threshold)
        self._detector: Any
        if detector == "content":
            self._detector = ContentDetector(threshold=level, min_scene_len=0)
        else:
            self._detector = AdaptiveDetector(adaptive_threshold=level, min_scene_len=0)
        self._timecode = FrameTimecode
        self._count = 0
        self.numbers: list[int] = []
        """Of the frames that begin a new shot."""

    def see(self, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """The next frame, RGB; all of one size."""
        # The rate turns numbers into times that nobody asks for.
        timecode = self._timecode(self._count, 25.0)
        found = self._detector.process_frame(timecode, np.ascontiguousarray(picture[..., ::-1]))
        self.numbers.extend(cut.frame_num for cut in found if cut.frame_num > 0)
        self._count += 1


class Span(NamedTuple):
    """Frames of a file that follow each other: from `first` up to, not including, `stop`."""

    first: int
    stop: int


def spans(cuts: Sequence[int], frames: int) -> tuple[Span, ...]:
    """The shots of a file of so many frames: each begins at 0 or at a cut."""
    begins = sorted({0, *cuts})
    return tuple(Span(first, stop) for first, stop in zip(begins, [*begins[1:], frames], strict=True))
