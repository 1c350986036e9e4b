"""Sampling beside the forward passes that it is made of.

`steps`: N steps beside N calls of the jitted forward. `guidance`: with both branches evaluated at once, beside one
after the other: of clips that fill a row each, and of one clip in a row with room for both branches. Times are medians
of rounds that run all of them in turn. `compilations` counts what is compiled for other prompts, seeds, scales and
numbers of steps, which should be nothing. `first result` is the time of a process that loads the shipped pipeline and
samples one clip, where no program was kept, and where the one before it kept them.
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
    """A model with random parameters, and the clips that are sampled: each fills a row."""

    width: int = 384
    layers: int = 6
    heads: int = 6
    latents: Grid = Grid(5, 24, 32)
    channels: int = 16
    text: int = 64
    clips: int = 2
    """that are sampled at once"""
    steps: int = 8


QUICKSTART = Shape(width=176, layers=4, heads=4, latents=Grid(5, 12, 8), channels=8, clips=8, steps=32)
"""of the sizes of the shipped model, with rows of 120 tokens"""
SMALL = Shape(width=16, layers=1, heads=2, latents=Grid(1, 4, 4), channels=2, text=16, clips=2, steps=3)
"""to try the command with"""


class Model:
    """A denoiser, and requests for it."""

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
        """As many clips as there are rows."""
        return self._sample(sampling, self.row, self.rows, seed, prompt)

    def sample_one(self, sampling: Sampling) -> Any:
        """One clip, in a row with room for two."""
        return self._sample(sampling, replace(self.row, tokens=2 * self.row.tokens), 1, 0, "a red circle")

    def _sample(self, sampling: Sampling, row: RowShape, rows: int, seed: int, prompt: str) -> Any:
        noise = initial_noise(seed, self.shape.latents, self.shape.channels)
        requests = [LatentRequest(f"{prompt} {number}", "", noise, seed=seed) for number in range(rows)]
        return sample_latents(self.denoiser, requests, sampling=sampling, shape=row, rows=rows)

    def forward(self) -> Callable[[], Any]:
        """One call of the model on those rows, its text encoder left out as it runs once a sample."""
        shape, graph = self.shape, self.denoiser.dit
        noise = initial_noise(0, shape.latents, shape.channels)
        text = byte_tokens(self._text, "a red circle 0")
        places = coordinates(token_grid(shape.latents, self._config.patch))
        item = Item(patchify(noise, self._config.patch), places, text, 0)
        packed = [pack([item], self.row, width=item.tokens.shape[1])] * self.rows
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
    """Of one model."""
    model = Model(shape)
    once = Sampling(steps=shape.steps, guidance=1.0)
    forward = model.forward()

    def forwards() -> None:
        for _ in range(shape.steps):
            forward()

    together = Sampling(steps=shape.steps, guidance=2.0)
    apart = replace(together, branches="apart")
    seconds = in_turn(
        {
            "forwards": forwards,
            "steps": lambda: model.sample(once),
            "together": lambda: model.sample(together),
            "apart": lambda: model.sample(apart),
            "one clip, together": lambda: model.sample_one(together),
            "one clip, apart": lambda: model.sample_one(apart),
        },
        rounds,
    )
    found = {
        "clips": shape.clips,
        "tokens": model.tokens,
        "width": shape.width,
        "steps": shape.steps,
        "rounds": rounds,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "steps_of_forwards": round(seconds["steps"] / seconds["forwards"], 3),
        "together_of_apart": round(seconds["together"] / seconds["apart"], 3),
        "one_clip_together_of_apart": round(seconds["one clip, together"] / seconds["one clip, apart"], 3),
        "compilations": compiled(model, together),
    }
    print(
        f"{shape.steps} steps {found['steps_of_forwards']} of the forwards; guidance at once "
        f"{found['together_of_apart']} of two passes, of one clip {found['one_clip_together_of_apart']}",
        file=sys.stderr,
    )
    return found


def compiled(model: Model, sampling: Sampling) -> int:
    """Programs for other prompts, seeds, scales and numbers of steps, once one of each was sampled."""
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
    """Seconds from the start of a process to its first clip: importing, loading, compiling, sampling, decoding."""
    with tempfile.TemporaryDirectory(prefix="dit-video-benchmark-") as folder:
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        environment |= {"XDG_CACHE_HOME": folder, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}

        def start(keep: str) -> float:
            command = [sys.executable, "-c", _FIRST, str(run), keep]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(done.stderr)
            return round(float(json.loads(done.stdout.strip().splitlines()[-1])), 2)

        found = {"without": start(""), "keeping": start("keep"), "kept": start("keep")}
    print(f"first result: {found}", file=sys.stderr)
    return found
