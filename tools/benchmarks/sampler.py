"""Speed of sampling against the forward passes that it consists of.

`steps` compares N sampling steps with N calls of the jitted forward pass. `guidance` compares evaluating both branches
at once with one after the other, for clips that fill a row each and for one clip in a row with room for both branches.
Times are medians over interleaved rounds. `compilations` counts the programs that are compiled for other prompts,
seeds, scales and numbers of steps, which should be 0. `first result` is the time of a process that loads the shipped
pipeline and samples one clip: without keeping programs, while keeping them, and with kept programs.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.settings import tokenize_bytes
from benchmarks.steps import count_compilations
from benchmarks.timer import time_median
from dit_video.core import rng
from dit_video.diffusion import Guidance, RectifiedFlow, Velocity
from dit_video.models.backbones.denoise import make_denoise_fn
from dit_video.models.backbones.dit import DiTConfig
from dit_video.models.conditioning import Conditioning, TextTokens
from dit_video.models.encoders import ByteEncoderConfig
from dit_video.nn import get_graph_def, init_params
from dit_video.sampling import Denoiser, Sampling, SamplingRequest, draw_initial_noise, sample_latents
from dit_video.tokens import (
    Grid,
    PackedExample,
    PackedShape,
    compute_positions,
    compute_token_grid,
    pack,
    patchify,
    stack_rows,
)

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class SamplingShape:
    """Shape of a model with random parameters and of the sampled clips; each fills a row."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    latents: Grid = Grid(5, 24, 32)
    channels: int = 16
    text_tokens: int = 64
    num_clips: int = 2
    """Number of clips that are sampled at once."""
    steps: int = 8


QUICKSTART = SamplingShape(width=176, layers=4, heads=4, latents=Grid(5, 12, 8), channels=8, num_clips=8, steps=32)
"""Shape of the shipped model, with rows of 120 tokens."""
SMALL = SamplingShape(
    width=16, layers=1, heads=2, latents=Grid(1, 4, 4), channels=2, text_tokens=16, num_clips=2, steps=3
)
"""Tiny shape, to try the command."""


class SamplingModel:
    """A denoiser with random parameters, and its sampling requests."""

    def __init__(self, shape: SamplingShape):
        self.shape, self.num_rows = shape, shape.num_clips
        text = ByteEncoderConfig(width=64, layers=1, heads=2, max_tokens=shape.text_tokens)
        self._config = DiTConfig(
            channels=shape.channels,
            context_width=text.width,
            patch=Grid(1, 2, 2),
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
        )
        self._text = text
        params = {
            "backbone": init_params(self._config.make, rng.key(0, "benchmark model")),
            "text": init_params(text.make, rng.key(0, "benchmark text")),
        }
        self.row_shape = PackedShape(tokens=self.num_tokens, text=2 * shape.text_tokens, segments=4)
        self.denoiser = Denoiser(
            backbone=get_graph_def(self._config.make),
            text=get_graph_def(text.make),
            params=params,
            tokenizer=lambda prompt: tokenize_bytes(text, prompt),
            process=RectifiedFlow(),
            patch=self._config.patch,
            prediction=Velocity(),
            token_dt=1.0,
            token_lead=0.0,
        )

    @property
    def num_tokens(self) -> int:
        return compute_token_grid(self.shape.latents, self._config.patch).volume

    def sample(self, sampling: Sampling, *, seed: int = 0, prompt: str = "a red circle") -> Any:
        """Sample as many clips as there are rows."""
        return self._sample(sampling, self.row_shape, self.num_rows, seed, prompt)

    def sample_one(self, sampling: Sampling) -> Any:
        """Sample one clip in a row with room for two."""
        return self._sample(sampling, replace(self.row_shape, tokens=2 * self.row_shape.tokens), 1, 0, "a red circle")

    def _sample(self, sampling: Sampling, row_shape: PackedShape, num_rows: int, seed: int, prompt: str) -> Any:
        noise = draw_initial_noise(seed, self.shape.latents, self.shape.channels)
        requests = [SamplingRequest(f"{prompt} {number}", "", noise, seed=seed) for number in range(num_rows)]
        return sample_latents(self.denoiser, requests, sampling=sampling, shape=row_shape, rows=num_rows)

    def make_forward(self) -> Callable[[], Any]:
        """Return a function that calls the denoiser on those rows. The text encoder, which runs once, is excluded."""
        shape, graph = self.shape, self.denoiser.backbone
        noise = draw_initial_noise(0, shape.latents, shape.channels)
        text = tokenize_bytes(self._text, "a red circle 0")
        positions = compute_positions(compute_token_grid(shape.latents, self._config.patch))
        example = PackedExample(patchify(noise, self._config.patch), positions, text, 0)
        packed = [pack([example], self.row_shape, width=example.tokens.shape[1])] * self.num_rows
        rows = jax.device_put(stack_rows(packed))
        context = nnx.merge(self.denoiser.text, self.denoiser.params["text"])(rows.text, rows.text_segments)

        @jax.jit
        def predict(params, noisy, time, values, segments):
            conditioning = Conditioning(TextTokens(values, segments))
            denoise = make_denoise_fn(nnx.merge(graph, params), rows.layout, conditioning)
            return denoise(noisy, jnp.full(noisy.shape[:2], time), None)[0]

        params, time = self.denoiser.params["backbone"], jnp.asarray(0.5)
        return lambda: jax.block_until_ready(predict(params, rows.tokens, time, context.values, context.segments))


def measure(shape: SamplingShape, rounds: int) -> dict[str, Any]:
    """Measure sampling with one model."""
    model = SamplingModel(shape)
    once = Sampling(steps=shape.steps, guidance=Guidance(scales={"text": 1.0}))
    forward = model.make_forward()

    def forwards() -> None:
        for _ in range(shape.steps):
            forward()

    batched = Sampling(steps=shape.steps, guidance=Guidance(scales={"text": 2.0}))
    sequential = replace(batched, branch_evaluation="apart")
    seconds = time_median(
        {
            "forwards": forwards,
            "steps": lambda: model.sample(once),
            "together": lambda: model.sample(batched),
            "apart": lambda: model.sample(sequential),
            "one clip, together": lambda: model.sample_one(batched),
            "one clip, apart": lambda: model.sample_one(sequential),
        },
        rounds,
    )
    figures = {
        "clips": shape.num_clips,
        "tokens": model.num_tokens,
        "width": shape.width,
        "steps": shape.steps,
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "steps_of_forwards": round(seconds["steps"] / seconds["forwards"], 3),
        "together_of_apart": round(seconds["together"] / seconds["apart"], 3),
        "one_clip_together_of_apart": round(seconds["one clip, together"] / seconds["one clip, apart"], 3),
        "compilations": count_recompilations(model, batched),
    }
    print(
        f"{shape.steps} steps take {figures['steps_of_forwards']} of the forward passes; batched guidance takes "
        f"{figures['together_of_apart']} of two passes, for one clip {figures['one_clip_together_of_apart']}",
        file=sys.stderr,
    )
    return figures


def count_recompilations(model: SamplingModel, sampling: Sampling) -> int:
    """Count the programs compiled for other prompts, seeds, scales and numbers of steps after a first sample."""
    model.sample(sampling)
    with count_compilations() as count:
        model.sample(sampling, seed=3)
        model.sample(sampling, prompt="a blue square moving up")
        model.sample(replace(sampling, guidance=Guidance(scales={"text": 4.5})))
        for steps in (1, sampling.steps + 5):
            model.sample(replace(sampling, steps=steps))
        return count()


_FIRST_RESULT_SCRIPT = """
import sys, time
began = time.perf_counter()
import dit_video
from dit_video.core.platform.compilation_cache import enable_compilation_cache
if sys.argv[2]:
    enable_compilation_cache()
pipeline = dit_video.load(sys.argv[1])
pipeline.generate("a red circle moving left")
print(time.perf_counter() - began)
"""


def measure_first_result(run: Path) -> dict[str, Any]:
    """Measure the seconds from a process's start to its first clip: import, load, compile, sample and decode."""
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}

        def start(keep: str) -> float:
            command = [sys.executable, "-c", _FIRST_RESULT_SCRIPT, str(run), keep]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return round(float(json.loads(done.stdout.strip().splitlines()[-1])), 2)

        seconds = {"without": start(""), "keeping": start("keep"), "kept": start("keep")}
    print(f"first result: {seconds}", file=sys.stderr)
    return seconds
