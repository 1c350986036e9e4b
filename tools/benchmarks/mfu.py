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

from benchmarks.steps import count_compilations, get_peak_memory
from benchmarks.train_step import init_train_state, make_train_step
from dit_video.backbones.dit import DitConfig
from dit_video.backbones.flops import count_attention_flops, count_training_flops, count_training_passes
from dit_video.conditioning import Conditioning, TextTokens
from dit_video.core import rng
from dit_video.core.trees import count_values as count
from dit_video.distributed.planner import get_peak_flops
from dit_video.nn import Backend, get_graph_def, init_params
from dit_video.tokens import Grid, PackedRows, compute_positions


@dataclass(frozen=True, kw_only=True)
class TrainingShape:
    """Shape of a model and of the row it is trained on."""

    width: int = 2048
    layers: int = 24
    heads: int = 16
    row_tokens: int = 32_768
    text_tokens: int = 96
    """Number of text tokens of each clip."""
    text_width: int = 4096
    clip_grids: tuple[Grid, ...] = (
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

    def make_config(self, attention: Backend) -> DitConfig:
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


SMALL = TrainingShape(
    width=32,
    layers=2,
    heads=2,
    row_tokens=64,
    text_tokens=4,
    text_width=8,
    clip_grids=(Grid(2, 4, 4), Grid(1, 4, 4), Grid(1, 2, 4)),
)


def measure(shape: TrainingShape, steps: int, attention: Backend, peak: float | None = None) -> dict[str, Any]:
    """Measure the seconds of a training step and its share of the device's peak (None if the peak is unknown)."""
    config = shape.make_config(attention)
    graph = get_graph_def(config.make)
    inputs = jax.device_put(_make_inputs(shape, config))

    def loss_fn(params: Any, inputs: dict[str, Any], target: jax.Array) -> jax.Array:
        prediction, _ = nnx.merge(graph, params)(**inputs)
        return jnp.where(inputs["layout"].segments[..., None] > 0, jnp.square(prediction - target), 0).mean()

    params = jax.jit(lambda key: init_params(config.make, key))(rng.key(0, "benchmark mfu"))
    parameters = count(params)
    target, step = jnp.ones_like(inputs["noisy"]), make_train_step(loss_fn)
    state = init_train_state(params)
    del params
    durations = []
    with count_compilations() as compiled:
        start_time = time.perf_counter()
        for _ in range(steps + 2):
            *state, loss = step(*state, inputs, target)
            jax.block_until_ready((state, loss))
            now = time.perf_counter()
            durations.append(now - start_time)
            start_time = now
        programs = compiled()
    seconds = statistics.median(durations[2:])
    clips = [clip.volume for clip in shape.clip_grids]
    texts = [shape.text_tokens] * len(clips)
    flops = count_training_flops(config, clips, texts)
    peak = peak or get_peak_flops(jax.devices()[:1])
    return {
        "attention": attention,
        "parameters": parameters,
        "tokens": shape.row_tokens,
        "padding_share": round(1 - sum(clips) / shape.row_tokens, 4),
        "attention_share_of_flops": round(
            count_training_passes() * count_attention_flops(config, clips, texts) / flops, 4
        ),
        "flops": flops,
        "steps": steps,
        "step_seconds": round(seconds, 4),
        "first_step_seconds": round(durations[0], 2),
        "compilations": programs,
        "tflops_per_second": round(flops / seconds / 1e12, 3),
        "peak_tflops_per_second": None if peak is None else peak / 1e12,
        "utilisation": None if peak is None else round(flops / seconds / peak, 4),
        "loss": float(loss),
        "peak_memory": get_peak_memory(),
    }


def _make_inputs(shape: TrainingShape, config: DitConfig) -> dict[str, Any]:
    """Return the model's inputs for one row."""
    draw = rng.make_generator(0, "benchmark mfu")
    number, used = len(shape.clip_grids), sum(clip.volume for clip in shape.clip_grids)
    segments, positions = np.zeros((1, shape.row_tokens), np.int32), np.zeros((1, shape.row_tokens, 3), np.float32)
    segments[0, :used] = np.repeat(np.arange(number) + 1, [clip.volume for clip in shape.clip_grids])
    positions[0, :used] = np.concatenate([compute_positions(clip) for clip in shape.clip_grids])
    noisy = draw.normal(size=(1, shape.row_tokens, config.token_width)).astype(np.float32)
    text = TextTokens(
        jnp.asarray(draw.normal(size=(1, number * shape.text_tokens, shape.text_width)), jnp.float32),
        jnp.repeat(jnp.arange(1, number + 1), shape.text_tokens)[None],
    )
    return {
        "noisy": noisy,
        "time": np.linspace(0.05, 0.95, number, dtype=np.float32)[None],
        "layout": PackedRows(segments=segments, positions=positions, count=number),
        "conditioning": Conditioning(text),
    }
