"""From noise to data: ODE solvers, and the loop that runs one.

A solver exports `init(noisy) -> state` and `step(denoise, process, state, time, following) -> state`; a state's `x` is
the sample at its time. The loop is one `lax.scan`: compiled once for a shape, whatever the times.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dit_video.diffusion.objective import Denoise
from dit_video.diffusion.process import RectifiedFlow
from dit_video.errors import UserError


class SolverState(NamedTuple):
    """What a one-step solver carries."""

    x: Float[Array, "*shape"]


@dataclass(frozen=True, kw_only=True)
class Euler:
    """First order: one evaluation a step."""

    def init(self, noisy: Float[Array, "*shape"]) -> SolverState:
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

    def init(self, noisy: Float[Array, "*shape"]) -> SolverState:
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


Sampler = Euler | Heun
SAMPLERS: dict[str, Sampler] = {"euler": Euler(), "heun": Heun()}


def sampler(name: str) -> Sampler:
    """The sampler of a name that a person typed.

    Raises:
      UserError: no sampler has this name.
    """
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler {name!r}; use one of {', '.join(sorted(SAMPLERS))}")
    return SAMPLERS[name]


def time_grid(process: RectifiedFlow, steps: int) -> Float[Array, " {steps}+1"]:
    """Times from 1 (noise) to 0 (data), evenly spaced and then shifted as in training.

    Raises:
      UserError: less than one step.
    """
    if steps < 1:
        raise UserError(f"sampling takes at least 1 step, not {steps}")
    return process.shifted(jnp.linspace(1.0, 0.0, steps + 1))


def sample(
    denoise: Denoise,
    noise: Float[Array, "*shape"],
    times: Float[Array, " times"],
    *,
    process: RectifiedFlow,
    solver: Sampler,
) -> Float[Array, "*shape"]:
    """Run `solver` over the intervals of `times`, from noise to data. `denoise` is given the time as a scalar."""

    def step(state, interval):
        return solver.step(denoise, process, state, interval[0], interval[1]), None

    state, _ = jax.lax.scan(step, solver.init(noise), jnp.stack([times[:-1], times[1:]], axis=1))
    return state.x
