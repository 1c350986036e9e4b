"""From noise to data: the loop that runs a solver, and the solvers by name.

The loop is one `lax.scan` over the intervals of the times: compiled once for a shape and a number of steps, whatever
the times. Noise for the stochastic ones comes from `draw`, a function of the step's number.
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
"""Standard normal noise for a step, by its number from 0 on, in the shape of the sample."""

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
    """The sampler of a name that a person typed.

    Raises:
      UserError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; use one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def draws(keys: Key[Array, " B"], shape: tuple[int, ...]) -> Draw:
    """Noise of each sample of a batch by its own key, whatever else is in the batch.

    Args:
      keys: one a sample, used for nothing else.
      shape: of one sample, without the batch's axis.
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
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` is given the time as a scalar.

    Args:
      denoise: the model.
      noise: standard normal.
      times: falling; see `grids`.
      process: what the model was trained on.
      solver: of the flow, or of the reverse process.
      prediction: what the model predicts.
      told: what the model is given as its time at each of `times`, where that is something else.
      draw: the noise of each step, of a solver that is stochastic; see `draws`.

    Raises:
      UserError: a stochastic solver that is given no noise, or one that can't follow the process.
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
    """`sample` with all that it went through: `x[-1]` of the trace is the sample. Arguments and errors are the same."""
    watched = Watched(solver=solver, recorded=True)
    start = watched.init(process.start(noise), steps=times.shape[0] - 1)
    end = advance(denoise, start, times, process=process, solver=watched, prediction=prediction, told=told, draw=draw)
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
    """A part of the way, from a solver's state to its state at the last of `times`; arguments are as for `sample`.

    Parts that follow one another are the whole, whatever model each has: the state knows how many steps there are, and
    `first` is the number of the part's first step.
    """
    _check(solver, process, draw)
    estimate: Estimator = estimator(_told(denoise, times, told), process, prediction)

    def step(state, interval):
        time, following, number = interval
        drawn = draw(number) if draw is not None and solver.stochastic else None
        return solver.step(estimate, process, state, Interval(time, following, drawn)), None

    numbers = first + jnp.arange(times.shape[0] - 1)
    return jax.lax.scan(step, state, (times[:-1], times[1:], numbers))[0]


def _check(solver: Solver, process: Process, draw: Draw | None) -> None:
    solver.check(process)
    if solver.stochastic and draw is None:
        raise UserError(f"{solver.name} draws noise in every step; hand it over as draw, such as draws(keys, shape)")


def _told(denoise: Denoise, times: Float[Array, " times"], told: Float[Array, " times"] | None) -> Denoise:
    """`denoise`, given another time; solvers evaluate it at the grid's times alone."""
    if told is None:
        return denoise
    return lambda noisy, time, *past: denoise(noisy, told[jnp.argmin(jnp.abs(times - time), axis=0)], *past)
