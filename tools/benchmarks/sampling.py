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
import numpy as np
from flax import nnx

from benchmarks.setting import byte_tokens
from benchmarks.steps import compilations
from benchmarks.turns import in_turn
from dit_video.backbones.denoise import packed_denoise
from dit_video.backbones.dit import DitConfig
from dit_video.core import rng
from dit_video.diffusion import RectifiedFlow
from dit_video.generation import Denoiser, LatentRequest, Sampling, initial_noise, sample_latents
from dit_video.nn import graph_of, init_params
from dit_video.text import ByteEncoderConfig
from dit_video.tokens import Grid, Item, Rows, RowShape, coordinates, pack, patchify, token_grid

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of a model with random parameters and of the sampled clips, each of which fills a row."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    latents: Grid = Grid(5, 24, 32)
    channels: int = 16
    text: int = 64
    clips: int = 2
    """Number of clips that are sampled at once."""
    steps: int = 8


QUICKSTART = Shape(width=176, layers=4, heads=4, latents=Grid(5, 12, 8), channels=8, clips=8, steps=32)
"""Shape of the shipped model, with rows of 120 tokens."""
SMALL = Shape(width=16, layers=1, heads=2, latents=Grid(1, 4, 4), channels=2, text=16, clips=2, steps=3)
"""Tiny shape, to try the command."""


class Model:
    """A denoiser with random parameters, and its sampling requests."""

    def __init__(self, shape: Shape):
        self.shape, self.rows = shape, shape.clips
        text = ByteEncoderConfig(width=64, layers=1, heads=2, max_tokens=shape.text)
        self._config = DitConfig(
            channels=shape.channels,
            context_width=text.width,
            patch=Grid(1, 2, 2),
            width=shape.width,
            layers=shape.layers,
            heads=shape.heads,
        )
        self._text = text
        params = {
            "dit": init_params(self._config.make, rng.key(0, "benchmark model")),
            "text": init_params(text.make, rng.key(0, "benchmark text")),
        }
        self.row = RowShape(tokens=self.tokens, text=2 * shape.text, segments=4)
        self.denoiser = Denoiser(
            dit=graph_of(self._config.make),
            text=graph_of(text.make),
            params=params,
            tokenizer=lambda prompt: byte_tokens(text, prompt),
            process=RectifiedFlow(),
            patch=self._config.patch,
        )

    @property
    def tokens(self) -> int:
        return token_grid(self.shape.latents, self._config.patch).volume

    def sample(self, sampling: Sampling, *, seed: int = 0, prompt: str = "a red circle") -> Any:
        """Sample as many clips as there are rows."""
        return self._sample(sampling, self.row, self.rows, seed, prompt)

    def sample_one(self, sampling: Sampling) -> Any:
        """Sample one clip in a row with room for two."""
        return self._sample(sampling, replace(self.row, tokens=2 * self.row.tokens), 1, 0, "a red circle")

    def _sample(self, sampling: Sampling, row: RowShape, rows: int, seed: int, prompt: str) -> Any:
        noise = initial_noise(seed, self.shape.latents, self.shape.channels)
        requests = [LatentRequest(f"{prompt} {number}", "", noise, seed=seed) for number in range(rows)]
        return sample_latents(self.denoiser, requests, sampling=sampling, shape=row, rows=rows)

    def forward(self) -> Callable[[], Any]:
        """Return a function that calls the denoiser on those rows. The text encoder, which runs once, is excluded."""
        shape, graph = self.shape, self.denoiser.dit
        noise = initial_noise(0, shape.latents, shape.channels)
        text = byte_tokens(self._text, "a red circle 0")
        positions = coordinates(token_grid(shape.latents, self._config.patch))
        example = Item(patchify(noise, self._config.patch), positions, text, 0)
        packed = [pack([example], self.row, width=example.tokens.shape[1])] * self.rows
        rows = jax.device_put(Rows(*map(np.stack, zip(*packed, strict=True))))
        context = nnx.merge(self.denoiser.text, self.denoiser.params["text"])(rows.text, rows.text_segments)

        @jax.jit
        def predict(params, noisy, time, values, segments):
            denoise = packed_denoise(
                nnx.merge(graph, params),
                segments=rows.segments,
                coordinates=rows.coordinates,
                context=values,
                context_segments=segments,
                count=rows.examples.shape[1],
            )
            return denoise(noisy, jnp.full(noisy.shape[:2], time))

        params, time = self.denoiser.params["dit"], jnp.asarray(0.5)
        return lambda: jax.block_until_ready(predict(params, rows.tokens, time, context.values, context.segments))


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Measure sampling with one model."""
    model = Model(shape)
    once = Sampling(steps=shape.steps, guidance=1.0)
    forward = model.forward()

    def forwards() -> None:
        for _ in range(shape.steps):
            forward()

    batched = Sampling(steps=shape.steps, guidance=2.0)
    sequential = replace(batched, branches="apart")
    seconds = in_turn(
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
        "clips": shape.clips,
        "tokens": model.tokens,
        "width": shape.width,
        "steps": shape.steps,
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "steps_of_forwards": round(seconds["steps"] / seconds["forwards"], 3),
        "together_of_apart": round(seconds["together"] / seconds["apart"], 3),
        "one_clip_together_of_apart": round(seconds["one clip, together"] / seconds["one clip, apart"], 3),
        "compilations": compiled(model, batched),
    }
    print(
        f"{shape.steps} steps take {figures['steps_of_forwards']} of the forward passes; batched guidance takes "
        f"{figures['together_of_apart']} of two passes, for one clip {figures['one_clip_together_of_apart']}",
        file=sys.stderr,
    )
    return figures


def compiled(model: Model, sampling: Sampling) -> int:
    """Count the programs compiled for other prompts, seeds, scales and numbers of steps after a first sample."""
    model.sample(sampling)
    with compilations() as count:
        model.sample(sampling, seed=3)
        model.sample(sampling, prompt="a blue square moving up")
        model.sample(replace(sampling, guidance=4.5))
        for steps in (1, sampling.steps + 5):
            model.sample(replace(sampling, steps=steps))
        return count()


_FIRST = """
import sys, time
began = time.perf_counter()
import dit_video
from dit_video.platform.compilation_cache import keep_programs
if sys.argv[2]:
    keep_programs()
pipeline = dit_video.load(sys.argv[1])
pipeline.generate("a red circle moving left")
print(time.perf_counter() - began)
"""


def first_result(run: Path) -> dict[str, Any]:
    """Measure the seconds from a process's start to its first clip: import, load, compile, sample and decode."""
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}

        def start(keep: str) -> float:
            command = [sys.executable, "-c", _FIRST, str(run), keep]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return round(float(json.loads(done.stdout.strip().splitlines()[-1])), 2)

        seconds = {"without": start(""), "keeping": start("keep"), "kept": start("keep")}
    print(f"first result: {seconds}", file=sys.stderr)
    return seconds
