"""Hours of 480p video that ingest takes in a day on this machine, by stream copy and encoded again."""

import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dit_video.core.resize import resize
from dit_video.curation.screening import ScreeningConfig
from dit_video.data.ingest.engine import IngestConfig, ingest
from dit_video.data.ingest.reencoder import ReencodeConfig
from dit_video.scenes.edits import render_edited
from dit_video.video.encode import encode_frames

FPS, HEIGHT, WIDTH = 24.0, 480, 854
COPIES = 10
"""Copies of every video, as they take longer to render than to ingest, and processes take seconds to start."""
MAX_PIXELS = 360 * 640
"""Pixels of a frame that is encoded again."""


def measure(videos: int, workers: int | None = None) -> dict[str, Any]:
    """Return hours of video a day: files are decoded, split at shots, and their clips copied or encoded.

    `copy` copies all clips, `default` those alone that begin near a key frame, and `encode` none.
    """
    workers = workers or min(2, os.cpu_count() or 1)
    screening = ScreeningConfig(shots="gradual")
    figures: dict[str, Any] = {"videos": COPIES * videos, "workers": workers}
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        seconds = write_videos(Path(folder) / "clips", videos)
        figures["seconds_of_video"] = round(seconds, 1)
        configs = {
            "copy": IngestConfig(screening=screening, max_lead_in=1e9),
            "default": IngestConfig(screening=screening),
            "encode": IngestConfig(screening=screening, reencode=ReencodeConfig(max_pixels=MAX_PIXELS)),
        }
        for name, config in configs.items():
            print(f"timing ingest: {name}", file=sys.stderr)
            start = time.perf_counter()
            report = ingest(Path(folder) / "clips", Path(folder) / name, config=config, workers=workers)
            figures[f"{name}_hours_per_day"] = round(24 * seconds / (time.perf_counter() - start))
            figures[f"{name}_methods"] = dict(report.methods)
    return figures


def write_videos(folder: Path, count: int) -> float:
    """Write copies of edited videos with the noise of cameras, and return the duration of all in seconds."""
    folder.mkdir(parents=True)
    frames = 0
    for index in range(count):
        pictures = render_edited(index, seed=4, shots=3, height=90, width=160, fps=FPS).frames
        noise = np.random.default_rng(index).integers(-4, 5, (HEIGHT, WIDTH, 1))
        shots = [
            np.clip(resize(part, HEIGHT, WIDTH) + np.roll(noise, number, axis=0), 0, 255).astype(np.uint8)
            for number, part in enumerate(pictures[:, None])
        ]
        frames += len(pictures)
        content = encode_frames(np.concatenate(shots), FPS, "mp4", crf=23)
        for copy in range(COPIES):
            (folder / f"{index:03}-{copy:03}.mp4").write_bytes(content)
        print(f"video {index + 1} of {count}", file=sys.stderr)
    return COPIES * frames / FPS
