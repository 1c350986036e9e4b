"""Samplers: the loop that runs a solver from noise to data, and the solvers by name.

The loop is one `lax.scan` over the intervals of the times. It is compiled once per shape and number of steps, for all
values of the times. Stochastic solvers get their noise from `noise_fn`, a function of the step number.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dit_video.core.errors import UserError
from dit_video.diffusion.predictions import DenoiseFn, Estimator, Prediction, Velocity, make_estimator
from dit_video.diffusion.processes.process import Process, Values
from dit_video.diffusion.samplers.ancestral import Ddim, Ddpm, Lcm
from dit_video.diffusion.samplers.dpm_solver import DpmMultistep, DpmSinglestep
from dit_video.diffusion.samplers.momentum import Remembering
from dit_video.diffusion.samplers.solvers import Euler, Heun, Solver, StepInterval
from dit_video.diffusion.samplers.traced import Trace, TracedSampler
from dit_video.diffusion.samplers.unipc import UniPc

NoiseFn = Callable[[Int[Array, ""]], Values]
"""Standard normal noise of a step, by its number from 0 on, in the shape of the sample."""

DiffusionSampler = Euler | Heun | Ddim | Ddpm | DpmMultistep | DpmSinglestep | UniPc | Lcm
SAMPLERS: dict[str, DiffusionSampler] = {
    "ddim": Ddim(),
    "ddpm": Ddpm(),
    "dpm++2m": DpmMultistep(),
    "dpm++2s": DpmSinglestep(),
    "dpm++sde": DpmMultistep(eta=1.0),
    "euler": Euler(),
    "euler-ancestral": Ddim(eta=1.0),
    "heun": Heun(),
    "lcm": Lcm(),
    "unipc": UniPc(),
}


def get_sampler(name: str) -> DiffusionSampler:
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


def sample(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: DiffusionSampler | Remembering,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
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

    Raises:
      UserError: If a stochastic solver gets no noise, or the solver can't follow the process.
    """
    start = solver.init(process.scale_initial_noise(noise), steps=times.shape[0] - 1)
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    return advance(denoise, start, times, process=process, solver=solver, **options).x


def trace(
    denoise: DenoiseFn,
    noise: Values,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: DiffusionSampler | Remembering,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
) -> Trace:
    """Run `sample` and return all intermediate results; `x[-1]` of the trace is the sample.

    Arguments and errors are those of `sample`.
    """
    traced_solver = TracedSampler(solver=solver, has_trace=True)
    start = traced_solver.init(process.scale_initial_noise(noise), steps=times.shape[0] - 1)
    options: dict[str, Any] = {"prediction": prediction, "model_times": model_times, "noise_fn": noise_fn}
    return advance(denoise, start, times, process=process, solver=traced_solver, **options).trace


def advance(
    denoise: DenoiseFn,
    state: Any,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    model_times: Float[Array, " times"] | None = None,
    noise_fn: NoiseFn | None = None,
    first_step: Int[Array, ""] | int = 0,
) -> Any:
    """Advance a solver's state to the last of `times`; arguments are as for `sample`.

    Consecutive calls are equivalent to a single one, even with different models: the state knows the number of steps,
    and `first` is the number of the first step of this call.
    """
    solver.check(process)
    if solver.stochastic and noise_fn is None:
        raise UserError(f"noise_fn=None is invalid: {solver.name} draws noise. Use make_noise_fn(keys, shape).")
    estimate: Estimator = make_estimator(_replace_time(denoise, times, model_times), process, prediction)

    def step(state, interval):
        time, next_time, number = interval
        noise = noise_fn(number) if noise_fn is not None and solver.stochastic else None
        return solver.step(estimate, process, state, StepInterval(time, next_time, noise)), None

    numbers = first_step + jnp.arange(times.shape[0] - 1)
    return jax.lax.scan(step, state, (times[:-1], times[1:], numbers))[0]


def _replace_time(
    denoise: DenoiseFn, times: Float[Array, " times"], model_times: Float[Array, " times"] | None
) -> DenoiseFn:
    """Return `denoise` with the model time in place of the time; solvers evaluate it at the schedule's times only."""
    if model_times is None:
        return denoise
    return lambda noisy, time, *past: denoise(noisy, model_times[jnp.argmin(jnp.abs(times - time), axis=0)], *past)
