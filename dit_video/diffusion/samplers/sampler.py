"""Samplers: the loop that runs a solver from noise to data, and the solvers by name.

The loop is one `lax.scan` over the intervals of the times. It is compiled once per shape and number of steps, for all
values of the times. Stochastic solvers get their noise from `noise_fn`, a function of the step number.

The loop also carries the state of `denoise`. All evaluations within a step get the state that the step began with, and
the one that the first of them returns is kept, so that solvers with two evaluations per step also count each step once.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import DenoiseFn, Prediction, Velocity, estimate_with_state
from dit_video.diffusion.processes.process import Estimate, Process, Values
from dit_video.diffusion.samplers.ancestral import Ddim, Ddpm, Lcm
from dit_video.diffusion.samplers.dpm_solver import DpmMultistep, DpmSinglestep
from dit_video.diffusion.samplers.pndm import Pndm
from dit_video.diffusion.samplers.solvers import Euler, Heun, Solver, StepInterval
from dit_video.diffusion.samplers.unipc import UniPc

NoiseFn = Callable[[Int[Array, ""]], Values]
"""Standard normal noise of a step, by its number from 0 on, in the shape of the sample."""

TransformFn = Callable[[Values, Float[Array, ""], Int[Array, ""]], Values]
"""Change of the sample after a step, from the sample, its time and the step's number."""

SAMPLERS: dict[str, Solver] = {
    "ddim": Ddim(),
    "ddpm": Ddpm(),
    "dpm++2m": DpmMultistep(),
    "dpm++2s": DpmSinglestep(),
    "dpm++sde": DpmMultistep(eta=1.0),
    "euler": Euler(),
    "euler-ancestral": Ddim(eta=1.0),
    "heun": Heun(),
    "lcm": Lcm(),
    "pndm": Pndm(),
    "unipc": UniPc(),
}


def get_sampler(name: str) -> Solver:
    """Return the sampler with this name.

    Raises:
      UserError: If no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; use one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def make_noise_fn(keys: Key[Array, " B"], shape: tuple[int, ...]) -> NoiseFn:
    """Return a function that draws each sample's noise with its own key, independent of the rest of the batch.

    Args:
      keys: One key per sample, used for nothing else.
      shape: Shape of one sample, without the batch axis.
    """
    return lambda number: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


class Trace(NamedTuple):
    """The trajectory of a sampling run."""

    x: Float[Array, "steps *shape"]
    """The sample after each step."""
    data: Float[Array, "steps *shape"]
    """The data estimated at the start of each step."""


class SamplingState(NamedTuple):
    """All that sampling carries from step to step."""

    solver: Any
    """State of the solver."""
    denoiser: Any
    """State of `denoise`; None if it has none."""
    steps_done: Int[Array, ""]
    """Number of steps that are done."""
    failed_step: Int[Array, ""]
    """Number of the first step, from 0 on, after which a value was not finite; -1 if there is none."""
    trace: Trace | None
    """Trajectory so far; None if it is not kept."""

    @property
    def x(self) -> Values:
        """Return the sample."""
        return self.solver.x


def init_sampling(
    solver: Solver, noisy: Values, *, steps: int, denoiser: Any = None, has_trace: bool = False
) -> SamplingState:
    """Return the state before the first of `steps` steps, not counting those of length 0.

    Args:
      solver: The solver.
      noisy: The sample to start from, such as `process.scale_initial_noise(noise)`.
      steps: Number of steps.
      denoiser: Initial state of `denoise`.
      has_trace: Keeps all intermediate results, in an array for `steps` steps.
    """
    trace = Trace(*(jnp.zeros((steps, *noisy.shape), noisy.dtype) for _ in range(2))) if has_trace else None
    done, failed = jnp.zeros((), jnp.int32), jnp.full((), -1, jnp.int32)
    return SamplingState(solver.init(noisy, steps=steps), denoiser, done, failed, trace)


def sample(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    state: Any = None,
) -> Values:
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` gets the time as a scalar.

    Args:
      denoise: The model.
      noise: Standard normal noise.
      times: Falling times; see `time_schedules`.
      process: The process that the model was trained on.
      solver: The solver of the probability flow or of the reverse process.
      prediction: The kind of the model's prediction.
      model_times: The time that the model receives at each of `times`, if it differs.
      noise_fn: The noise of each step for a stochastic solver; see `make_noise_fn`.
      state: Initial state of `denoise`.

    Raises:
      UserError: If a stochastic solver gets no noise, or the solver can't follow the process.
    """
    start = init_sampling(solver, process.scale_initial_noise(noise), steps=times.shape[0] - 1, denoiser=state)
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    return advance(denoise, start, times, process=process, solver=solver, **options).x


def trace(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    state: Any = None,
) -> Trace:
    """Run `sample` and return all intermediate results; `x[-1]` of the trace is the sample.

    Arguments and errors are those of `sample`.
    """
    start = init_sampling(
        solver, process.scale_initial_noise(noise), steps=times.shape[0] - 1, denoiser=state, has_trace=True
    )
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    result = advance(denoise, start, times, process=process, solver=solver, **options).trace
    assert result is not None, "the initial state has a trace"
    return result


def advance(
    denoise: DenoiseFn,
    state: SamplingState,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    first_step: Int[Array, ""] | int = 0,
    transform: TransformFn | None = None,
) -> SamplingState:
    """Advance sampling to the last of `times`; arguments are as for `sample`.

    Consecutive calls are equivalent to a single one, even with different models: the state knows the number of steps,
    and `first_step` is the number of the first step of this call. Steps of length 0 are skipped and cost nothing: times
    may be padded with their last one, so that one program serves several numbers of steps.

    `transform` changes the sample after each step, and estimated data in the trace as at time 0.
    """
    solver.check(process)
    if solver.stochastic and noise_fn is None:
        raise UserError(f"noise_fn=None is invalid: {solver.name} draws noise. Use make_noise_fn(keys, shape).")
    model_times = times if model_times is None else model_times

    def take_step(state: SamplingState, index: Array) -> SamplingState:
        time, next_time, number = times[index], times[index + 1], first_step + index
        evaluations: list[tuple[Estimate, Any]] = []

        def estimate(noisy: Values, end: Array) -> Estimate:
            model_time, next_model_time = model_times[index], model_times[index + 1]
            passed = jnp.where(end == next_time, 1.0, (time - end) / (time - next_time))
            model_time = (1 - passed) * model_time + passed * next_model_time
            model = lambda noisy, _, state: denoise(noisy, model_time, state)  # noqa: E731
            evaluations.append(estimate_with_state(model, process, prediction, noisy, end, state.denoiser))
            return evaluations[-1][0]

        noise = noise_fn(number) if noise_fn is not None and solver.stochastic else None
        solver_state = solver.step(estimate, process, state.solver, StepInterval(time, next_time, noise))
        first, denoiser_state = evaluations[0]
        data = first.data
        if transform is not None:
            solver_state = solver_state._replace(x=transform(solver_state.x, next_time, number))
            data = transform(data, jnp.zeros_like(next_time), number)
        step, trace = state.steps_done, state.trace
        if trace is not None:
            trace = Trace(trace.x.at[step].set(solver_state.x), trace.data.at[step].set(data))
        is_first_failure = (state.failed_step < 0) & ~jnp.isfinite(solver_state.x).all(axis=None)
        failed_step = jnp.where(is_first_failure, step, state.failed_step)
        return SamplingState(solver_state, denoiser_state, step + 1, failed_step, trace)

    def step(state, index):
        is_empty = times[index] == times[index + 1]
        return jax.lax.cond(is_empty, lambda: state, lambda: take_step(state, index)), None

    return jax.lax.scan(step, state, jnp.arange(times.shape[0] - 1))[0]
