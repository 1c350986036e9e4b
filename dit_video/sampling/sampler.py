"""The sampler: requests of any size packed into rows and sampled together.

Rows have the shape of training, so that one compiled program serves all sizes, prompts, seeds, numbers of steps (of up
to 64, 128, …) and guidance scales. Another number of rows is compiled separately, and so is another kind of guidance.
The program takes a block of steps at a time. Between blocks a run may be stopped, its progress is reported, and tasks
may change the latents.

A model may have two experts (Wan 2.2, arXiv 2503.20314): one for times of high noise, one for those below a boundary.
All requests are denoised by the first before the second, and each begins with a state of its own, if it has any. If
weights are in host memory, only those of the active expert are on the devices (see `core.offload`).
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32

from dit_video.core.errors import UserError
from dit_video.core.memory import name_exhausted_memory
from dit_video.core.rng import key
from dit_video.diffusion import Process, SampleTimes, SamplingState, init_sampling
from dit_video.distributed.gather import to_host
from dit_video.sampling.denoiser import Denoiser
from dit_video.sampling.packing import (
    START_LATENTS,
    PlannedBatch,
    SamplingBatch,
    SamplingRequest,
    embed_prompts,
    plan_batches,
)
from dit_video.sampling.plan import BlockEnd
from dit_video.sampling.program import (
    ProgramArguments,
    compute_program_steps,
    make_argument_shardings,
    make_program,
    put_on_devices,
    start_model,
)
from dit_video.sampling.sampling_config import Sampling
from dit_video.tokens import Grid, LayoutShape

_EXHAUSTED_MEMORY_FIX = (
    "Use offload=Layers() (--offload layers), a smaller size or a mesh of several devices; "
    "tools/plan.py FOLDER --of sampler plans the memory"
)
_BLOCK_STEPS = 8
"""Number of steps in a block, after which Ctrl-C stops a run."""
_UPDATES = 16
"""Number of blocks of all steps, if latents are changed or steps are repeated between them."""


class SamplingProgress(NamedTuple):
    """The progress of the requests that are sampled together, after a block of steps."""

    planned: PlannedBatch
    step: int
    """Number of steps that are done."""
    steps: int
    """Number of all steps."""
    data: Float[Array, "B N p"]
    """Tokens of the data that the block's steps lead to."""

    @property
    def requests(self) -> tuple[int, ...]:
        """Return the numbers of the requests."""
        return tuple(sorted(index for row in self.planned.row_requests for index in row))

    def estimate_latents(self) -> dict[int, Float32[np.ndarray, "_ _ _ c"]]:
        """Return the latents `t h w c` that every request leads to, for previews."""
        return self.planned.unpack_latents(self.data)


class Monitor(NamedTuple):
    """A function that is called with the progress after every block of steps. What it raises ends the sampling."""

    function: Callable[[SamplingProgress], object]
    block_steps: int = 4
    """Number of steps in a block, unless latents are changed or steps are repeated between blocks."""


class LatentTrace(NamedTuple):
    """The sampling trajectory of one video."""

    times: Float32[np.ndarray, " steps+1"]
    """Times from noise to data."""
    latents: Float32[np.ndarray, "steps t h w c"]
    """Latents after each step."""
    data: Float32[np.ndarray, "steps t h w c"]
    """Estimated result at the start of each step."""


def sample_latents(
    denoiser: Denoiser,
    requests: Sequence[SamplingRequest],
    *,
    sampling: Sampling,
    shape: LayoutShape,
    rows: int,
    monitor: Monitor | None = None,
) -> list[Float32[np.ndarray, "t h w c"]]:
    """Return the latents of every request, in order.

    Requests are packed into rows of `shape`, and `rows` rows are sampled at a time. A request larger than a row gets a
    row of its own, for which a program is compiled. A result does not depend on the other requests. On a mesh, rows are
    padded, so that all devices share them and their tokens; all its processes call this, and all get the results.

    Args:
      denoiser: The trained denoiser.
      requests: Requests of latents.
      sampling: Steps, solver and guidance.
      shape: Shape of a row.
      rows: Number of rows that are sampled at a time.
      monitor: Called after every block of steps; what it raises ends the sampling.

    Raises:
      UserError: If the patch does not divide a size, a prompt is longer than a row's text, a single model gets two
        guidance scales, a plan does not fit, values become NaN or infinite (the message names the step), or the
        device's memory is too small.
    """
    results: dict[int, Float32[np.ndarray, "t h w c"]] = {}
    with name_exhausted_memory("sampling", _EXHAUSTED_MEMORY_FIX):
        for planned, state in BatchSampler(denoiser, sampling, monitor).run(requests, shape, rows):
            results |= planned.unpack_latents(state.x)
    return [results[index] for index in range(len(requests))]


def trace_latents(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> list[LatentTrace]:
    """Sample like `sample_latents`, and return trajectories; the program is compiled for this number of steps.

    If steps are taken several times (`resample`), they hold the last time.
    """
    results: dict[int, LatentTrace] = {}
    for planned, state in BatchSampler(denoiser, sampling, has_trace=True).run(requests, shape, rows):
        assert state.trace is not None
        trajectories = [[planned.unpack_latents(tokens) for tokens in to_host(values)] for values in state.trace]
        for index in trajectories[0][0]:
            latents, data = (np.stack([step[index] for step in steps]) for steps in trajectories)
            results[index] = LatentTrace(planned.times, latents, data)
    return [results[index] for index in range(len(requests))]


def draw_initial_noise(seed: int, latents: Grid, channels: int) -> Float32[np.ndarray, "t h w c"]:
    """Return standard normal noise, a function of the seed and the size."""
    return np.asarray(jax.random.normal(key(seed, "sample"), (*latents, channels), jnp.float32))


class BatchSampler(NamedTuple):
    """A sampler of batches of requests."""

    denoiser: Denoiser
    sampling: Sampling
    monitor: Monitor | None = None
    has_trace: bool = False

    def run(
        self, requests: Sequence[SamplingRequest], shape: LayoutShape, rows: int
    ) -> Iterator[tuple[PlannedBatch, SamplingState]]:
        """Yield the batches of the requests, each with its state after the last step."""
        denoiser, sampling = self.denoiser, self.sampling
        texts = embed_prompts(denoiser, requests, sampling)  # before the denoiser's weights are copied to the devices
        planned_batches = plan_batches(denoiser, requests, texts, sampling, shape, rows)
        runs: Iterator[tuple[PlannedBatch, SamplingState]]
        runs = ((planned, _init_state(denoiser, planned, sampling, self.has_trace)) for planned in planned_batches)
        for number, expert in enumerate(denoiser.experts):
            # All before the next expert: otherwise its weights would be copied while those of this one are in use.
            unfinished: list[tuple[PlannedBatch, SamplingState]] = []
            with denoiser.open_params(expert) as params:
                for planned, state in runs:
                    state = self.start_model(number, planned, state)
                    for block in self._iterate_blocks(number, planned):
                        times = _slice_times(planned, range(block.first, block.last))
                        program, arguments = self.prepare_steps(params, number, planned, state, times, block.first)
                        # A block ends before the next begins, so that Ctrl-C stops between them.
                        before, state = state.x, jax.block_until_ready(program(*arguments))
                        state = self._finish_block(planned, block, before, state)
                    if expert == denoiser.experts[-1]:
                        _check_finite(planned, state, sampling)
                        yield planned, state
                    else:
                        unfinished.append((planned, state))
            runs = iter(unfinished)

    def _iterate_blocks(self, number: int, planned: PlannedBatch) -> Iterator["_Block"]:
        """Yield the blocks of steps of one expert, which may be none, each as often as it is taken."""
        start, stop = _get_expert_steps(self.denoiser, number, planned, self.sampling)
        block_steps = choose_block_steps(planned, self.monitor)
        for first in range(start, stop, block_steps):
            for repeat in range(planned.resample):
                is_repeated = repeat + 1 < planned.resample
                yield _Block(number, first, min(first + block_steps, stop), repeat, is_repeated)

    def _finish_block(
        self, planned: PlannedBatch, block: "_Block", before: Array, state: SamplingState
    ) -> SamplingState:
        """Return the state after the updates of a block, at its start if it is repeated, and report the progress."""
        if planned.has_updates or self.monitor is not None:
            ends = _get_ends(planned, block)
            parts = estimate_parts(self.denoiser.process, before, state.x, *ends)
            state = self._update(planned, state, parts, block)
            if self.monitor is not None and not block.is_repeated:
                self.monitor.function(SamplingProgress(planned, block.last, self.sampling.steps, parts[0]))
        return self._return(planned, state, block) if block.is_repeated else state

    def start_model(self, number: int, planned: PlannedBatch, state: SamplingState) -> SamplingState:
        """Return the state with that of the model before the first step of an expert, by its number."""
        batch, guidance = _choose_branches(planned, number, self.sampling)
        is_batched = self.sampling.branch_evaluation == "together"
        return start_model(state, self.denoiser.config, batch, guidance, is_batched=is_batched)

    def prepare_steps(
        self,
        params: dict[str, Any],
        number: int,
        planned: PlannedBatch,
        state: SamplingState,
        times: SampleTimes,
        first: int,
    ) -> tuple[Callable[..., SamplingState], ProgramArguments]:
        """Return the program that takes the steps between some times to the state after them, and its arguments.

        Args:
          params: Parameters of the expert and of the text encoder, on the devices.
          number: Number of the expert.
          planned: Rows of requests.
          state: State before the steps.
          times: Their times.
          first: Number of the first one, for random numbers.
        """
        denoiser = self.denoiser
        capacity = len(times.times) - 1 if self.has_trace else compute_program_steps(self.sampling.steps)
        arguments = _make_arguments(planned, number, self.sampling, _pad_times(times, capacity), first)
        arguments = arguments._replace(params=params, state=state)
        if denoiser.mesh is not None:
            _, *others = arguments
            _, *shardings = make_argument_shardings(arguments, denoiser.mesh)
            arguments = ProgramArguments(params, *put_on_devices(others, shardings))
        return _make_program(denoiser, planned, self.sampling), arguments

    def _update(
        self, planned: PlannedBatch, state: SamplingState, parts: tuple[Array, Array], block: "_Block"
    ) -> SamplingState:
        """Return the state with the latents that the plans change."""
        if not planned.has_updates:
            return state
        time = float(np.asarray(planned.sample_times.times)[block.last])
        data, noise = map(planned.unpack_latents, parts)
        changed = {}
        for index, latents in planned.unpack_latents(state.x).items():
            if (update := planned.requests[index].plan.update) is not None:
                end = BlockEnd(block.last, time, self.denoiser.process, data[index], noise[index])
                changed[index] = update(latents, end)
        sample, trace = jnp.asarray(planned.pack_latents(state.x, changed)), state.trace
        if trace is not None:
            trace = trace._replace(x=trace.x.at[state.steps_done - 1].set(sample))
        return self._restart(planned, state._replace(trace=trace), sample, block.expert, block.last)

    def _return(self, planned: PlannedBatch, state: SamplingState, block: "_Block") -> SamplingState:
        """Return the state with noise added, at the first time of a block."""
        noise = planned.draw_noise(self.sampling.steps * (block.repeat + 1) + block.last)
        noisy = return_to_time(self.denoiser.process, state.x, noise, *_get_ends(planned, block))
        state = self._restart(planned, state, noisy, block.expert, block.first)
        return state._replace(steps_done=state.steps_done - (block.last - block.first))

    def _restart(
        self, planned: PlannedBatch, state: SamplingState, sample: Array, expert: int, step: int
    ) -> SamplingState:
        """Return the state with another sample, which earlier steps of a solver and a model do not lead to."""
        solver = self.sampling.solver.init(sample, steps=self.sampling.steps - step)
        return self.start_model(expert, planned, state._replace(solver=solver))


class _Block(NamedTuple):
    """A block of steps."""

    expert: int
    """Number of the expert that takes them."""
    first: int
    """Number of its first step."""
    last: int
    """Number of the first step after it."""
    repeat: int
    """Number of times that it has been taken before."""
    is_repeated: bool
    """True if it is taken again."""


def choose_block_steps(planned: PlannedBatch, monitor: Monitor | None) -> int:
    """Return the number of steps in a block of a batch."""
    if planned.has_updates or planned.resample > 1:
        # Results depend on these blocks, and not on who watches.
        return min(_BLOCK_STEPS, -(-(len(planned.times) - 1) // _UPDATES))
    return _BLOCK_STEPS if monitor is None else monitor.block_steps


def _get_ends(planned: PlannedBatch, block: _Block) -> tuple[Array, Array]:
    """Return the times at the start and at the end of a block."""
    times = jnp.asarray(planned.sample_times.times)
    return times[block.first], times[block.last]


def estimate_parts(
    process: Process,
    before: Float[Array, "*shape"],
    after: Float[Array, "*shape"],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> tuple[Float[Array, "*shape"], Float[Array, "*shape"]]:
    """Return the data and the noise that samples at two times are mixtures of.

    This is the model's estimate for one step of DDIM, and a mean of its estimates for several. It needs no evaluation.
    """
    alpha, sigma, next_alpha, next_sigma = (
        function(each) for each in (time, next_time) for function in (process.alpha, process.sigma)
    )
    determinant = next_alpha * sigma - alpha * next_sigma
    data = (sigma * after - next_sigma * before) / determinant
    return data, (next_alpha * before - alpha * after) / determinant


def return_to_time(
    process: Process,
    sample: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    time: Float[Array, ""],
    next_time: Float[Array, ""],
) -> Float[Array, "*shape"]:
    """Return a sample at `next_time` with noise added up to the earlier `time` of sampling (RePaint, equation 1)."""
    alpha_ratio = process.alpha(time) / process.alpha(next_time)
    return alpha_ratio * sample + process.added_variance(time, next_time) ** 0.5 * noise


def list_programs(
    denoiser: Denoiser, requests: Sequence[SamplingRequest], *, sampling: Sampling, shape: LayoutShape, rows: int
) -> Iterator[tuple[str, Callable[..., SamplingState], ProgramArguments]]:
    """Yield the programs that `sample_latents` runs on one device: expert, program, and shapes of its arguments.

    Nothing is computed but the texts, so that the parameters may be shapes.
    """
    texts = embed_prompts(denoiser, requests, sampling)
    for planned in plan_batches(denoiser, requests, texts, sampling, shape, rows):
        state = jax.eval_shape(functools.partial(_init_state, denoiser, planned, sampling, has_trace=False))
        for number, expert in enumerate(denoiser.experts):
            if steps := range(*_get_expert_steps(denoiser, number, planned, sampling)):
                times = _pad_times(_slice_times(planned, steps), compute_program_steps(sampling.steps))
                arguments = _make_arguments(planned, number, sampling, times, steps.start)
                params = {"backbone": denoiser.params[expert], "text": denoiser.params["text"]}
                arguments = jax.eval_shape(lambda values=arguments: values)
                start = functools.partial(BatchSampler(denoiser, sampling).start_model, number, planned)
                arguments = arguments._replace(params=params, state=jax.eval_shape(start, state))
                yield expert, _make_program(denoiser, planned, sampling), arguments


def _make_program(denoiser: Denoiser, planned: PlannedBatch, sampling: Sampling) -> Callable[..., SamplingState]:
    is_batched = sampling.branch_evaluation == "together"
    kinds = denoiser.backbone, denoiser.text, denoiser.process, denoiser.prediction, sampling.solver
    return make_program(*kinds, planned.transform, is_batched, denoiser.mesh)


def _init_state(denoiser: Denoiser, planned: PlannedBatch, sampling: Sampling, has_trace: bool) -> SamplingState:
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
    guidance_state = sampling.guidance.init_state(noisy)
    return init_sampling(sampling.solver, noisy, steps=steps, denoiser=guidance_state, has_trace=has_trace)


def _get_expert_steps(denoiser: Denoiser, number: int, planned: PlannedBatch, sampling: Sampling) -> tuple[int, int]:
    """Return the numbers of the first step of an expert, and of the first after its last."""
    last_noisy = sampling.steps
    if denoiser.boundary is not None:
        model_times = np.asarray(planned.sample_times.model_times)
        last_noisy = int((model_times[:-1] >= np.float32(denoiser.boundary)).sum())
    bounds = ((planned.first_step, last_noisy), (max(planned.first_step, last_noisy), sampling.steps))
    return bounds[number]


def _make_arguments(
    planned: PlannedBatch, number: int, sampling: Sampling, times: SampleTimes, first: int
) -> ProgramArguments:
    """Return the program's arguments for some steps of an expert, without parameters and state."""
    return ProgramArguments(None, None, *_choose_branches(planned, number, sampling), times, np.int32(first))


def _choose_branches(planned: PlannedBatch, number: int, sampling: Sampling) -> tuple[SamplingBatch, Any]:
    """Return the rows that an expert evaluates, and its parameters of guidance; None without guidance."""
    guidance, batch, count = sampling.guidance, planned.batch, sampling.guidance.branch_count
    # An expert whose scales are 1 needs fewer branches. A state still needs them all, and so do rows that hold them.
    if not planned.is_side_by_side and not guidance.has_state:
        count = guidance.count_branches(number)
        batch = batch._replace(branches=batch.branches[:count])
    all_times = np.asarray(planned.sample_times.times, np.float32)
    return batch, guidance.get_params(all_times, expert=number, branch_count=count)


def _check_finite(planned: PlannedBatch, state: SamplingState, sampling: Sampling) -> None:
    step = int(state.failed_step)
    if step < 0:
        return
    if not all(np.isfinite(latents).all() for latents in planned.unpack_latents(state.x).values()):
        raise UserError(
            f"step {planned.first_step + step + 1} of {sampling.steps}, at time {float(planned.times[step]):.4g}, gave "
            "NaN or infinity: the weights have diverged, or the sampling is too coarse for them. Use an earlier "
            "checkpoint, or less guidance."
        )


def _slice_times(planned: PlannedBatch, steps: range) -> SampleTimes:
    """Return the times of some steps."""
    return SampleTimes(*(values[steps.start : steps.stop + 1] for values in planned.sample_times))


def _pad_times(times: SampleTimes, capacity: int) -> SampleTimes:
    """Return times padded with the last one to `capacity` intervals."""
    missing = capacity + 1 - len(times.times)
    padded = (np.pad(np.asarray(values, np.float32), (0, missing), mode="edge") for values in times)
    return SampleTimes(*jax.device_put(list(padded)))
