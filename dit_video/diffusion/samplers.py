"""From noise to data: ODE solvers, and the loop that runs one.

A solver exports `init(noisy, steps=…) -> state` and `step(denoise, process, state, time, following) -> state`; a
state's `x` is the sample at its time. The loop is one `lax.scan`: compiled once for a shape, whatever the times.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.diffusion.objective import Denoise
from dit_video.diffusion.process import RectifiedFlow
from dit_video.diffusion.unipc import UniPc
from dit_video.errors import UserError


class SolverState(NamedTuple):
    """What a one-step solver carries."""

    x: Float[Array, "*shape"]


@dataclass(frozen=True, kw_only=True)
class Euler:
    """First order: one evaluation a step."""

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> SolverState:
        return SolverState(noisy)

    def step(
        self,
        denoise: Denoise,
        process: RectifiedFlow,
        state: SolverState,
        time: Float[Array, ""],
        following: Float[Array, ""],
    ) -> SolverState:
        """`x + (t' - t) v(x, t)`."""
        return SolverState(state.x + (following - time) * denoise(state.x, time))


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Second order: the slope averaged over both ends of the step; two evaluations a step."""

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> SolverState:
        return SolverState(noisy)

    def step(
        self,
        denoise: Denoise,
        process: RectifiedFlow,
        state: SolverState,
        time: Float[Array, ""],
        following: Float[Array, ""],
    ) -> SolverState:
        """The explicit trapezoidal rule."""
        slope = denoise(state.x, time)
        proposal = state.x + (following - time) * slope
        return SolverState(state.x + (following - time) * (slope + denoise(proposal, following)) / 2)


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
    process: RectifiedFlow,
    solver: Sampler,
    told: Float[Array, " times"] | None = None,
) -> Float[Array, "*shape"]:
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` is given the time as a scalar.

    Args:
      denoise: the model.
      noise: where to start.
      times: falling; see `grids`.
      process: what the model was trained on.
      solver: of the flow.
      told: what the model is given as its time at each of `times`, where that is something else.
    """
    start = solver.init(noise, steps=times.shape[0] - 1)
    return advance(denoise, start, times, process=process, solver=solver, told=told).x


def advance(
    denoise: Denoise,
    state: Any,
    times: Float[Array, " times"],
    *,
    process: RectifiedFlow,
    solver: Sampler,
    told: Float[Array, " times"] | None = None,
) -> Any:
    """A part of the way, from a solver's state to its state at the last of `times`; arguments are as for `sample`.

    Parts that follow one another are the whole, whatever model each has: the state knows how many steps there are.
    """
    if told is not None:
        denoise = _told(denoise, times, told)

    def step(state, interval):
        return solver.step(denoise, process, state, interval[0], interval[1]), None

    end, _ = jax.lax.scan(step, state, jnp.stack([times[:-1], times[1:]], axis=1))
    return end


def _told(denoise: Denoise, times: Float[Array, " times"], told: Float[Array, " times"]) -> Denoise:
    """`denoise`, given another time; solvers evaluate it at the grid's times alone."""
    return lambda noisy, time: denoise(noisy, told[jnp.argmin(jnp.abs(times - time), axis=0)])
