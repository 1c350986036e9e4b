"""Speed of training the denoiser from video files that are decoded and encoded on the fly, as rows and in buckets."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import get_resident_memory
from benchmarks.settings import Setting
from benchmarks.steps import TrainingSetup
from dit_video.core import rng
from dit_video.data.buckets import BatchMemory, BucketConfig
from dit_video.data.clips import ClipSource
from dit_video.data.ingest.engine import ingest
from dit_video.data.sources import Encode
from dit_video.distributed import count_row_shards, make_mesh
from dit_video.experiment import Run, input_pipeline
from dit_video.models.autoencoders import AutoencoderConfig, latent_grid
from dit_video.models.conditioning import IsKnown
from dit_video.nn import init_params
from dit_video.tokens import Grid
from dit_video.training import loop
from dit_video.training.hooks.hook import StepCall
from dit_video.training.hooks.logging import MetricsLog, read_metrics

_NUM_BUCKETS = 2
"""Number of bucket sizes, each of which compiles its own step."""


class TimedEncoder:
    """An encoder that adds up the seconds it takes."""

    def __init__(self, encode: Encode):
        self._encode, self.seconds = encode, 0.0

    def __call__(self, clips: Sequence[np.ndarray], masks: Sequence[IsKnown] | None = None, /) -> list[np.ndarray]:
        start_time = time.perf_counter()
        latents = self._encode(clips, masks)
        self.seconds += time.perf_counter() - start_time
        return latents


def encode_zeros(
    model: AutoencoderConfig, clips: Sequence[np.ndarray], masks: Sequence[IsKnown] | None = None
) -> list[np.ndarray]:
    """Return zeros instead of latents, which leaves the cost of reading, decoding, resizing and packing."""
    grids = [latent_grid(Grid(*clip.shape[:3]), model.stride) for clip in clips]
    return [np.zeros((*grid, model.channels), np.float32) for grid in grids]


def measure_online(setting: Setting, setup: TrainingSetup, clips: Path, steps: int) -> dict[str, Any]:
    """Measure the time of steps, the share of it spent waiting for data, and the share the encoder is busy.

    `encoded` is training as usual. `given` replaces latents by zeros, which cost nothing, so that the remaining wait is
    for reading and decoding. The autoencoder is untrained, which does not change its cost. `bytes` is the resident
    memory of the process at the end.
    """
    data = replace(setting.data, cache_latents=False, weights=(), clips_per_video=1, resolutions=(), flips=False)
    mesh = make_mesh(setting.parallel)
    rows = replace(setting, data=data).replace_stage("denoiser", buckets=None)
    # As many tokens per step as the rows have, so that both layouts are comparable.
    config = BucketConfig(
        memory=BatchMemory(fixed=0, per_token=1),
        budget=setting.model.row_shape.tokens * setting.denoiser.batch / count_row_shards(mesh),
        count=_NUM_BUCKETS,
    )
    buckets = rows.replace_stage("denoiser", buckets=config)
    model = setting.model.autoencoder
    figures: dict[str, Any] = {}
    params = init_params(model.make, rng.key(0, "benchmark"))
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        ingest(clips, Path(folder) / "data")
        source = ClipSource(Path(folder) / "data")
        for name, experiment in (("rows", rows), ("buckets", buckets)):
            run, figures[name] = Run(folder=Path(folder), experiment=experiment), {}
            for mode, encode in (
                ("encoded", input_pipeline.make_online_encoder(run, experiment.denoiser, params, source)),
                ("given", functools.partial(encode_zeros, model)),
            ):
                figures[name][mode], setup = _train(run, setup, source, TimedEncoder(encode), steps)
    return {"clips": len(source), "steps": steps, **figures}


def _train(
    run: Run, setup: TrainingSetup, source: ClipSource, encode: TimedEncoder, steps: int
) -> tuple[dict[str, Any], TrainingSetup]:
    """Train for twice the steps; new programs are compiled in the first half, and the second half is measured."""
    first, warmup_seconds = int(setup.state.step), [0.0]
    captions = input_pipeline.open_captions(run.open_text_encoder(), source)
    examples = input_pipeline.make_clip_examples(run, source, captions, encode)
    rows = input_pipeline.open_rows(run, run.experiment.denoiser, examples, source)(0)

    def record_warmup(done: int, _state: Any) -> None:
        if done == first + steps:
            warmup_seconds[0] = encode.seconds

    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder, contextlib.closing(rows):
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        state = loop.run(
            setup.step,
            setup.state,
            lambda _: map(setup.place_batch, rows),
            config=loop.LoopConfig(steps=first + 2 * steps, log_every=steps, save_every=1 << 30),
            hooks=[log, StepCall(record_warmup)],
            title="training from video files",
        )
        memory, entry = get_resident_memory(), read_metrics(log.path)[-1]
    figures = {
        "step_ms": round(1000 * entry["step_seconds"], 3),
        "waiting_share": round(entry["data_wait"], 4),
        "encoding_share": round((encode.seconds - warmup_seconds[0]) / (steps * entry["step_seconds"]), 4),
        "bytes": memory,
    }
    return figures, setup._replace(state=state)
