"""Shot boundaries in the frames that PyAV decodes: by our detector of transitions, or by PySceneDetect's of cuts.

The detectors receive frames one by one and return frame numbers, so that times are PyAV's, whatever the file's frame
rate. PySceneDetect's own minimum length is disabled: it would join a short shot to its neighbour, and the clip would
contain a cut.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from dit_video.core.errors import UserError
from dit_video.curation.transitions import HEIGHT, WIDTH, Span, detect_transitions

DetectorName = Literal["gradual", "content", "adaptive"]
DEFAULT_THRESHOLDS: dict[DetectorName, float] = {"content": 27.0, "adaptive": 3.0, "gradual": 1.0}
"""Default thresholds: those of PySceneDetect, and for "gradual" a factor of the changes that count."""


class CutDetector:
    """A detector of cuts in a stream of frames.

    Args:
      detector: "gradual" detects cuts, dissolves and fades (`dit_video.curation.transitions`). "content" compares
        neighbouring frames: a cut is where hue, saturation and lightness (0..255) change by `threshold` or more on
        average. "adaptive" requires a change of 15 or more that is `threshold` times as large as in the two frames on
        each side, so that fast motion is not a cut.
      threshold: threshold of the detector; by default PySceneDetect's, 27 and 3, and for "gradual" 1, a factor of the
        minimum change.

    Raises:
      UserError: PySceneDetect, or the OpenCV that it brings, is not installed.
    """

    def __init__(self, detector: DetectorName, threshold: float | int | None = None):
        try:
            import cv2
            from scenedetect import AdaptiveDetector, ContentDetector, FrameTimecode
        except ModuleNotFoundError as error:
            raise UserError(f"shot boundaries need PySceneDetect ({error}); run pip install -e '.[ingest]'") from error
        self._threshold = DEFAULT_THRESHOLDS[detector] if threshold is None else float(threshold)
        self._detector: Any = None
        if detector == "content":
            self._detector = ContentDetector(threshold=self._threshold, min_scene_len=0)
        elif detector == "adaptive":
            self._detector = AdaptiveDetector(adaptive_threshold=self._threshold, min_scene_len=0)
        self._timecode, self._opencv = FrameTimecode, cv2
        self._count = 0
        self._cuts: list[int] = []
        self._pictures: list[UInt8[np.ndarray, f"{HEIGHT} {WIDTH} 3"]] = []

    def add_frame(self, frame: UInt8[np.ndarray, "h w 3"]) -> None:
        """Add the next frame, RGB; 432 bytes of it are kept at most.

        "gradual" shrinks it to `HEIGHT` by `WIDTH` pixels; `ThumbnailMaker` makes such pictures faster than others.
        """
        if self._detector is None:
            if frame.shape[:2] != (HEIGHT, WIDTH):
                frame = self._opencv.resize(frame, (WIDTH, HEIGHT), interpolation=self._opencv.INTER_AREA)
            self._pictures.append(frame)
            return
        # PySceneDetect requires a frame rate to compute times; only frame numbers are used here, so any rate will do.
        timecode = self._timecode(self._count, 25.0)
        cuts = self._detector.process_frame(timecode, np.ascontiguousarray(frame[..., ::-1]))
        self._cuts.extend(cut.frame_num for cut in cuts if cut.frame_num > 0)
        self._count += 1

    def find_transitions(self) -> tuple[Span, ...]:
        """Return the transitions in order: the frames that belong to no shot, and an empty span for a cut."""
        if self._detector is None and self._pictures:
            return detect_transitions(np.stack(self._pictures), self._threshold)
        return tuple(Span(cut, cut) for cut in self._cuts)


def split_at_transitions(transitions: Sequence[Span], frames: int) -> tuple[Span, ...]:
    """Return the shots of a file with this many frames: what is between its transitions."""
    starts = [0, *(stop for _, stop in sorted(transitions))]
    stops = [*(first for first, _ in sorted(transitions)), frames]
    spans = (Span(first, stop) for first, stop in zip(starts, stops, strict=True))
    return tuple(span for span in spans if span.first < span.stop)
