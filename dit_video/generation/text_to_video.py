"""Videos from prompts: requests of any size packed into rows, sampled together.

Rows have the shape that the model was trained on, so that one compiled program serves every size, prompt, seed, number
of steps (of up to 64, 128, …) and strength of guidance. Another number of rows is compiled anew, and so is guidance of
another kind, or none.

A model may have two experts (Wan 2.2, arXiv 2503.20314): one for the noisy times, one for those below a boundary. They
sample one after the other, and only the one at work is handed to the devices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float32

from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.diffusion import (
    ClipSize,
    Euler,
    Even,
    Guidance,
    Prediction,
    Process,
    Projected,
    Remembering,
    Sampler,
    SampleTimes,
    Strength,
    TimeGrid,
    Velocity,
    Watched,
    WatchedState,
)
from dit_video.generation.program import program_of, steps_of_program
from dit_video.generation.rows import Batch, Group, LatentRequest, Need, Packer, plan
from dit_video.text import Tokenizer
from dit_video.tokens import Grid, RowShape, token_grid, unpack, unpatchify


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How samples are drawn.

    Raises:
      UserError: less than one step, or a scale of guidance that there is not.
    """

    steps: int = 32
    guidance: float | tuple[float, float] | Guidance = 2.0
    """classifier-free guidance; 1 is none. Of two experts each may have its own, that of the noisy times first."""
    solver: Sampler = Euler()
    grid: TimeGrid = Even()
    branches: Literal["together", "apart"] = "together"
    """whether what guidance combines is evaluated at once, or one after the other, in less memory"""

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"sampling takes at least 1 step, not {self.steps}")
        _ = self.full_guidance  # which refuses what there is not

    @property
    def full_guidance(self) -> Guidance:
        """With all that a number leaves out."""
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(scale=self.guidance)

    def guided(
        self,
        *,
        scale: float | tuple[float, float] | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        projected: bool | None = None,
    ) -> Guidance:
        """Its guidance, with what is given in its place.

        Raises:
          UserError: as of `Guidance`.
        """
        changes: dict[str, Any] = {
            "scale": scale,
            "interval": interval,
            "rescale": rescale,
            "projected": Projected() if projected else None,
        }
        kept = replace(self.full_guidance, projected=None) if projected is False else self.full_guidance
        return replace(kept, **{name: value for name, value in changes.items() if value is not None})


class Denoiser(NamedTuple):
    """A trained denoiser with all that sampling needs to know of it."""

    dit: nnx.GraphDef
    text: nnx.GraphDef
    params: dict[str, Any]
    """`{"dit": ..., "text": ...}`, and of two experts `"low_noise"`, which has the structure of `"dit"`"""
    tokenizer: Tokenizer
    process: Process
    patch: Grid
    prediction: Prediction = Velocity()
    boundary: float | None = None
    """of two experts: at times below it `low_noise` denoises"""
    interval: float = 1.0
    """of two tokens along time, in what coordinates count"""


class LatentTrace(NamedTuple):
    """What the sampling of one video went through."""

    times: Float32[np.ndarray, " steps+1"]
    """from noise to data"""
    latents: Float32[np.ndarray, "steps t h w c"]
    """after each step"""
    data: Float32[np.ndarray, "steps t h w c"]
    """what the result was thought to be, at the start of each"""


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
      UserError: a size that the patch does not divide, a prompt longer than a row's text, two scales of guidance for
        one model, or a model whose values become NaN or infinite, with the step.
    """
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    for run in _runs(denoiser, requests, sampling, shape, rows, recorded=False):
        results |= run.unpacked(run.state.x)
    return [results[index] for index in range(len(requests))]


def trace_latents(
    denoiser: Denoiser, requests: Sequence[LatentRequest], *, sampling: Sampling, shape: RowShape, rows: int
) -> list[LatentTrace]:
    """As `sample_latents`, with all that sampling went through; of a program for just so many steps."""
    results: dict[int, LatentTrace] = {}
    for run in _runs(denoiser, requests, sampling, shape, rows, recorded=True):
        assert run.state.recorded is not None
        seen = [
            [run.unpacked(tokens) for tokens in np.asarray(run.batch.branches[0][1].restored(values))]
            for values in run.state.recorded
        ]
        for index in seen[0][0]:
            latents, data = (np.stack([step[index] for step in steps]) for steps in seen)
            results[index] = LatentTrace(np.asarray(run.times, np.float32), latents, data)
    return [results[index] for index in range(len(requests))]


class _Run(NamedTuple):
    """Rows that were sampled."""

    denoiser: Denoiser
    requests: Sequence[LatentRequest]
    members: Sequence[Sequence[int]]
    batch: Batch
    times: np.ndarray
    state: WatchedState

    def unpacked(self, tokens: Any) -> dict[int, Float32[np.ndarray, "t h w c"]]:
        """The latents of every request in rows of tokens, by its number."""
        rows, given = self.batch.branches[0]
        tokens, segments = np.asarray(given.restored(tokens)), np.asarray(rows.segments)
        found = {}
        for number, row in enumerate(self.members):
            parts = unpack(tokens[number], segments[number])
            for index, part in zip(row, parts[:: len(parts) // len(row)], strict=True):
                grid = token_grid(Grid(*self.requests[index].noise.shape[:3]), self.denoiser.patch)
                found[index] = unpatchify(part, grid, self.denoiser.patch)
        return found


def _runs(
    denoiser: Denoiser,
    requests: Sequence[LatentRequest],
    sampling: Sampling,
    shape: RowShape,
    rows: int,
    *,
    recorded: bool,
) -> Iterator[_Run]:
    guidance = sampling.full_guidance
    if denoiser.boundary is None and len(guidance.scales) > 1:
        raise UserError(f"guidance {guidance.scales} is for two experts, this model is one; give one number")
    conditions = [request.branches(guidance.branches) for request in requests]
    prompts = dict.fromkeys(prompt for branches in conditions for prompt, _ in branches)
    texts = {prompt: denoiser.tokenizer(prompt) for prompt in prompts}
    needs = [
        Need(
            token_grid(Grid(*request.noise.shape[:3]), denoiser.patch).volume,
            tuple(len(texts[prompt]) for prompt, _ in branches),
        )
        for request, branches in zip(requests, conditions, strict=True)
    ]
    packer = Packer(requests, texts, denoiser.patch, denoiser.interval, guidance.branches, rows)
    for process, alike in _by_process(denoiser, requests).items():
        grid = sampling.grid(process, sampling.steps)
        groups = plan([needs[index] for index in alike], shape, rows=rows, together=sampling.branches == "together")
        for group in groups:
            for start in range(0, len(group.rows), rows):
                members = [[alike[place] for place in row] for row in group.rows[start : start + rows]]
                batch = packer.batch(group, members)
                state = _sampled(denoiser, batch, group, sampling, grid, recorded=recorded)
                run = _Run(denoiser, requests, members, batch, np.asarray(grid.times), state)
                _check_finite(run, sampling)
                yield run


def _by_process(denoiser: Denoiser, requests: Sequence[LatentRequest]) -> dict[Process, list[int]]:
    """Requests that are sampled at the same times: all of them, where the times don't depend on the size."""
    found: dict[Process, list[int]] = {}
    for index, request in enumerate(requests):
        grid = token_grid(Grid(*request.noise.shape[:3]), denoiser.patch)
        process = denoiser.process.for_size(ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w))
        found.setdefault(process, []).append(index)
    return found


def _check_finite(run: _Run, sampling: Sampling) -> None:
    step = int(run.state.failed)
    if step >= 0 and not all(np.isfinite(latents).all() for latents in run.unpacked(run.state.x).values()):
        time = float(run.times[step])
        raise UserError(
            f"step {step + 1} of {sampling.steps}, at time {time:.4g}, gave NaN or infinity: the weights have "
            "diverged, or the sampling is too rough for them; take an earlier checkpoint, or less guidance"
        )


def _sampled(
    denoiser: Denoiser, batch: Batch, group: Group, sampling: Sampling, grid: SampleTimes, *, recorded: bool
) -> WatchedState:
    """The last state, by each expert in its turn."""
    remembers = sampling.full_guidance.remembers
    solver = Watched(solver=Remembering(solver=sampling.solver) if remembers else sampling.solver, recorded=recorded)
    state = solver.init(denoiser.process.start(jnp.asarray(batch.branches[0][0].tokens)), steps=sampling.steps)
    together = sampling.branches == "together"
    program = program_of(denoiser.dit, denoiser.text, denoiser.process, denoiser.prediction, solver, together)
    room = sampling.steps if recorded else steps_of_program(sampling.steps)
    for stage in _stages(denoiser.boundary, sampling, np.asarray(grid.told)):
        params = {"dit": denoiser.params[stage.expert], "text": denoiser.params["text"]}
        strength = stage.strength
        if strength is not None and not group.inside and stage.alone and not remembers:
            strength = None
        given = batch if strength is not None or group.inside else batch._replace(branches=batch.branches[:1])
        times = SampleTimes(*(jnp.asarray(_padded(values, stage.start, stage.stop, room)) for values in grid))
        state = program(params, state, given, strength, times, np.int32(stage.start))
    return state


def _padded(times: Any, start: int, stop: int, room: int) -> Float32[np.ndarray, " {room}+1"]:
    """The times of some steps, and then the last of them, so that there are `room` intervals."""
    part = np.asarray(times, np.float32)[start : stop + 1]
    return np.concatenate([part, np.full(room + 1 - len(part), part[-1], np.float32)])


class _Stage(NamedTuple):
    """Steps that one expert does."""

    expert: str
    start: int
    stop: int
    strength: Strength | None
    alone: bool
    """whether this expert's conditional prediction is all that counts"""


def _stages(boundary: float | None, sampling: Sampling, told: Float32[np.ndarray, " times"]) -> list[_Stage]:
    guidance = sampling.full_guidance

    def stage(expert: str, number: int, start: int, stop: int) -> _Stage:
        strength = guidance.strength(number) if guidance.branches > 1 else None
        alone = guidance.branches == 2 and guidance.scales[min(number, len(guidance.scales) - 1)] == 1.0
        return _Stage(expert, start, stop, strength, alone)

    if boundary is None:
        return [stage("dit", 0, 0, sampling.steps)]
    noisy = int((told[:-1] >= np.float32(boundary)).sum())
    stages = [stage("dit", 0, 0, noisy), stage("low_noise", 1, noisy, sampling.steps)]
    return [stage for stage in stages if stage.start < stage.stop]
