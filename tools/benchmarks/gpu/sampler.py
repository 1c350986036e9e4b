"""Sampling of clips of the shape of Wan 2.1 T2V 1.3B, decoded by Wan's autoencoder, with random weights and texts."""

import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.gpu.figures import DETAILS, Case, Figure
from benchmarks.gpu.models import draw_values
from benchmarks.steps import get_peak_memory
from benchmarks.timer import TimeBudget
from dit_video.core import rng
from dit_video.diffusion import Guidance, RectifiedFlow, Velocity
from dit_video.models.autoencoders import CausalVaeConfig, decode_stream, latent_grid
from dit_video.models.backbones.wan import WanDitConfig
from dit_video.models.encoders import FrozenTextConfig
from dit_video.nn import get_graph_def, init_params
from dit_video.sampling import Denoiser, Sampling, SamplingRequest, draw_initial_noise, sample_latents
from dit_video.tokens import Grid, PackedShape, compute_token_grid


@dataclass(frozen=True, kw_only=True)
class SamplingSize:
    """Models and clip."""

    model: WanDitConfig = field(default_factory=lambda: WanDitConfig.t2v_1_3b(dtype="bfloat16"))
    autoencoder: CausalVaeConfig = field(default_factory=lambda: CausalVaeConfig(bfloat16=True))
    clip: Grid = Grid(81, 480, 832)
    """Frames, height and width in pixels."""
    steps: int = 50
    guidance: float = 5.0


FULL = SamplingSize()
SMALL = SamplingSize(
    model=WanDitConfig(width=24, mlp_dim=32, layers=1, heads=2, context_width=8, text_length=8, dtype="bfloat16"),
    autoencoder=CausalVaeConfig(width=4, multipliers=(1, 1, 1, 1), blocks=1, bfloat16=True),
    clip=Grid(5, 32, 32),
    steps=2,
)
_NAME = "Wan 1.3B, 81x480x832, 50 guided steps"
_FIGURES = (
    Figure(name=f"{_NAME}: seconds a clip, with decoding", unit="s"),
    Figure(name=f"{_NAME}: seconds of decoding", unit="s"),
    Figure(name=f"{_NAME}: peak memory", unit="GiB"),
)


def list_cases(size: SamplingSize) -> list[Case]:
    """Return the case."""
    return [Case(name="sampling", figures=_FIGURES, measure=functools.partial(measure, size))]


def make_denoiser(config: WanDitConfig) -> Denoiser:
    """Return a denoiser with random weights; its prompts are random embeddings of as many tokens as it takes."""
    text = FrozenTextConfig(folder="random", width=config.context_width)
    shape = config.text_length, config.context_width
    backbone = init_params(config.make, rng.key(0, "gpu benchmark denoiser"))
    return Denoiser(
        backbone=get_graph_def(config.make),
        text=get_graph_def(text.make),
        params={"backbone": backbone, "text": {}},
        tokenizer=lambda prompt: draw_values(shape[0] * shape[1]).reshape(shape),
        process=RectifiedFlow(shift=3.0),
        patch=config.patch,
        prediction=Velocity(),
        token_dt=1.0,
        token_lead=0.0,
    )


def measure(size: SamplingSize, budget: TimeBudget) -> Iterator[tuple[str, Any]]:
    """Yield the figures; programs are compiled before, by a sample of one step and its decoding."""
    model, autoencoder = size.model, size.autoencoder
    latents = latent_grid(size.clip, autoencoder.stride)
    denoiser = make_denoiser(model)
    params = init_params(autoencoder.make, rng.key(0, "gpu benchmark autoencoder"))
    tokens = compute_token_grid(latents, model.patch).volume
    row_shape = PackedShape(tokens=-(-tokens // 128) * 128, text=2 * model.text_length, segments=1)
    request = SamplingRequest("a prompt", "", draw_initial_noise(0, latents, model.channels))

    def generate(steps: int) -> tuple[float, float]:
        sampling = Sampling(steps=steps, guidance=Guidance(scales={"text": size.guidance}), branch_evaluation="apart")
        start = time.perf_counter()
        (result,) = sample_latents(denoiser, [request], sampling=sampling, shape=row_shape, rows=1)
        sampled = time.perf_counter()
        frames = sum(each.shape[1] for each in decode_stream(autoencoder, params, [np.asarray(result)[None]]))
        assert frames == size.clip.t
        return time.perf_counter() - start, time.perf_counter() - sampled

    first = generate(1)
    yield DETAILS, {"first clip, of one step": first, "clip": list(size.clip), "steps": size.steps}
    budget.check()
    total, decoding = generate(size.steps)
    memory = get_peak_memory()
    yield DETAILS, {"tokens": tokens, "memory": memory}
    for figure, value in zip(_FIGURES, (total, decoding, memory["bytes"] / 2**30), strict=True):
        yield figure.name, value
