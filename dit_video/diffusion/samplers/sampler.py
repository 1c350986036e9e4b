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
from dit_video.diffusion.predictions import Denoise, Estimator, Prediction, Velocity, estimator
from dit_video.diffusion.processes.process import Process
from dit_video.diffusion.samplers.ancestral import Ddim, Ddpm, Lcm
from dit_video.diffusion.samplers.dpm_solver import DpmMultistep, DpmSinglestep
from dit_video.diffusion.samplers.momentum import Remembering
from dit_video.diffusion.samplers.solvers import Euler, Heun, Interval, Solver
from dit_video.diffusion.samplers.traced import Trace, Watched
from dit_video.diffusion.samplers.unipc import UniPc

Draw = Callable[[Int[Array, ""]], Float[Array, "*shape"]]
"""Standard normal noise of a step, by its number from 0 on, in the shape of the sample."""

Sampler = Euler | Heun | Ddim | Ddpm | DpmMultistep | DpmSinglestep | UniPc | Lcm
SAMPLERS: dict[str, Sampler] = {
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


def sampler(name: str) -> Sampler:
    """Return the sampler with this name.

    Raises:
      UserError: If no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; use one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def draws(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Draw:
    """Return a function that draws each sample's noise with its own key, independent of the rest of the batch.

    Args:
      keys: One key per sample, used for nothing else.
      shape: Shape of one sample, without the batch axis.
    """
    return lambda number: jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), shape))(keys)


def sample(
    denoise: Denoise,
    noise: Float[Array, "*shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Sampler | Remembering,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
    draw: Draw | None = None,
) -> Float[Array, "*shape"]:
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
    start = solver.init(process.start(noise), steps=times.shape[0] - 1)
    return advance(denoise, start, times, process=process, solver=solver, prediction=prediction, told=told, draw=draw).x


def trace(
    denoise: Denoise,
    noise: Float[Array, "*shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Sampler | Remembering,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
    draw: Draw | None = None,
) -> Trace:
    """Run `sample` and return all intermediate results; `x[-1]` of the trace is the sample.

    Arguments and errors are those of `sample`.
    """
    traced_solver = Watched(solver=solver, recorded=True)
    start = traced_solver.init(process.start(noise), steps=times.shape[0] - 1)
    end = advance(
        denoise, start, times, process=process, solver=traced_solver, prediction=prediction, told=told, draw=draw
    )
    return end.recorded


def advance(
    denoise: Denoise,
    state: Any,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Solver,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
    draw: Draw | None = None,
    first: Int[Array, ""] | int = 0,
) -> Any:
    """Advance a solver's state to the last of `times`; arguments are as for `sample`.

    Consecutive calls are equivalent to a single one, even with different models: the state knows the number of steps,
    and `first` is the number of the first step of this call.
    """
    _check(solver, process, draw)
    estimate: Estimator = estimator(_told(denoise, times, told), process, prediction)

    def step(state, interval):
        time, next_time, number = interval
        noise = draw(number) if draw is not None and solver.stochastic else None
        return solver.step(estimate, process, state, Interval(time, next_time, noise)), None

    numbers = first + jnp.arange(times.shape[0] - 1)
    return jax.lax.scan(step, state, (times[:-1], times[1:], numbers))[0]


def _check(solver: Solver, process: Process, draw: Draw | None) -> None:
    solver.check(process)
    if solver.stochastic and draw is None:
        raise UserError(
            f"noise_fn=None is invalid: {solver.name} draws noise in every step. Use "
            "noise_fn=make_noise_fn(keys, shape)."
        )


def _told(denoise: Denoise, times: Float[Array, " times"], told: Float[Array, " times"] | None) -> Denoise:
    """Return `denoise` with the model time in place of the time; solvers evaluate it at the schedule's times only."""
    if told is None:
        return denoise
    return lambda noisy, time, *past: denoise(noisy, told[jnp.argmin(jnp.abs(times - time), axis=0)], *past)
