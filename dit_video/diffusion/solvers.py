"""Solvers of one step: what they carry is the sample alone."""

from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Array, Float

from dit_video.diffusion.predictions import Estimator
from dit_video.diffusion.process import Process


class SolverState(NamedTuple):
    """What a one-step solver carries."""

    x: Float[Array, "*shape"]


class Interval(NamedTuple):
    """One step."""

    time: Float[Array, ""]
    following: Float[Array, ""]
    noise: Float[Array, "*shape"] | None = None
    """standard normal, of this step alone"""


@dataclass(frozen=True, kw_only=True)
class Euler:
    """First order: one evaluation a step. Of any process it is DDIM without noise (arXiv 2010.02502)."""

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> SolverState:
        return SolverState(noisy)

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The data and the noise as they are estimated, in the proportions of the following time."""
        found = estimate(state.x, interval.time)
        return SolverState(process.add_noise(found.data, found.noise, interval.following))


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Second order: the slope of the process's `path` averaged over both ends of the step; two evaluations a step."""

    def init(self, noisy: Float[Array, "*shape"], *, steps: int) -> SolverState:
        return SolverState(noisy)

    def step(self, estimate: Estimator, process: Process, state: SolverState, interval: Interval) -> SolverState:
        """The explicit trapezoidal rule (arXiv 2206.00364, algorithm 1)."""
        here, there = process.path(interval.time), process.path(interval.following)
        x, change = state.x / here.scale, there.clock - here.clock
        slope = process.slope(estimate(state.x, interval.time))
        proposal = there.scale * (x + change * slope)
        slope = (slope + process.slope(estimate(proposal, interval.following))) / 2
        return SolverState(there.scale * (x + change * slope))
