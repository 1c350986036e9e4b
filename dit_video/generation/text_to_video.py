"""Videos from prompts: requests of any size packed into rows and sampled together.

Rows have the shape of training, so that one compiled program serves all sizes, prompts, seeds, numbers of steps (of up
to 64, 128, …) and guidance scales. Another number of rows is compiled separately, and so is another kind of guidance.

A model may have two experts (Wan 2.2, arXiv 2503.20314): one for times of high noise, one for those below a boundary.
They sample one after the other, and only the active one is on the devices.
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
    """Configuration of sampling.

    Raises:
      UserError: If there is less than one step, or guidance is invalid.
    """

    steps: int = 32
    """Number of sampling steps."""
    guidance: float | tuple[float, float] | Guidance = 2.0
    """Classifier-free guidance; 1 is none. A pair holds the scales of two experts, that of the noisy times first."""
    solver: Sampler = Euler()
    """Solver of the probability flow or of the reverse process."""
    grid: TimeGrid = Even()
    """Times of the steps."""
    branches: Literal["together", "apart"] = "together"
    """Evaluation of guidance branches: all at once, or one after the other, which takes less memory."""

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps={self.steps} is invalid: sampling takes at least 1 step, not {self.steps}. Use 32.")
        _ = self.full_guidance  # Its constructor checks the values.

    @property
    def full_guidance(self) -> Guidance:
        """Return the guidance with all its options."""
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(scale=self.guidance)

    def guided(
        self,
        *,
        scale: float | tuple[float, float] | None = None,
        interval: tuple[float, float] | None = None,
        rescale: float | None = None,
        projected: bool | None = None,
    ) -> Guidance:
        """Return its guidance with the passed options replaced.

        Raises:
          UserError: If `Guidance` refuses the values.
        """
        changes: dict[str, Any] = {
            "scale": scale,
            "interval": interval,
            "rescale": rescale,
            "projected": Projected() if projected else None,
        }
        base = replace(self.full_guidance, projected=None) if projected is False else self.full_guidance
        return replace(base, **{name: value for name, value in changes.items() if value is not None})


class Denoiser(NamedTuple):
    """A trained denoiser with everything that sampling needs."""

    dit: nnx.GraphDef
    text: nnx.GraphDef
    params: dict[str, Any]
    """`{"dit": ..., "text": ...}`, and with two experts also `"low_noise"`, with the structure of `"dit"`."""
    tokenizer: Tokenizer
    process: Process
    patch: Grid
    prediction: Prediction = Velocity()
    boundary: float | None = None
    """Time below which the second of two experts, `low_noise`, denoises."""
    interval: float = 1.0
    """Distance of consecutive tokens along time, in units of coordinates."""


class LatentTrace(NamedTuple):
    """The sampling trajectory of one video."""

    times: Float32[np.ndarray, " steps+1"]
    """Times from noise to data."""
    latents: Float32[np.ndarray, "steps t h w c"]
    """Latents after each step."""
    data: Float32[np.ndarray, "steps t h w c"]
    """Estimated result at the start of each step."""


def initial_noise(seed: int, latents: Grid, channels: int) -> Float32[np.ndarray, "t h w c"]:
    """Return standard normal noise, a function of the seed and the size."""
    return np.asarray(jax.random.normal(key(seed, "sample"), (*latents, channels), jnp.float32))


def sample_latents(
    denoiser: Denoiser, requests: Sequence[LatentRequest], *, sampling: Sampling, shape: RowShape, rows: int
) -> list[Float32[np.ndarray, "t h w c"]]:
    """Return the latents of every request, in order.

    Requests are packed into rows of `shape`, and `rows` rows are sampled at a time. A request larger than a row gets a
    row of its own, for which a program is compiled. A result does not depend on the other requests.

    Raises:
      UserError: If the patch does not divide a size, a prompt is longer than a row's text, a single model gets two
        guidance scales, or values become NaN or infinite (the message names the step).
    """
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    for sampled in _runs(denoiser, requests, sampling, shape, rows, recorded=False):
        results |= sampled.unpacked(sampled.state.x)
    return [results[index] for index in range(len(requests))]


def trace_latents(
    denoiser: Denoiser, requests: Sequence[LatentRequest], *, sampling: Sampling, shape: RowShape, rows: int
) -> list[LatentTrace]:
    """Sample like `sample_latents`, and return trajectories; the program is compiled for this number of steps."""
    results: dict[int, LatentTrace] = {}
    for sampled in _runs(denoiser, requests, sampling, shape, rows, recorded=True):
        assert sampled.state.recorded is not None
        trajectories = [
            [sampled.unpacked(tokens) for tokens in np.asarray(sampled.batch.branches[0][1].restored(values))]
            for values in sampled.state.recorded
        ]
        for index in trajectories[0][0]:
            latents, data = (np.stack([step[index] for step in steps]) for steps in trajectories)
            results[index] = LatentTrace(np.asarray(sampled.times, np.float32), latents, data)
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
        """Return the latents of every request in rows of tokens, by its number."""
        rows, conditioning = self.batch.branches[0]
        tokens, segments = np.asarray(conditioning.restored(tokens)), np.asarray(rows.segments)
        latents = {}
        for number, row in enumerate(self.members):
            parts = unpack(tokens[number], segments[number])
            for index, part in zip(row, parts[:: len(parts) // len(row)], strict=True):
                grid = token_grid(Grid(*self.requests[index].noise.shape[:3]), self.denoiser.patch)
                latents[index] = unpatchify(part, grid, self.denoiser.patch)
        return latents


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
        raise UserError(f"guidance={guidance.scales} is invalid: this model has no second expert. Use one number.")
    conditions = [request.branches(guidance.branches) for request in requests]
    prompts = dict.fromkeys(prompt for branches in conditions for prompt, _ in branches)
    texts = {prompt: denoiser.tokenizer(prompt) for prompt in prompts}
    sizes = [
        Need(
            token_grid(Grid(*request.noise.shape[:3]), denoiser.patch).volume,
            tuple(len(texts[prompt]) for prompt, _ in branches),
        )
        for request, branches in zip(requests, conditions, strict=True)
    ]
    packer = Packer(requests, texts, denoiser.patch, denoiser.interval, guidance.branches, rows)
    for process, indices in _by_process(denoiser, requests).items():
        sample_times = sampling.grid(process, sampling.steps)
        groups = plan([sizes[index] for index in indices], shape, rows=rows, together=sampling.branches == "together")
        for group in groups:
            for start in range(0, len(group.rows), rows):
                members = [[indices[position] for position in row] for row in group.rows[start : start + rows]]
                batch = packer.batch(group, members)
                state = _sampled(denoiser, batch, group, sampling, sample_times, recorded=recorded)
                sampled = _Run(denoiser, requests, members, batch, np.asarray(sample_times.times), state)
                _check_finite(sampled, sampling)
                yield sampled


def _by_process(denoiser: Denoiser, requests: Sequence[LatentRequest]) -> dict[Process, list[int]]:
    """Group requests that are sampled at the same times: all of them, unless times depend on the size."""
    groups: dict[Process, list[int]] = {}
    for index, request in enumerate(requests):
        grid = token_grid(Grid(*request.noise.shape[:3]), denoiser.patch)
        process = denoiser.process.for_size(ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w))
        groups.setdefault(process, []).append(index)
    return groups


def _check_finite(run: _Run, sampling: Sampling) -> None:
    step = int(run.state.failed)
    if step >= 0 and not all(np.isfinite(latents).all() for latents in run.unpacked(run.state.x).values()):
        time = float(run.times[step])
        raise UserError(
            f"step {step + 1} of {sampling.steps}, at time {time:.4g}, gave NaN or infinity: the weights have "
            "diverged, or the sampling is too coarse for them. Use an earlier checkpoint, or less guidance."
        )


def _sampled(
    denoiser: Denoiser, batch: Batch, group: Group, sampling: Sampling, grid: SampleTimes, *, recorded: bool
) -> WatchedState:
    """Return the last state, after each expert in turn."""
    has_momentum = sampling.full_guidance.remembers
    solver = Watched(solver=Remembering(solver=sampling.solver) if has_momentum else sampling.solver, recorded=recorded)
    state = solver.init(denoiser.process.start(jnp.asarray(batch.branches[0][0].tokens)), steps=sampling.steps)
    is_batched = sampling.branches == "together"
    program = program_of(denoiser.dit, denoiser.text, denoiser.process, denoiser.prediction, solver, is_batched)
    capacity = sampling.steps if recorded else steps_of_program(sampling.steps)
    for stage in _stages(denoiser.boundary, sampling, np.asarray(grid.told)):
        params = {"dit": denoiser.params[stage.expert], "text": denoiser.params["text"]}
        guidance = stage.strength
        # An expert whose scale is 1 needs no other branches. Momentum still needs them, and so do rows that hold them.
        if guidance is not None and not group.inside and stage.alone and not has_momentum:
            guidance = None
        expert_batch = batch if guidance is not None or group.inside else batch._replace(branches=batch.branches[:1])
        times = SampleTimes(*(jnp.asarray(_padded(values, stage.start, stage.stop, capacity)) for values in grid))
        state = program(params, state, expert_batch, guidance, times, np.int32(stage.start))
    return state


def _padded(times: Any, start: int, stop: int, room: int) -> Float32[np.ndarray, " {room}+1"]:
    """Return the times of some steps, padded with the last one to `capacity` intervals."""
    part = np.asarray(times, np.float32)[start : stop + 1]
    return np.concatenate([part, np.full(room + 1 - len(part), part[-1], np.float32)])


class _Stage(NamedTuple):
    """The steps of one expert."""

    expert: str
    start: int
    stop: int
    strength: Strength | None
    alone: bool
    """The result is this expert's conditional prediction."""


def _stages(boundary: float | None, sampling: Sampling, told: Float32[np.ndarray, " times"]) -> list[_Stage]:
    guidance = sampling.full_guidance

    def stage(expert: str, number: int, start: int, stop: int) -> _Stage:
        params = guidance.strength(number) if guidance.branches > 1 else None
        conditional_only = guidance.branches == 2 and guidance.scales[min(number, len(guidance.scales) - 1)] == 1.0
        return _Stage(expert, start, stop, params, conditional_only)

    if boundary is None:
        return [stage("dit", 0, 0, sampling.steps)]
    noisy_steps = int((told[:-1] >= np.float32(boundary)).sum())
    stages = [stage("dit", 0, 0, noisy_steps), stage("low_noise", 1, noisy_steps, sampling.steps)]
    return [stage for stage in stages if stage.start < stage.stop]
