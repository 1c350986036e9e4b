"""Model FLOPs utilization of training on packed rows: the FLOPs that the model needs, against the peak of the device.

The tokens of a segment attend to each other only, so attention counts as the sum of `n_i²`. Padding and recomputation
in the backward pass do not count. `python tools/benchmark.py mfu` measures 1.6 billion parameters on one row of 32k
tokens in bfloat16, which needs a GPU; `--small` runs on any device.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.steps import compilations, peak_memory
from benchmarks.training import start, step_of
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.flops import attention_flops, training_flops, training_passes
from dit_video.core import rng
from dit_video.core.trees import size as count
from dit_video.distributed.planner import peak_flops
from dit_video.nn import Backend, graph_of, init_params
from dit_video.tokens import Grid, coordinates


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a model and of the row it is trained on."""

    width: int = 2048
    layers: int = 24
    heads: int = 16
    row: int = 32_768
    text: int = 96
    """Number of text tokens of each clip."""
    text_width: int = 4096
    clips: tuple[Grid, ...] = (
        Grid(13, 20, 32),
        Grid(13, 20, 24),
        Grid(5, 24, 40),
        Grid(3, 30, 52),
        Grid(2, 30, 52),
        Grid(1, 30, 52),
        Grid(1, 52, 30),
        Grid(1, 32, 32),
        Grid(1, 32, 32),
        Grid(1, 16, 16),
    )
    """Token grids of videos of up to 13 latent frames and of images, which leave 0.6 % of the row empty."""

    def config(self, attention: Backend) -> DitConfig:
        return DitConfig(
            channels=16,
            context_width=self.text_width,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            attention=attention,
            dtype="bfloat16",
            remat="full",
        )


SMALL = Shape(
    width=32, layers=2, heads=2, row=64, text=4, text_width=8, clips=(Grid(2, 4, 4), Grid(1, 4, 4), Grid(1, 2, 4))
)


def measure(shape: Shape, steps: int, attention: Backend, peak: float | None = None) -> dict[str, Any]:
    """Measure the seconds of a training step and its share of the device's peak (None if the peak is unknown)."""
    config = shape.config(attention)
    graph = graph_of(config.make)
    inputs = jax.device_put(_inputs(shape, config))

    def loss_fn(params: Any, inputs: dict[str, Any], target: jax.Array) -> jax.Array:
        prediction = nnx.merge(graph, params)(**inputs)
        return jnp.where(inputs["segments"][..., None] > 0, jnp.square(prediction - target), 0).mean()

    params = jax.jit(lambda key: init_params(config.make, key))(rng.key(0, "benchmark mfu"))
    parameters = count(params)
    target, step = jnp.ones_like(inputs["noisy"]), step_of(loss_fn)
    state = start(params)
    del params
    durations = []
    with compilations() as compiled:
        start_time = time.perf_counter()
        for _ in range(steps + 2):
            *state, loss = step(*state, inputs, target)
            jax.block_until_ready((state, loss))
            now = time.perf_counter()
            durations.append(now - start_time)
            start_time = now
        programs = compiled()
    seconds = statistics.median(durations[2:])
    clips = [clip.volume for clip in shape.clips]
    texts = [shape.text] * len(clips)
    flops = training_flops(config, clips, texts)
    peak = peak or peak_flops(jax.devices()[:1])
    return {
        "attention": attention,
        "parameters": parameters,
        "tokens": shape.row,
        "padding_share": round(1 - sum(clips) / shape.row, 4),
        "attention_share_of_flops": round(training_passes() * attention_flops(config, clips, texts) / flops, 4),
        "flops": flops,
        "steps": steps,
        "step_seconds": round(seconds, 4),
        "first_step_seconds": round(durations[0], 2),
        "compilations": programs,
        "tflops_per_second": round(flops / seconds / 1e12, 3),
        "peak_tflops_per_second": None if peak is None else peak / 1e12,
        "utilisation": None if peak is None else round(flops / seconds / peak, 4),
        "loss": float(loss),
        "peak_memory": peak_memory(),
    }


def _inputs(shape: Shape, config: DitConfig) -> dict[str, Any]:
    """Return the model's inputs for one row."""
    draw = rng.host(0, "benchmark mfu")
    number, used = len(shape.clips), sum(clip.volume for clip in shape.clips)
    segments, positions = np.zeros((1, shape.row), np.int32), np.zeros((1, shape.row, 3), np.float32)
    segments[0, :used] = np.repeat(np.arange(number) + 1, [clip.volume for clip in shape.clips])
    positions[0, :used] = np.concatenate([coordinates(clip) for clip in shape.clips])
    return {
        "noisy": draw.normal(size=(1, shape.row, config.token_width)).astype(np.float32),
        "time": np.linspace(0.05, 0.95, number, dtype=np.float32)[None],
        "segments": segments,
        "coordinates": positions,
        "context": draw.normal(size=(1, number * shape.text, shape.text_width)).astype(np.float32),
        "context_segments": np.repeat(np.arange(number) + 1, shape.text)[None].astype(np.int32),
    }
