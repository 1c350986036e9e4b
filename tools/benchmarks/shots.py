"""Detection of transitions in edited videos whose truth is known, by each detector, after encoding to H.264."""

import sys
import time
from typing import Any

from dit_video.data.synthetic.edits import KINDS, DetectionScore, render_edited, score_transitions
from dit_video.video import probe
from dit_video.video.analysis.shots import CutDetector, DetectorName
from dit_video.video.analysis.thumbnails import ThumbnailMaker
from dit_video.video.encode import encode_frames

DETECTORS: tuple[DetectorName, ...] = ("gradual", "content", "adaptive")
RATES = (24.0, 30.0, 12.0, 25.0)
"""Frames per second of the videos, in turn."""
HEIGHT, WIDTH = 90, 160


def measure(videos: int, *, seed: int = 3) -> dict[str, Any]:
    """Return F1 and the recall of every kind of transition, for each detector, and its seconds per frame."""
    scores = {name: DetectionScore({}, {}, 0) for name in DETECTORS}
    seconds, frames = dict.fromkeys(DETECTORS, 0.0), 0
    for index in range(videos):
        video = render_edited(index, seed=seed, fps=RATES[index % len(RATES)], height=HEIGHT, width=WIDTH)
        thumbnails = make_thumbnails(encode_frames(video.frames, video.fps, "mp4", crf=26))
        frames += len(thumbnails)
        for name in DETECTORS:
            start, detector = time.process_time(), CutDetector(name)
            for thumbnail in thumbnails:
                detector.add_frame(thumbnail)
            score = score_transitions(detector.find_transitions(), video.transitions)
            seconds[name] += time.process_time() - start
            scores[name] = scores[name].combine(score)
        print(f"video {index + 1} of {videos}", file=sys.stderr)
    return {"videos": videos, "frames": frames} | {
        name: _describe(score) | {"ms_per_frame": round(1000 * seconds[name] / frames, 3)}
        for name, score in scores.items()
    }


def make_thumbnails(content: bytes) -> list:
    """Return the thumbnails of a file's frames."""
    maker, thumbnails = ThumbnailMaker("edited video"), []
    probe(content, on_frame=lambda _, frame: thumbnails.append(maker.make_thumbnail(frame)))
    return thumbnails


def _describe(score: DetectionScore) -> dict[str, Any]:
    totals = {kind: score.hits.get(kind, 0) + score.misses.get(kind, 0) for kind in KINDS}
    recall = {kind: round(score.hits.get(kind, 0) / total, 3) for kind, total in totals.items() if total}
    return {"f1": round(score.f1, 3), "recall": recall, "transitions": totals, "false_alarms": score.false_alarms}
