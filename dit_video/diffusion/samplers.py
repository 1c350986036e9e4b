"""From noise to data: the loop that runs a solver, and the solvers by name.

A solver exports `init(noisy, steps=...) -> state` and `step(estimate, process, state, interval) -> state`; a state's
`x` is the sample at its time. The loop is one `lax.scan`: compiled once for a shape, whatever the times.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dit_video.diffusion.predictions import Denoise, Prediction, Velocity, estimator
from dit_video.diffusion.process import Process
from dit_video.diffusion.solvers import Euler, Heun, Interval
from dit_video.diffusion.unipc import UniPc
from dit_video.errors import UserError

Draw = Callable[[Int[Array, ""]], Float[Array, "*shape"]]
"""Standard normal noise for a step, by its number from 0 on, in the shape of the sample."""

Sampler = Euler | Heun | UniPc
SAMPLERS: dict[str, Sampler] = {"euler": Euler(), "heun": Heun(), "unipc": UniPc()}


def sampler(name: str) -> Sampler:
    """The sampler of a name that a person typed.

    Raises:
      UserError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; use one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def sample(
    denoise: Denoise,
    noise: Float[Array, "*shape"],
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Sampler,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
    draw: Draw | None = None,
) -> Float[Array, "*shape"]:
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` is given the time as a scalar.

    Args:
      denoise: the model.
      noise: standard normal.
      times: falling; see `grids`.
      process: what the model was trained on.
      solver: of the flow, or of the reverse process.
      prediction: what the model predicts.
      told: what the model is given as its time at each of `times`, where that is something else.
      draw: the noise of each step, of a solver that is stochastic.

    Raises:
      UserError: a stochastic solver that is given no noise.
    """
    start = solver.init(process.start(noise), steps=times.shape[0] - 1)
    return advance(denoise, start, times, process=process, solver=solver, prediction=prediction, told=told, draw=draw).x


def advance(
    denoise: Denoise,
    state: Any,
    times: Float[Array, " times"],
    *,
    process: Process,
    solver: Sampler,
    prediction: Prediction = Velocity(),  # noqa: B008 (a value)
    told: Float[Array, " times"] | None = None,
    draw: Draw | None = None,
    first: Int[Array, ""] | int = 0,
) -> Any:
    """A part of the way, from a solver's state to its state at the last of `times`; arguments are as for `sample`.

    Parts that follow one another are the whole, whatever model each has: the state knows how many steps there are, and
    `first` is the number of the part's first step.
    """
    if told is not None:
        denoise = _told(denoise, times, told)
    estimate = estimator(denoise, process, prediction)

    def step(state, interval):
        time, following, number = interval
        noise = None if draw is None else draw(number)
        return solver.step(estimate, process, state, Interval(time, following, noise)), None

    numbers = first + jnp.arange(times.shape[0] - 1)
    end, _ = jax.lax.scan(step, state, (times[:-1], times[1:], numbers))
    return end


def _told(denoise: Denoise, times: Float[Array, " times"], told: Float[Array, " times"]) -> Denoise:
    """`denoise`, given another time; solvers evaluate it at the grid's times alone."""
    return lambda noisy, time: denoise(noisy, told[jnp.argmin(jnp.abs(times - time), axis=0)])
