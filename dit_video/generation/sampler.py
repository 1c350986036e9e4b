"""The sampler: requests of any size packed into rows and sampled together.

Rows have the shape of training, so that one compiled program serves all sizes, prompts, seeds, numbers of steps (of up
to 64, 128, …) and guidance scales. Another number of rows is compiled separately, and so is another kind of guidance.

A model may have two experts (Wan 2.2, arXiv 2503.20314): one for times of high noise, one for those below a boundary.
All requests are denoised by the first before the second. Of weights in host memory only the active expert's are on the
devices (see `core.offload`).
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from dit_video.core.errors import UserError
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.rng import key
from dit_video.diffusion import (
    ClipSize,
    GuidanceState,
    Process,
    SampleTimes,
    SamplingState,
    init_sampling,
)
from dit_video.distributed.gather import to_host
from dit_video.generation.config import Sampling
from dit_video.generation.denoiser import Denoiser
from dit_video.generation.packing import START_LATENTS, Packer, RequestSize, SamplingBatch, SamplingRequest, plan_rows
from dit_video.generation.plan import StepTransform
from dit_video.generation.program import compute_program_steps, make_program
from dit_video.generation.sharding import (
    ProgramArguments,
    compute_row_multiples,
    make_argument_shardings,
    put_on_devices,
)
from dit_video.text import CaptionTokens
from dit_video.tokens import Grid, LayoutShape, unpack, unpatchify


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


_EXHAUSTED_MEMORY_FIX = (
    "Use offload=Layers() (--offload layers), a smaller size or a mesh of several devices; "
    "tools/plan.py FOLDER --of sampler plans the memory"
)


def sample_latents(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> list[Float32[np.ndarray, "t h w c"]]:
    """Return the latents of every request, in order.

    Requests are packed into rows of `shape`, and `rows` rows are sampled at a time. A request larger than a row gets a
    row of its own, for which a program is compiled. A result does not depend on the other requests. On a mesh, rows are
    padded, so that all devices share them and their tokens; all its processes call this, and all get the results.

    Raises:
      UserError: If the patch does not divide a size, a prompt is longer than a row's text, a single model gets two
        guidance scales, a plan does not fit, values become NaN or infinite (the message names the step), or the
        device's memory is too small.
    """
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    with name_exhausted_memory("sampling", _EXHAUSTED_MEMORY_FIX):
        for sampled in _sample_batches(denoiser, requests, sampling, shape, rows):
            results |= sampled.unpack_latents(sampled.state.x)
    return [results[index] for index in range(len(requests))]


def trace_latents(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> list[LatentTrace]:
    """Sample like `sample_latents`, and return trajectories; the program is compiled for this number of steps."""
    results: dict[int, LatentTrace] = {}
    for sampled in _sample_batches(denoiser, requests, sampling, shape, rows, has_trace=True):
        assert sampled.state.trace is not None
        trajectories = [
            [sampled.unpack_latents(tokens) for tokens in to_host(values)] for values in sampled.state.trace
        ]
        for index in trajectories[0][0]:
            latents, data = (np.stack([step[index] for step in steps]) for steps in trajectories)
            results[index] = LatentTrace(sampled.planned.times, latents, data)
    return [results[index] for index in range(len(requests))]


class _PlannedBatch(NamedTuple):
    """Rows of requests that are sampled together."""

    row_requests: Sequence[Sequence[int]]
    """Requests of each row, by number."""
    batch: SamplingBatch
    is_side_by_side: bool
    """True if all branches of guidance are in one row."""
    sample_times: SampleTimes
    """Times of all steps."""
    first_step: int
    """Number of the first step that is taken."""
    transform: StepTransform | None

    @property
    def times(self) -> Float32[np.ndarray, " steps"]:
        """Return the times of the steps that are taken, and the last one."""
        return np.asarray(self.sample_times.times, np.float32)[self.first_step :]


class _SampledBatch(NamedTuple):
    """Rows that were sampled."""

    denoiser: Denoiser
    requests: Sequence[SamplingRequest]
    planned: _PlannedBatch
    state: SamplingState

    def unpack_latents(self, tokens: Any) -> dict[int, Float32[np.ndarray, "t h w c"]]:
        """Return the latents of every request's clip in rows of tokens, by its number."""
        tokens, segments = to_host(tokens), np.asarray(self.planned.batch.branches[0].segments)
        latents, patch = {}, self.denoiser.patch
        for number, row in enumerate(self.planned.row_requests):
            parts = unpack(tokens[number], segments[number])
            for index, part in zip(row, parts[:: len(parts) // len(row)], strict=True):
                request = self.requests[index]
                grid, own_frames = request.get_token_grid(patch), slice(request.plan.leading_frames, None)
                latents[index] = unpatchify(part[: grid.volume], grid, patch)[own_frames]
        return latents


def _sample_batches(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
    *,
    has_trace: bool = False,
) -> Iterator[_SampledBatch]:
    texts = _embed_prompts(denoiser, requests, sampling)  # before the denoiser's weights are copied to the devices
    planned_batches = _plan_batches(denoiser, requests, texts, sampling, shape, rows)
    runs = ((planned, _init_state(denoiser, planned, sampling, has_trace=has_trace)) for planned in planned_batches)
    first, *others = denoiser.experts
    if others:
        with denoiser.open_params(first) as params:
            states = [
                (planned, _prepare_expert(denoiser, params, 0, planned, state, sampling, has_trace=has_trace)())
                for planned, state in runs
            ]
            # Otherwise the weights of the second expert would be copied while those of the first are in use.
            runs = iter(jax.block_until_ready(states))
    with denoiser.open_params(denoiser.experts[-1]) as params:
        for planned, state in runs:
            run = _prepare_expert(denoiser, params, len(others), planned, state, sampling, has_trace=has_trace)
            sampled = _SampledBatch(denoiser, requests, planned, jax.block_until_ready(run()))
            _check_finite(sampled, sampling)
            yield sampled


def _prepare_expert(
    denoiser: Denoiser,
    params: dict[str, Any],
    number: int,
    planned: _PlannedBatch,
    state: SamplingState,
    sampling: Sampling,
    *,
    has_trace: bool,
) -> Callable[[], SamplingState]:
    """Return a function that takes the steps of one expert, which may be none, and returns the state after them."""
    arguments = _make_arguments(denoiser, number, planned, sampling, has_trace=has_trace)
    if arguments is None:
        return lambda: state
    program, arguments = _make_program(denoiser, planned, sampling), arguments._replace(params=params, state=state)
    if denoiser.mesh is not None:
        _, *others = arguments
        _, *shardings = make_argument_shardings(arguments, denoiser.mesh)
        arguments = ProgramArguments(params, *put_on_devices(others, shardings))
    return functools.partial(program, *arguments)


def list_programs(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> Iterator[tuple[str, Callable[..., SamplingState], ProgramArguments]]:
    """Yield the programs that `sample_latents` runs on one device: expert, program, and shapes of its arguments.

    Nothing is computed but the texts, so that the parameters may be shapes.
    """
    texts = _embed_prompts(denoiser, requests, sampling)
    for planned in _plan_batches(denoiser, requests, texts, sampling, shape, rows):
        state = jax.eval_shape(functools.partial(_init_state, denoiser, planned, sampling, has_trace=False))
        for number, expert in enumerate(denoiser.experts):
            if (arguments := _make_arguments(denoiser, number, planned, sampling, has_trace=False)) is not None:
                params = {"backbone": denoiser.params[expert], "text": denoiser.params["text"]}
                arguments = jax.eval_shape(lambda values=arguments: values)
                yield expert, _make_program(denoiser, planned, sampling), arguments._replace(params=params, state=state)


def _make_program(denoiser: Denoiser, planned: _PlannedBatch, sampling: Sampling) -> Callable[..., SamplingState]:
    is_batched = sampling.branch_evaluation == "together"
    kinds = denoiser.backbone, denoiser.text, denoiser.process, denoiser.prediction, sampling.solver
    return make_program(*kinds, planned.transform, is_batched, denoiser.mesh)


def _embed_prompts(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], sampling: Sampling
) -> dict[str, CaptionTokens]:
    """Return the tokens of all prompts; raise UserError for guidance of two experts if the model has one."""
    guidance = sampling.full_guidance
    sampling.check_experts(len(denoiser.experts))
    prompts = dict.fromkeys(prompt for request in requests for prompt, _ in request.branches(guidance.branch_count))
    return denoiser.embed(prompts)


def _plan_batches(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    texts: Mapping[str, CaptionTokens],
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
) -> Iterator[_PlannedBatch]:
    guidance, patch, mesh = sampling.full_guidance, denoiser.patch, denoiser.mesh
    conditions = [request.branches(guidance.branch_count) for request in requests]
    sizes = [
        RequestSize(
            request.get_token_grid(patch),
            tuple(len(texts[prompt]) for prompt, _ in branches),
            0 if request.plan.extra is None else len(request.plan.extra.noise),
        )
        for request, branches in zip(requests, conditions, strict=True)
    ]
    # Requests are sampled together if they take the same steps: all of a task, unless times depend on the size.
    groups: dict[_Steps, list[int]] = {}
    for index, (request, size) in enumerate(zip(requests, sizes, strict=True)):
        clip_size = ClipSize(frames=size.grid.t, frame_tokens=size.grid.h * size.grid.w)
        groups.setdefault(_plan_steps(request, denoiser.process.specialize(clip_size), sampling), []).append(index)
    is_batched = sampling.branch_evaluation == "together"
    multiples = compute_row_multiples(mesh, guidance, is_batched=is_batched)
    # The branch without some layers is the first one alone, so that others must not lie in its rows.
    can_share_rows = is_batched and guidance.skip_layers is None
    options: dict[str, Any] = {"rows": rows, "is_batched": can_share_rows, "multiples": multiples}
    for steps, indices in groups.items():
        fields = dict.fromkeys(field for index in indices for field in requests[index].fields)
        if steps.transform is not None:
            fields |= dict.fromkeys(steps.transform.list_fields(requests[indices[0]].noise.shape[-1]))
        sample_times = sampling.make_times(steps.process)
        for group in plan_rows([sizes[index] for index in indices], shape, **options):
            batch_rows = multiples.round_up(rows, is_side_by_side=group.is_side_by_side)
            if mesh is not None:
                group = group._replace(shape=group.shape.pad_tokens(mesh.shape["context"]))
            packer = Packer(
                requests,
                texts,
                patch=patch,
                token_dt=denoiser.token_dt,
                branch_count=guidance.branch_count,
                rows=batch_rows,
                fields=tuple(fields),
                token_lead=denoiser.token_lead,
            )
            for start in range(0, len(group.rows), batch_rows):
                members = [[indices[position] for position in row] for row in group.rows[start : start + batch_rows]]
                yield _PlannedBatch(
                    row_requests=members,
                    batch=packer.make_batch(group, members),
                    is_side_by_side=group.is_side_by_side,
                    sample_times=sample_times,
                    first_step=steps.first,
                    transform=steps.transform,
                )


class _Steps(NamedTuple):
    """The steps of a request."""

    process: Process
    """Process for clips of its size, which the times depend on."""
    first: int
    has_start: bool
    transform: StepTransform | None


def _plan_steps(request: SamplingRequest, process: Process, sampling: Sampling) -> _Steps:
    plan, first = request.plan, 0
    if plan.start is not None:
        if plan.start.shape != request.noise.shape:
            shapes = f"{list(plan.start.shape)}, those of the clip {list(request.noise.shape)}"
            raise UserError(f"start is invalid: its latents are {shapes}. Encode a clip of the size that is requested.")
        times = np.asarray(sampling.make_times(process).times)
        first = int((times[:-1] > np.float32(plan.start_time)).sum())
        if first == sampling.steps:
            raise UserError(
                f"start_time={plan.start_time} is invalid: no step begins at or below it. Use at least "
                f"{times[-2]:.3g}, or more steps."
            )
    elif plan.start_time < 1:
        raise UserError(f"start_time={plan.start_time} is invalid without start latents. Use 1, or give start.")
    return _Steps(process, first, plan.start is not None, plan.transform)


def _init_state(denoiser: Denoiser, planned: _PlannedBatch, sampling: Sampling, *, has_trace: bool) -> SamplingState:
    rows, process = planned.batch.branches[0], denoiser.process
    noise, steps = jnp.asarray(rows.tokens), sampling.steps - planned.first_step
    if START_LATENTS in rows.fields:
        noisy = process.add_noise(jnp.asarray(rows.fields[START_LATENTS]), noise, jnp.asarray(planned.times[0]))
    else:
        noisy = process.scale_initial_noise(noise)
    if planned.transform is not None:
        noisy = planned.transform.change_start(noisy, rows)
    return init_state(sampling, noisy, steps=steps, has_trace=has_trace)


def init_state(sampling: Sampling, noisy: Array, *, steps: int, has_trace: bool = False) -> SamplingState:
    """Return the state of the sampler's program before the first of `steps` steps from noisy tokens `B N p`."""
    has_momentum = sampling.full_guidance.has_momentum
    guidance_state = GuidanceState(momentum=jnp.zeros_like(noisy)) if has_momentum else None
    return init_sampling(sampling.solver, noisy, steps=steps, denoiser=guidance_state, has_trace=has_trace)


def _make_arguments(
    denoiser: Denoiser, number: int, planned: _PlannedBatch, sampling: Sampling, *, has_trace: bool
) -> ProgramArguments | None:
    """Return the program's arguments for an expert, without parameters and state; None if it has no steps."""
    guidance = sampling.full_guidance
    capacity = sampling.steps - planned.first_step if has_trace else compute_program_steps(sampling.steps)
    model_times = np.asarray(planned.sample_times.model_times)
    last_noisy = sampling.steps
    if denoiser.boundary is not None:
        last_noisy = int((model_times[:-1] >= np.float32(denoiser.boundary)).sum())
    bounds = ((planned.first_step, last_noisy), (max(planned.first_step, last_noisy), sampling.steps))
    start, stop = bounds[number]
    if start >= stop:
        return None
    all_times = np.asarray(planned.sample_times.times, np.float32)
    guidance_params = guidance.get_params(number, times=all_times) if guidance.is_active else None
    is_unguided = guidance.branch_count == 2 and guidance.scales[min(number, len(guidance.scales) - 1)] == 1.0
    batch = planned.batch
    # An expert whose scale is 1 needs no other branches. Momentum still needs them, and so do rows that hold them.
    if is_unguided and not planned.is_side_by_side and not guidance.has_momentum:
        batch = batch._replace(branches=batch.branches[:1])
        if guidance.zero_star is None and guidance.skip_layers is None:
            guidance_params = None
    padded = (_pad_times(values, start, stop, capacity) for values in planned.sample_times)
    times = SampleTimes(*map(jnp.asarray, padded))
    return ProgramArguments(None, None, batch, guidance_params, times, np.int32(start))


def _check_finite(sampled: _SampledBatch, sampling: Sampling) -> None:
    step, planned = int(sampled.state.failed_step), sampled.planned
    if step < 0:
        return
    if not all(np.isfinite(latents).all() for latents in sampled.unpack_latents(sampled.state.x).values()):
        raise UserError(
            f"step {planned.first_step + step + 1} of {sampling.steps}, at time {float(planned.times[step]):.4g}, gave "
            "NaN or infinity: the weights have diverged, or the sampling is too coarse for them. Use an earlier "
            "checkpoint, or less guidance."
        )


def _pad_times(times: Any, start: int, stop: int, capacity: int) -> Float32[np.ndarray, " {capacity}+1"]:
    """Return the times of some steps, padded with the last one to `capacity` intervals."""
    part = np.asarray(times, np.float32)[start : stop + 1]
    return np.concatenate([part, np.full(capacity + 1 - len(part), part[-1], np.float32)])
