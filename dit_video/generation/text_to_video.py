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

from dit_video.conditioning import ClipConditioning
from dit_video.core.errors import UserError
from dit_video.core.rng import key
from dit_video.diffusion import (
    AdaptiveProjectedGuidance,
    ClipSize,
    Euler,
    Guidance,
    GuidanceParams,
    GuidanceState,
    Prediction,
    Process,
    SampleTimes,
    SamplingState,
    Solver,
    TimeSchedule,
    UniformTimes,
    Velocity,
    init_sampling,
)
from dit_video.generation.conditioning import restore_clean_tokens
from dit_video.generation.program import compute_program_steps, make_program
from dit_video.generation.rows import PackedRequests, Packer, RequestSize, SamplingBatch, SamplingRequest, plan_rows
from dit_video.text import Tokenizer
from dit_video.tokens import Grid, LayoutShape, compute_token_grid, unpack, unpatchify


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
    solver: Solver = Euler()
    """Solver of the probability flow or of the reverse process."""
    time_schedule: TimeSchedule = UniformTimes()
    """Times of the steps."""
    branch_evaluation: Literal["together", "apart"] = "together"
    """Evaluation of guidance branches: all at once, or one after the other, which takes less memory."""

    def __post_init__(self):
        if self.steps < 1:
            raise UserError(f"steps={self.steps} is invalid: sampling takes at least 1 step, not {self.steps}. Use 32.")
        _ = self.full_guidance  # Its constructor checks the values.

    @property
    def full_guidance(self) -> Guidance:
        """Return the guidance with all its options."""
        return self.guidance if isinstance(self.guidance, Guidance) else Guidance(scale=self.guidance)

    def override_guidance(
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
        changes: dict[str, Any] = {"scale": scale, "interval": interval, "rescale": rescale}
        changes["projection"] = AdaptiveProjectedGuidance() if projected else None
        base = replace(self.full_guidance, projection=None) if projected is False else self.full_guidance
        return replace(base, **{name: value for name, value in changes.items() if value is not None})


class Denoiser(NamedTuple):
    """A trained denoiser with everything that sampling needs."""

    backbone: nnx.GraphDef
    text: nnx.GraphDef
    params: dict[str, Any]
    """`{"backbone": ..., "text": ...}`, and with two experts also `"low_noise"`, with the structure of `"backbone"`."""
    tokenizer: Tokenizer
    process: Process
    patch: Grid
    prediction: Prediction = Velocity()
    boundary: float | None = None
    """Time below which the second of two experts, `low_noise`, denoises."""
    token_dt: float = 1.0
    """Distance of consecutive tokens along time, in units of positions."""
    conditioning: tuple[ClipConditioning, ...] = ()
    """Conditioning by fields of the clips, which every request has."""


class LatentTrace(NamedTuple):
    """The sampling trajectory of one video."""

    times: Float32[np.ndarray, " steps+1"]
    """Times from noise to data."""
    latents: Float32[np.ndarray, "steps t h w c"]
    """Latents after each step."""
    data: Float32[np.ndarray, "steps t h w c"]
    """Estimated result at the start of each step."""


def draw_initial_noise(seed: int, latents: Grid, channels: int) -> Float32[np.ndarray, "t h w c"]:
    """Return standard normal noise, a function of the seed and the size."""
    return np.asarray(jax.random.normal(key(seed, "sample"), (*latents, channels), jnp.float32))


def sample_latents(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> list[Float32[np.ndarray, "t h w c"]]:
    """Return the latents of every request, in order.

    Requests are packed into rows of `shape`, and `rows` rows are sampled at a time. A request larger than a row gets a
    row of its own, for which a program is compiled. A result does not depend on the other requests.

    Raises:
      UserError: If the patch does not divide a size, a prompt is longer than a row's text, a single model gets two
        guidance scales, or values become NaN or infinite (the message names the step).
    """
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    for sampled in _sample_batches(denoiser, requests, sampling, shape, rows, has_trace=False):
        results |= sampled.unpack_latents(sampled.state.x)
    return [results[index] for index in range(len(requests))]


def trace_latents(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> list[LatentTrace]:
    """Sample like `sample_latents`, and return trajectories; the program is compiled for this number of steps."""
    results: dict[int, LatentTrace] = {}
    for sampled in _sample_batches(denoiser, requests, sampling, shape, rows, has_trace=True):
        assert sampled.state.trace is not None
        fields = sampled.batch.branches[0].fields
        trajectories = [
            [sampled.unpack_latents(tokens) for tokens in np.asarray(restore_clean_tokens(values, fields))]
            for values in sampled.state.trace
        ]
        for index in trajectories[0][0]:
            latents, data = (np.stack([step[index] for step in steps]) for steps in trajectories)
            results[index] = LatentTrace(np.asarray(sampled.times, np.float32), latents, data)
    return [results[index] for index in range(len(requests))]


class _SampledBatch(NamedTuple):
    """Rows that were sampled."""

    denoiser: Denoiser
    requests: Sequence[SamplingRequest]
    row_requests: Sequence[Sequence[int]]
    batch: SamplingBatch
    times: np.ndarray
    state: SamplingState

    def unpack_latents(self, tokens: Any) -> dict[int, Float32[np.ndarray, "t h w c"]]:
        """Return the latents of every request in rows of tokens, by its number."""
        rows = self.batch.branches[0]
        tokens, segments = np.asarray(restore_clean_tokens(tokens, rows.fields)), np.asarray(rows.segments)
        latents = {}
        for number, row in enumerate(self.row_requests):
            parts = unpack(tokens[number], segments[number])
            for index, part in zip(row, parts[:: len(parts) // len(row)], strict=True):
                grid = _get_token_grid(self.requests[index], self.denoiser)
                latents[index] = unpatchify(part, grid, self.denoiser.patch)
        return latents


def _sample_batches(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
    *,
    has_trace: bool,
) -> Iterator[_SampledBatch]:
    guidance = sampling.full_guidance
    if denoiser.boundary is None and len(guidance.scales) > 1:
        raise UserError(f"guidance={guidance.scales} is invalid: this model has no second expert. Use one number.")
    conditions = [request.branches(guidance.branch_count) for request in requests]
    prompts = dict.fromkeys(prompt for branches in conditions for prompt, _ in branches)
    texts = {prompt: denoiser.tokenizer(prompt) for prompt in prompts}
    sizes = [
        RequestSize(_get_token_grid(request, denoiser), tuple(len(texts[prompt]) for prompt, _ in branches))
        for request, branches in zip(requests, conditions, strict=True)
    ]
    packer = Packer(
        requests, texts, denoiser.patch, denoiser.token_dt, guidance.branch_count, rows, denoiser.conditioning
    )
    for process, indices in _group_by_process(denoiser, requests).items():
        sample_times = sampling.time_schedule(process, sampling.steps)
        request_sizes, is_batched = [sizes[index] for index in indices], sampling.branch_evaluation == "together"
        for group in plan_rows(request_sizes, shape, rows=rows, is_batched=is_batched):
            for start in range(0, len(group.rows), rows):
                members = [[indices[position] for position in row] for row in group.rows[start : start + rows]]
                batch = packer.make_batch(group, members)
                state = _sample_batch(denoiser, batch, group, sampling, sample_times, has_trace=has_trace)
                sampled = _SampledBatch(denoiser, requests, members, batch, np.asarray(sample_times.times), state)
                _check_finite(sampled, sampling)
                yield sampled


def _get_token_grid(request: SamplingRequest, denoiser: Denoiser) -> Grid:
    return compute_token_grid(Grid(*request.noise.shape[:3]), denoiser.patch)


def _group_by_process(denoiser: Denoiser, requests: Sequence[SamplingRequest]) -> dict[Process, list[int]]:
    """Group requests that are sampled at the same times: all of them, unless times depend on the size."""
    groups: dict[Process, list[int]] = {}
    for index, request in enumerate(requests):
        grid = _get_token_grid(request, denoiser)
        process = denoiser.process.specialize(ClipSize(frames=grid.t, frame_tokens=grid.h * grid.w))
        groups.setdefault(process, []).append(index)
    return groups


def _check_finite(sampled: _SampledBatch, sampling: Sampling) -> None:
    step = int(sampled.state.failed_step)
    if step < 0:
        return
    if not all(np.isfinite(latents).all() for latents in sampled.unpack_latents(sampled.state.x).values()):
        time = float(sampled.times[step])
        raise UserError(
            f"step {step + 1} of {sampling.steps}, at time {time:.4g}, gave NaN or infinity: the weights have "
            "diverged, or the sampling is too coarse for them. Use an earlier checkpoint, or less guidance."
        )


def _sample_batch(
    denoiser: Denoiser,
    batch: SamplingBatch,
    group: PackedRequests,
    sampling: Sampling,
    sample_times: SampleTimes,
    *,
    has_trace: bool,
) -> SamplingState:
    """Return the last state, after each expert in turn."""
    has_momentum, solver = sampling.full_guidance.has_momentum, sampling.solver
    noisy = denoiser.process.scale_initial_noise(jnp.asarray(batch.branches[0].tokens))
    guidance_state = GuidanceState(momentum=jnp.zeros_like(noisy)) if has_momentum else None
    state = init_sampling(solver, noisy, steps=sampling.steps, denoiser=guidance_state, has_trace=has_trace)
    is_batched = sampling.branch_evaluation == "together"
    program = make_program(denoiser.backbone, denoiser.text, denoiser.process, denoiser.prediction, solver, is_batched)
    capacity = sampling.steps if has_trace else compute_program_steps(sampling.steps)
    for stage in _split_by_expert(denoiser.boundary, sampling, np.asarray(sample_times.model_times)):
        params = {"backbone": denoiser.params[stage.expert], "text": denoiser.params["text"]}
        guidance = stage.params
        # An expert whose scale is 1 needs no other branches. Momentum still needs them, and so do rows that hold them.
        if guidance is not None and not group.is_side_by_side and stage.conditional_only and not has_momentum:
            guidance = None
        expert_batch = (
            batch if guidance is not None or group.is_side_by_side else batch._replace(branches=batch.branches[:1])
        )
        padded = (_pad_times(values, stage.start, stage.stop, capacity) for values in sample_times)
        times = SampleTimes(*map(jnp.asarray, padded))
        state = program(params, state, expert_batch, guidance, times, np.int32(stage.start))
    return state


def _pad_times(times: Any, start: int, stop: int, capacity: int) -> Float32[np.ndarray, " {capacity}+1"]:
    """Return the times of some steps, padded with the last one to `capacity` intervals."""
    part = np.asarray(times, np.float32)[start : stop + 1]
    return np.concatenate([part, np.full(capacity + 1 - len(part), part[-1], np.float32)])


class _ExpertSteps(NamedTuple):
    """The steps of one expert."""

    expert: str
    start: int
    stop: int
    params: GuidanceParams | None
    conditional_only: bool
    """The result is this expert's conditional prediction."""


def _split_by_expert(boundary: float | None, sampling: Sampling, model_times: np.ndarray) -> list[_ExpertSteps]:
    guidance = sampling.full_guidance

    def stage(expert: str, number: int, start: int, stop: int) -> _ExpertSteps:
        params = guidance.get_params(number) if guidance.branch_count > 1 else None
        conditional_only = guidance.branch_count == 2 and guidance.scales[min(number, len(guidance.scales) - 1)] == 1.0
        return _ExpertSteps(expert, start, stop, params, conditional_only)

    if boundary is None:
        return [stage("backbone", 0, 0, sampling.steps)]
    noisy_steps = int((model_times[:-1] >= np.float32(boundary)).sum())
    stages = [stage("backbone", 0, 0, noisy_steps), stage("low_noise", 1, noisy_steps, sampling.steps)]
    return [stage for stage in stages if stage.start < stage.stop]
