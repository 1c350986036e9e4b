"""Videos from prompts: requests of any size packed into rows, sampled together.

Rows have the shape that the model was trained on, so that one compiled program serves every size, prompt, seed and
scale of guidance. Another number of steps, or of rows, is compiled anew, and so is sampling without guidance.

A model may have two experts (Wan 2.2, arXiv 2503.20314): one for the noisy times, one for those below a boundary. They
sample one after the other, and only the one at work is handed to the devices.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32

from dit_video.diffusion import Euler, Even, Process, Sampler, SampleTimes, TimeGrid, advance, classifier_free
from dit_video.dit import packed_denoise
from dit_video.errors import UserError
from dit_video.generation.given import GivenClip, GivenRows, given_rows
from dit_video.rng import key
from dit_video.text import TextTokens, Tokenizer
from dit_video.tokens import (
    Grid,
    Item,
    Rows,
    RowShape,
    coordinates,
    empty_row,
    pack,
    patchify,
    token_grid,
    unpack,
    unpatchify,
)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn.

    Raises:
      UserError: less than one step.
    """

    steps: int = 32
    guidance: float | tuple[float, float] = 2.0
    """classifier-free guidance; 1 is none. Of two experts each may have its own, that of the noisy times first."""
    solver: Sampler = Euler()
    grid: TimeGrid = Even()

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling takes at least 1 step, not {self.steps}")


class LatentRequest(NamedTuple):
    """One video to be made."""

    prompt: str
    negative: str
    """what the unconditional branch of guidance is given; empty for nothing"""
    noise: Float32[np.ndarray, "t h w c"]
    """the starting point; its size is the size of the result"""
    given: GivenClip = GivenClip()


class Denoiser(NamedTuple):
    """A trained denoiser with all that sampling needs to know of it."""

    dit: nnx.GraphDef
    text: nnx.GraphDef
    params: dict[str, Any]
    """`{"dit": ..., "text": ...}`, and of two experts `"low_noise"`, which has the structure of `"dit"`"""
    tokenizer: Tokenizer
    process: Process
    patch: Grid
    boundary: float | None = None
    """of two experts: at times below it `low_noise` denoises"""
    interval: float = 1.0
    """of two tokens along time, in what coordinates count"""


def initial_noise(seed: int, latents: Grid, channels: int) -> Float32[np.ndarray, "t h w c"]:
    """Standard normal noise: a function of the seed and the size."""
    return np.asarray(jax.random.normal(key(seed, "sample"), (*latents, channels), jnp.float32))


def sample_latents(
    denoiser: Denoiser, requests: Sequence[LatentRequest], *, sampling: Sampling, shape: RowShape, rows: int
) -> list[Float32[np.ndarray, "t h w c"]]:
    """Latents of every request, in order.

    Requests are packed into rows of `shape` and sampled `rows` rows at a time; one that is larger than a row gets a row
    of its own, for which a program is compiled. A result does not depend on what else is asked for.

    Raises:
      UserError: a size that the patch does not divide, a prompt longer than a row's text, or two scales of guidance for
        one model.
    """
    grids = [token_grid(Grid(*request.noise.shape[:3]), denoiser.patch) for request in requests]
    prompts = dict.fromkeys(text for request in requests for text in (request.prompt, request.negative))
    texts = {text: denoiser.tokenizer(text) for text in prompts}
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    for group_shape, packed in _plan(requests, grids, texts, shape).items():
        for start in range(0, len(packed), rows):
            part = packed[start : start + rows]
            sampled = _sample_rows(denoiser, part, requests, grids, texts, sampling, group_shape, rows)
            for members, latents in zip(part, sampled, strict=True):
                for index, tokens in zip(members, latents, strict=True):
                    results[index] = unpatchify(tokens, grids[index], denoiser.patch)
    return [results[index] for index in range(len(requests))]


def _plan(
    requests: Sequence[LatentRequest], grids: Sequence[Grid], texts: Mapping[str, TextTokens], shape: RowShape
) -> dict[RowShape, list[list[int]]]:
    """Rows of request numbers by row shape: first fit of the largest first."""
    text = [max(len(texts[request.prompt]), len(texts[request.negative])) for request in requests]
    plan: dict[RowShape, list[list[int]]] = {}
    used: list[list[int]] = []
    for index in sorted(range(len(requests)), key=lambda index: -grids[index].volume):
        if text[index] > shape.text:
            raise UserError(
                f"a prompt of {text[index]} text tokens is longer than a row's {shape.text}; shorten the prompt"
            )
        if grids[index].volume > shape.tokens:
            alone = RowShape(tokens=grids[index].volume, text=shape.text, segments=shape.segments)
            plan.setdefault(alone, []).append([index])
            continue
        for row, room in zip(plan.setdefault(shape, []), used, strict=True):
            fits = room[0] + grids[index].volume <= shape.tokens and room[1] + text[index] <= shape.text
            if fits and len(row) < shape.segments:
                break
        else:
            row, room = [], [0, 0]
            plan[shape].append(row)
            used.append(room)
        row.append(index)
        room[0] += grids[index].volume
        room[1] += text[index]
    return plan


def _sample_rows(
    denoiser: Denoiser,
    members: Sequence[Sequence[int]],
    requests: Sequence[LatentRequest],
    grids: Sequence[Grid],
    texts: Mapping[str, TextTokens],
    sampling: Sampling,
    shape: RowShape,
    rows: int,
) -> list[list[Float32[np.ndarray, "n p"]]]:
    """The tokens of each row's requests. Rows of padding fill up the batch, so that its shape is always the same."""

    def packed(prompt_of) -> Rows:
        items = [
            [
                Item(
                    patchify(requests[index].noise, denoiser.patch),
                    coordinates(grids[index], step=(denoiser.interval, 1.0, 1.0)),
                    texts[prompt_of(requests[index])],
                    index,
                )
                for index in row
            ]
            for row in members
        ]
        first = items[0][0]
        widths = {"width": first.tokens.shape[1], "text_width": first.text.shape[1] if first.text.ndim == 2 else 0}
        full = [pack(row, shape, **widths) for row in items]
        full += [empty_row(shape, **widths)] * (rows - len(full))
        return Rows(*map(np.stack, zip(*full, strict=True)))

    conditional, unconditional = packed(lambda request: request.prompt), packed(lambda request: request.negative)
    clips = [
        [(request.given, Grid(*request.noise.shape[:3]), request.noise.shape[3]) for request in row]
        for row in ([requests[index] for index in row] for row in members)
    ]
    given = given_rows(clips, patch=denoiser.patch, shape=shape, rows=rows)
    tokens = np.asarray(_sampled(denoiser, conditional, unconditional, given, sampling))
    return [unpack(tokens[number], np.asarray(conditional.segments[number])) for number in range(len(members))]


def _sampled(
    denoiser: Denoiser, conditional: Rows, unconditional: Rows, given: GivenRows, sampling: Sampling
) -> Float[Array, "B N p"]:
    """The sample, by each expert in its turn."""
    grid = sampling.grid(denoiser.process, sampling.steps)
    state = sampling.solver.init(jnp.asarray(conditional.tokens), steps=sampling.steps)
    for stage in _stages(denoiser.boundary, sampling, np.asarray(grid.told)):
        program = _program(denoiser.dit, denoiser.text, denoiser.process, sampling.solver, stage.guidance != 1.0)
        params = {"dit": denoiser.params[stage.expert], "text": denoiser.params["text"]}
        times = SampleTimes(*(values[stage.start : stage.stop + 1] for values in grid))
        state = program(params, state, conditional, unconditional, given, times, stage.guidance)
    return given.restored(state.x)


class _Stage(NamedTuple):
    """Steps that one expert does."""

    expert: str
    start: int
    stop: int
    guidance: float


def _stages(boundary: float | None, sampling: Sampling, told: Float32[np.ndarray, " times"]) -> list[_Stage]:
    scales = sampling.guidance
    if boundary is None:
        if isinstance(scales, tuple):
            raise UserError(f"guidance {scales} is for two experts, this model is one; give one number")
        return [_Stage("dit", 0, sampling.steps, scales)]
    high, low = scales if isinstance(scales, tuple) else (scales, scales)
    noisy = int((told[:-1] >= np.float32(boundary)).sum())
    stages = [_Stage("dit", 0, noisy, high), _Stage("low_noise", noisy, sampling.steps, low)]
    return [stage for stage in stages if stage.start < stage.stop]


@functools.lru_cache(maxsize=16)
def _program(dit: nnx.GraphDef, text: nnx.GraphDef, process: Process, solver: Sampler, guided: bool):
    """The jitted sampler of packed rows: from a solver's state to its state at the last of the times."""

    @jax.jit
    def program(params, state, conditional: Rows, unconditional: Rows, given: GivenRows, grid: SampleTimes, guidance):
        def branch(rows: Rows):
            context = nnx.merge(text, params["text"])(rows.text, rows.text_segments)
            denoise = packed_denoise(
                nnx.merge(dit, params["dit"]),
                segments=rows.segments,
                coordinates=rows.coordinates,
                context=context.values,
                context_segments=context.segments,
                count=rows.examples.shape[1],
                given=given.given,
            )
            return given.held(denoise)

        denoise = branch(conditional)
        if guided:
            denoise = classifier_free(denoise, branch(unconditional), guidance)
        return advance(denoise, state, grid.times, process=process, solver=solver, told=grid.told)

    return program
