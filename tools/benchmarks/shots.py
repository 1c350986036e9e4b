"""Detection of transitions in edited videos whose truth is known, by each detector, after encoding to H.264."""

import sys
import time
from typing import Any

import av
import numpy as np

from dit_video.curation.measures import ThumbnailMaker
from dit_video.curation.shots import HEIGHT, WIDTH, CutDetector, DetectorName
from dit_video.scenes.edits import KINDS, DetectionScore, render_edited, score_transitions
from dit_video.video import probe
from dit_video.video.encode import encode_frames

DETECTORS: tuple[DetectorName, ...] = ("gradual", "content", "adaptive")
RATES = (24.0, 30.0, 12.0, 25.0)
"""Frames per second of the videos, in turn."""
VIDEO_HEIGHT, VIDEO_WIDTH = 90, 160


def measure(videos: int, *, seed: int = 3) -> dict[str, Any]:
    """Return F1 and the recall of every kind of transition, for each detector, and its seconds per frame."""
    scores = {name: DetectionScore({}, {}, 0) for name in DETECTORS}
    seconds, frames = dict.fromkeys(DETECTORS, 0.0), 0
    for index in range(videos):
        video = render_edited(index, seed=seed, fps=RATES[index % len(RATES)], height=VIDEO_HEIGHT, width=VIDEO_WIDTH)
        content = encode_frames(video.frames, video.fps, "mp4", crf=26)
        frames += len(video.frames)
        for name in DETECTORS:
            pictures = make_pictures(content, name)
            start, detector = time.process_time(), CutDetector(name)
            for picture in pictures:
                detector.add_frame(picture)
            score = score_transitions(detector.find_transitions(), video.transitions)
            seconds[name] += time.process_time() - start
            scores[name] = scores[name].combine(score)
        print(f"video {index + 1} of {videos}", file=sys.stderr)
    return {"videos": videos, "frames": frames} | {
        name: _describe(score) | {"ms_per_frame": round(1000 * seconds[name] / frames, 3)}
        for name, score in scores.items()
    }


def make_pictures(content: bytes, detector: DetectorName) -> list[np.ndarray]:
    """Return the pictures of a file's frames that an ingest gives to a detector."""
    maker, pictures = ThumbnailMaker("edited video"), list[np.ndarray]()

    def add_frame(_: float, frame: av.VideoFrame) -> None:
        is_tiny = detector == "gradual"
        pictures.append(maker.make_tiny_picture(frame, HEIGHT, WIDTH) if is_tiny else maker.make_thumbnail(frame))

    probe(content, on_frame=add_frame, is_exact=False)
    return pictures


def _describe(score: DetectionScore) -> dict[str, Any]:
    totals = {kind: score.hits.get(kind, 0) + score.misses.get(kind, 0) for kind in KINDS}
    recall = {kind: round(score.hits.get(kind, 0) / total, 3) for kind, total in totals.items() if total}
    return {"f1": round(score.f1, 3), "recall": recall, "transitions": totals, "false_alarms": score.false_alarms}
