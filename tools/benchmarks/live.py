"""Training the denoiser from video files, which are decoded and encoded beside it: as packed rows, and in buckets."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import resident
from benchmarks.setting import Setting
from benchmarks.steps import Trained
from dit_video.autoencoders import AutoencoderConfig, latent_grid
from dit_video.core import rng
from dit_video.data.bucketing.batches import BucketConfig
from dit_video.data.bucketing.buckets import Memory
from dit_video.data.captions import TokenizedTexts
from dit_video.data.clips import ClipSource
from dit_video.data.ingest import ingest
from dit_video.data.packing.rows import Encode
from dit_video.experiment import input_pipeline
from dit_video.nn import init_params
from dit_video.tokens import Grid
from dit_video.training import loop
from dit_video.training.hooks.logging import MetricsLog, read

_BUCKETS = 2
"""Sizes, each of which compiles a step of its own."""


class Timed:
    """An encoder, and the seconds that it took."""

    def __init__(self, encode: Encode):
        self._encode, self.seconds = encode, 0.0

    def __call__(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        began = time.perf_counter()
        latents = self._encode(clips)
        self.seconds += time.perf_counter() - began
        return latents


def zeros(model: AutoencoderConfig, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
    """In place of latents: what is left is reading, decoding, resizing and packing."""
    grids = [latent_grid(Grid(*clip.shape[:3]), model.stride) for clip in clips]
    return [np.zeros((*grid, model.channels), np.float32) for grid in grids]


def measure_live(setting: Setting, trained: Trained, clips: Path, steps: int) -> dict[str, Any]:
    """How long steps take, what part of that they wait, and how much of the time the encoder is at work.

    `encoded` is training as it is. `given` are the same clips with zeros for latents, which cost nothing: what steps
    wait then, they wait for data. The autoencoder is an untrained one, which costs the same. `bytes` is all that the
    process holds in the end.
    """
    data = replace(setting.data, cache_latents=False, weights=(), stretches=1, resolutions=(), flips=False)
    rows = replace(setting, data=data, denoiser=replace(setting.denoiser, buckets=None))
    # As many tokens a step as the rows have.
    config = BucketConfig(
        memory=Memory(fixed=0, per_token=1),
        budget=setting.denoiser.rows.tokens * setting.denoiser.batch / input_pipeline.parts(rows),
        count=_BUCKETS,
    )
    buckets = replace(rows, denoiser=replace(rows.denoiser, buckets=config))
    model, found = setting.autoencoder.model, {}
    params = init_params(model.make, rng.key(0, "benchmark"))
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        ingest(clips, Path(folder) / "data")
        source = ClipSource(Path(folder) / "data")
        for name, experiment in (("rows", rows), ("buckets", buckets)):
            found[name] = {}
            for how, encode in (
                ("encoded", input_pipeline.live_encoder(experiment, params, source)),
                ("given", functools.partial(zeros, model)),
            ):
                found[name][how], trained = _train(experiment, trained, source, Timed(encode), steps)
    return {"clips": len(source), "steps": steps, **found}


def _train(
    experiment: Setting, trained: Trained, source: ClipSource, encode: Timed, steps: int
) -> tuple[dict[str, Any], Trained]:
    """Twice the steps: in the first half what is new is compiled, the second one is measured."""
    first, spent = int(trained.state.step), [0.0]
    texts = TokenizedTexts([info.captions for info in source.infos], experiment.denoiser.text.tokenizer())
    batches = input_pipeline.live(experiment, source, texts, encode)(0)

    def note(done: int, _state: Any) -> None:
        if done == first + steps:
            spent[0] = encode.seconds

    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder, contextlib.closing(batches):
        log = MetricsLog(Path(folder) / "metrics.jsonl")
        state = loop.run(
            trained.step,
            trained.state,
            lambda _: map(trained.place, batches),
            config=loop.LoopConfig(steps=first + 2 * steps, log_every=steps, save_every=1 << 30),
            log=log,
            title="training from video files",
            on_step=note,
        )
        held, entry = resident(), read(log.path)[-1]
    figures = {
        "step_ms": round(1000 * entry["step_seconds"], 3),
        "waiting_share": round(entry["data_wait"], 4),
        "encoding_share": round((encode.seconds - spent[0]) / (steps * entry["step_seconds"]), 4),
        "bytes": held,
    }
    return figures, trained._replace(state=state)
